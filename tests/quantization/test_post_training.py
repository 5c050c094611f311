"""Quantization after training: masks, numbers, graphs, and inputs that are refused."""

import copy
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from starfire_prune import Pruner
from starfire_prune.quantization import LayerZeros, check_masks, quantize, torchao
from starfire_prune.quantization.exporting import exported_module
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import PruningError, QuantizationError
from tests.support.quantized_networks import PRUNED, IntegerNet, images, pruned_net

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def model():
    return pruned_net()


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model, [images(), images(8, seed=2)])


# What it computes


@torch.no_grad()
def test_outputs_are_those_of_integers(quantized):
    batch = images(32, seed=3)
    wanted, got = IntegerNet(quantized)(batch), quantized(batch).numpy()
    # A sum that lies half-way between two steps may be rounded up here and down there
    differing = np.abs(got - wanted) > 1e-4
    assert differing.any(axis=1).sum() <= 2
    assert np.abs(got - wanted).max() < 0.05


@torch.no_grad()
def test_outputs_are_near_those_of_the_float_model(model, quantized):
    wanted = model(images())
    assert (quantized(images()) - wanted).abs().max() < 0.05 * wanted.abs().max()


@torch.no_grad()
def test_the_model_equals_torchaos_own_conversion(model, quantized):
    module = exported_module(dense_copy(model), images())
    settings = torchao.quantizer(trains=False, reduced_range=False)
    torchao.mark_sources(module)
    prepared = torchao.package().prepare_pt2e(module, settings)
    for batch in (images(), images(8, seed=2)):
        prepared(batch)
    converted = torchao.package().convert_pt2e(prepared)
    assert torch.equal(quantized(images()), converted(images()))


