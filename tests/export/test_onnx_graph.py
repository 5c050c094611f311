"""Batch norms folded in the graph of an ONNX model, which is written by hand here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from starfire_prune.export.onnx_graph import Weights, fold_batch_norms, strip_debug_data

NORM = ("scale", "shift", "mean", "variance")
VALUES = {
    "kernels": np.array([1.0, 0.0, -2.0, 3.0]).reshape(2, 2, 1, 1),
    "scale": np.array([2.0, -1.0]),
    "shift": np.array([0.5, 0.0]),
    "mean": np.array([1.0, 2.0]),
    "variance": np.array([3.0, 0.0]),
}
# scale / sqrt(variance + 1) is 1 and -1
FOLDED_KERNELS = [1.0, 0.0, 2.0, -3.0]
FOLDED_BIAS = [-0.5, 2.0]
FOLDED_BIAS_OF_TEN = [9.5, -8.0]


def conv(output: str = "y", bias: Sequence[str] = ()) -> Any:
    return helper.make_node("Conv", ["x", "kernels", *bias], [output])


def norm(read: str = "y", output: str = "z") -> Any:
    return helper.make_node("BatchNormalization", [read, *NORM], [output], epsilon=1.0)


def model_of(nodes: Sequence[Any], outputs: Sequence[str] = ("z",), **changed: Any) -> Any:
    values = {**VALUES, **changed}
    tensors = [
        numpy_helper.from_array(value.astype(np.float32), key) for key, value in values.items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 1, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def fold(model: Any) -> int:
    return fold_batch_norms(model.graph, Weights(onnx, model.graph))


def outputs_of(model: Any) -> Any:
    images = np.array([[1.0, 2.0], [-1.0, 0.5]], np.float32).reshape(2, 2, 1, 1)
    return ReferenceEvaluator(model).run(None, {"x": images})


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def array(model: Any, name: str) -> list[float]:
    values: list[float] = Weights(onnx, model.graph)[name].flatten().tolist()
    return values


def test_a_batch_norm_is_folded_into_kernels_and_a_new_bias():
    model = model_of([conv(), norm()])
    assert fold(model) == 1
    assert operators(model) == ["Conv"]
    assert array(model, "kernels") == FOLDED_KERNELS
    assert array(model, "kernels.folded_bias") == FOLDED_BIAS


def test_a_bias_that_is_there_is_folded_too():
    model = model_of([conv(bias=["ten"]), norm()], ten=np.array([10.0, 10.0]))
    fold(model)
    assert array(model, "kernels.folded_bias") == FOLDED_BIAS_OF_TEN


def test_initializers_that_nothing_reads_are_removed():
    model = model_of([conv(), norm()])
    fold(model)
    names = {tensor.name for tensor in model.graph.initializer}
    assert names == {"kernels", "kernels.folded_bias"}


def test_folding_keeps_the_outputs():
    model = model_of([conv(), norm()])
    (expected,) = outputs_of(model)
    fold(model)
    np.testing.assert_allclose(outputs_of(model)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [conv(), helper.make_node("Relu", ["y"], ["r"]), norm("r")],
        [conv(), norm(), helper.make_node("Relu", ["y"], ["other"])],
        [conv(), norm(output="a"), norm(output="z")],
        [conv(), conv("y2"), norm(), norm("y2", "z2")],
        [norm("x")],
        [
            helper.make_node("Identity", ["kernels"], ["computed"]),
            helper.make_node("Conv", ["x", "computed"], ["y"]),
            norm(),
        ],
    ],
    ids=["not after it", "read elsewhere", "two norms", "shared kernels", "no layer", "computed"],
)
def test_a_batch_norm_that_can_not_be_folded_is_kept(nodes):
    model = model_of(nodes)
    before = model.SerializeToString()
    assert fold(model) == 0
    assert [node.op_type for node in nodes] == operators(model)
    assert outputs_of(model)[0].tolist() == outputs_of(onnx.load_from_string(before))[0].tolist()


def test_a_convolution_that_is_an_output_itself_keeps_its_batch_norm():
    model = model_of([conv(), norm()], outputs=["y", "z"])
    assert fold(model) == 0


def test_weights_that_an_inner_graph_reads_are_kept():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["scale"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )
    choice = helper.make_node("If", ["true"], ["c"], then_branch=branch, else_branch=branch)
    model = model_of([conv(), norm(), choice], ["z", "c"])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    assert fold(model) == 1
    assert array(model, "scale") == [2.0, -1.0]


@given(
    kernels=st.lists(st.sampled_from([0.0, 1e-30, 1.0, -2.5]), min_size=4, max_size=4),
    scale=st.lists(st.sampled_from([0.0, 1e-20, -3.0, 1e6]), min_size=2, max_size=2),
)
def test_zeros_are_still_positive_zeros(kernels, scale):
    values = np.array(kernels).reshape(2, 2, 1, 1)
    model = model_of([conv(), norm()], kernels=values, scale=np.array(scale))
    fold(model)
    folded = Weights(onnx, model.graph)["kernels"]
    assert (folded[values == 0] == 0).all()
    assert not np.signbit(folded[values == 0]).any()


def test_debug_data_of_inner_graphs_and_functions_are_removed():
    node = helper.make_node("Identity", ["scale"], ["b"], doc_string="/home/somebody/model.py")
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])
    branch = helper.make_graph([node], "branch", [], [output], doc_string="of somebody")
    choice = helper.make_node("If", ["true"], ["c"], then_branch=branch, else_branch=branch)
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("own", "f", ["scale"], ["b"], [node], opsets)
    model = model_of([conv(), norm(), choice])
    model.functions.append(function)
    strip_debug_data(model)
    assert b"somebody" not in model.SerializeToString()
    assert len(model.functions[0].node) == len(model.graph.node[2].attribute[0].g.node) == 1


def test_debug_data_of_the_exporter_are_removed():
    model = model_of([conv(), norm()])
    model.graph.node[0].doc_string = "text"
    parts: list[Any] = [model.graph, *model.graph.node, *model.graph.input]
    parts += [*model.graph.output, *model.graph.initializer]
    for part in parts:
        part.metadata_props.add(key="trace", value="/home/somebody/model.py")
    strip_debug_data(model.graph)
    assert b"somebody" not in model.SerializeToString()
    assert not model.graph.node[0].doc_string
