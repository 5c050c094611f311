"""ONNX files of quantized models."""

import numpy as np
import onnx
import onnxruntime
import pytest

from starfire_prune.export import export_onnx
from starfire_prune.quantization import quantize
from starfire_prune.utils.modules import effective_weight
from tests.export.test_onnx import NEEDS_EXPORTER
from tests.support.quantized_networks import PRUNED, IntegerNet, images, pruned_net

pytest.importorskip("torchao")

pytestmark = NEEDS_EXPORTER


def test_the_file_quantizes_as_the_model_does(tmp_path):
    model = pruned_net()
    quantized = quantize(model, [images()])
    export_onnx(quantized, tmp_path / "int8.onnx", (3, 8, 8))
    graph = onnx.load(tmp_path / "int8.onnx").graph
    operations = [node.op_type for node in graph.node]
    assert operations.count("QuantizeLinear") == 5  # images, stem, conv1, shortcut and pooling
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for name in PRUNED:
        weight = arrays[f"{name}.weight"]
        assert weight.dtype == np.int8
        pruned = effective_weight(model.get_submodule(name)).numpy() == 0
        assert not weight[pruned].any()
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    batch = images(32, seed=3)
    (got,) = session.run(None, {"images": batch.numpy()})
    wanted = IntegerNet(quantized)(batch)
    assert (np.abs(got - wanted) > 1e-4).any(axis=1).sum() <= 2  # sums between two steps
    assert np.abs(got - wanted).max() < 0.05