def test_the_model_is_not_changed(model):
    before, outputs = copy.deepcopy(model.state_dict()), model(images())
    quantize(model, [images(4)])
    assert torch.equal(model(images()), outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_labels_beside_the_images_are_ignored(model, quantized):
    again = quantize(model, [(images(), torch.zeros(16)), [images(8, seed=2)]])
    assert torch.equal(again(images()), quantized(images()))


# Masks and ranges


def test_pruned_weights_are_zero_in_int8(model, quantized):
    counts = check_masks(quantized)
    assert set(counts) == {f"{name}.weight" for name in ("stem", *PRUNED, "head")}
    for name in PRUNED:
        weight, values = model.get_submodule(name).weight, quantized.get_submodule(name).weight
        assert not values[weight == 0].any()
        zeros = LayerZeros(int((weight == 0).sum()), int((values == 0).sum()), weight.numel())
        assert counts[f"{name}.weight"] == zeros
        assert zeros.pruned == zeros.total / 2


def test_pruned_weights_that_are_not_zero_are_counted(quantized):
    changed = copy.deepcopy(quantized)
    weight = changed.get_submodule("conv1").weight
    weight[(weight == 0)] = 1
    text = r"conv1.weight: 432 pruned weights are not zero after quantization"
    with pytest.raises(PruningError, match=f"^{text}$"):
        check_masks(changed)


def test_a_mask_of_an_unknown_weight_is_refused(quantized):
    with pytest.raises(QuantizationError, match=r"^a mask is of lost.weight, which the model does"):
        check_masks(quantized, {"lost.weight": torch.ones(3, dtype=torch.bool)})


def test_weights_are_int8_from_minus_127_with_a_scale_for_each_channel(quantized):
    for name, weight in read_scheme(quantized).weights.items():
        assert weight.values.dtype == torch.int8, name
        largest = weight.values.flatten(1).abs().amax(1)
        assert (largest == 127).all(), name
    assert set(quantized.state_dict()["stem.weight_zero_point"].tolist()) == {0}


def test_small_weights_keep_their_precision():
    model = pruned_net()
    with torch.no_grad():
        model.head.weight *= 1e-3
    weight = quantize(model, [images()]).state_dict()["head.weight"]
    assert weight.abs().max() == 127


@pytest.mark.parametrize(("reduced_range", "largest"), [(False, 255), (True, 127)])
def test_inputs_are_uint8_of_the_range(model, reduced_range, largest):
    quantized = quantize(model, [images(4)], reduced_range=reduced_range)
    operation = torch.ops.quantized_decomposed.quantize_per_tensor.default
    nodes = quantized.graph.find_nodes(op="call_function", target=operation)
    assert {node.args[3:] for node in nodes} == {(0, largest, torch.uint8)}
    assert {each.largest for each in read_scheme(quantized).inputs.values()} == {largest}


# The graph


def test_the_exported_graph_has_float_operations_and_those_of_quantization(quantized):
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(quantized, (images(2),), dynamic_shapes=shapes, strict=False)
    nodes = program.run_decompositions({}).graph.nodes
    assert {node.op for node in quantized.graph.nodes} == {
        *("placeholder", "get_attr", "call_function", "output")
    }
    assert {str(node.target) for node in nodes if node.op == "call_function"} == {
        "aten.conv2d.default",
        "aten.relu.default",
        "aten.add.Tensor",
        "aten.mean.dim",
        "aten.linear.default",
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    }


def test_the_state_has_plain_names(quantized):
    layers = ("stem", *PRUNED, "head")
    kinds = ("weight", "weight_scale", "weight_zero_point", "bias")
    assert set(quantized.state_dict()) == {f"{name}.{kind}" for name in layers for kind in kinds}


def test_the_scheme_names_the_places_where_tensors_are_read(quantized):
    scheme = read_scheme(quantized)
    places = [("stem", 0), ("conv1", 0), ("shortcut.0", 0), ("conv2", 0), ("add", 1), ("head", 0)]
    assert set(scheme.inputs) == set(places)
    assert scheme.inputs["conv1", 0] == scheme.inputs["shortcut.0", 0]
    assert scheme.inputs["add", 1].zero_point > 0  # the shortcut's outputs are not bounded


def test_any_batch_size_and_mode_give_the_same(quantized):
    wanted = quantized(images(5))
    assert torch.allclose(quantized(images(5)[:1]), wanted[:1], atol=1e-6)
    twin = copy.deepcopy(quantized).train()
    assert torch.equal(twin.eval()(images(5)), wanted)


def test_operations_in_place_see_the_values_of_the_float_model():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.point = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            y.neg_()  # what the next layer reads
            return self.point(y)

    model = Net().eval()
    quantized = quantize(model, [images()])
    with torch.no_grad():
        assert (quantized(images()) - model(images())).abs().max() < 0.05


# What is refused


INFINITE = images(2)
INFINITE[0, 0, 0, 0] = torch.inf


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "`batches` has no images: quantization needs some hundred to find the ranges of"),
        ([images(0)], "`batches` has no images"),
        (
            [images(2), torch.rand(2, 3, 9, 9)],
            "batch 1 of `batches` has images of shape (3, 9, 9), unlike (3, 8, 8) before",
        ),
        ([INFINITE], "batch 0 of `batches` contains NaN or infinite numbers"),
        (
            [images(2).double()],
            "batch 0 of `batches` is torch.float64 on cpu; images must be torch.float32 on the CPU",
        ),
        ([3], "batch 0 of `batches` is int, not a tensor of images (N, C, H, W)"),
        ([torch.rand(3)], "batch 0 of `batches` is a tensor of shape (3,), not a tensor of images"),
    ],
)
def test_other_batches_are_refused(model, batches, text):
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}"):
        quantize(model, batches)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: model.to("meta"), "stem.weight is on meta: quantize the model on the CPU"),
        (lambda model: model.double(), "stem.weight is torch.float64: quantize the model in sin"),
        (
            lambda model: nn.init.constant_(model.bn.running_var, torch.nan),
            "bn.running_var contains NaN or infinite numbers",
        ),
    ],
)
def test_other_models_are_refused(model, change, text):
    changed = dense_copy(model)
    change(changed)
    with pytest.raises(QuantizationError, match=f"^{re.escape(text)}"):
        quantize(changed, [images()])


def test_outputs_that_overflow_are_refused(model):
    changed = dense_copy(model)
    head: Any = changed.get_submodule("head")
    nn.init.constant_(head.bias, 3e38)
    nn.init.constant_(head.weight, 1e38)
    with pytest.raises(QuantizationError, match=r"^the model's outputs of the calibration contain"):
        quantize(changed, [images()])


def test_a_weight_of_two_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    with pytest.raises(QuantizationError, match=r"^2\.weight is the weight of 2 calls of a layer"):
        quantize(model, [images()])


def test_several_outputs_are_refused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x), x

    with pytest.raises(QuantizationError, match=r"^the model returns tuple; only models that"):
        quantize(Net(), [images()])


def test_an_unfinished_pruning_is_refused():
    model = pruned_net()
    Pruner(
        model,
        {"method": "ck", "amount": 0.6, "era": [0, 2], "include": "stem"},
        updates_per_epoch=1,
    )
    with pytest.raises(PruningError, match="unfinished=True"):
        quantize(model, [images()])


def test_without_torchao_the_error_names_the_extra(model, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    text = "quantization needs torchao: pip install 'starfire-prune[quantize]'"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(text)}$"):
        quantize(model, [images()])
