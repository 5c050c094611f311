"""Compaction: smaller tensors, the same outputs, and a report of both."""

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import ck_structured, filter_structured
from starfire_prune.compact import CompactReport, compact, format_compaction
from tests.networks import SmallNet, equal_states, snapshot
from tests.sparse_networks import FULL, NARROW, TOLERANCES, difference, images, sparse_network

every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The networks are too small for several threads."""


def size_for(name: str) -> int:
    return 64 if name == "vgg_bn of convolutions" else 32


@functools.cache
def compacted(name: str) -> tuple[nn.Module, Any, CompactReport]:
    """A narrow sparse network, the compact one, and the report."""
    model = sparse_network(NARROW[name])
    return model, *compact(model, images(torch.float64, size_for(name)))


@pytest.mark.parametrize("name", NARROW)
def test_compact_networks_give_the_same_outputs(name):
    model, smaller, report = compacted(name)
    for seed in (1, 2):
        inputs = images(torch.float64, size_for(name), seed)
        assert difference(model, smaller, inputs) < TOLERANCES[torch.float64]
    assert report.deviation < TOLERANCES[torch.float64]


@pytest.mark.parametrize("name", NARROW)
def test_compact_networks_are_smaller(name):
    model, smaller, report = compacted(name)
    dense = sum(p.numel() for p in model.parameters())
    assert report.parameters == (dense, sum(p.numel() for p in smaller.parameters()))
    assert report.parameters[1] < 0.95 * report.parameters[0]
    assert report.macs[1] < 0.95 * report.macs[0]


def test_compaction_in_single_precision():
    model = sparse_network(NARROW["resnet50"], 3, torch.float32, 0.9)
    smaller, _ = compact(model, images())
    assert difference(model, smaller, images(seed=1)) < TOLERANCES[torch.float32]


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("amount", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", NARROW)
def test_compaction_at_other_amounts(name, amount, dtype):
    model = sparse_network(NARROW[name], int(100 * amount), dtype, amount, share=0.5)
    smaller, _ = compact(model, images(dtype, size_for(name)))
    inputs = images(dtype, size_for(name), seed=1)
    assert difference(model, smaller, inputs) < TOLERANCES[dtype]


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("name", FULL)
def test_compact_networks_of_full_size_give_the_same_outputs(name, dtype):
    if name == "vgg16_bn" and dtype is torch.float64:
        pytest.skip("takes several GiB")
    size = 32 if name == "vgg16_bn" else 64
    model = sparse_network(FULL[name], dtype=dtype)
    smaller, report = compact(model, images(dtype, size))
    assert difference(model, smaller, images(dtype, size, seed=1)) < TOLERANCES[dtype]
    assert report.parameters[1] < report.parameters[0]


def test_filters_that_are_gone_are_cut_out():
    model = SmallNet().eval()
    for layer in (model.stem, model.body, model.point):
        nn.init.zeros_(layer.bias) if layer.bias is not None else None
        filter_structured(layer, amount=0.5)
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert smaller.stem.weight.shape == (4, 3, 3, 3)
    assert smaller.body.weight.shape == (6, 4, 3, 3)
    assert smaller.point.weight.shape == (4, 6, 1, 1)
    assert smaller.head.weight.shape == (10, 4)
    assert report["body"].inputs == (8, 4)
    assert report["body"].outputs == (12, 6)
    assert report["body"].parameters == (8 * 12 * 9 + 12, 4 * 6 * 9 + 6)
    assert report["body"].macs == (8 * 12 * 9 * 16, 4 * 6 * 9 * 16)


def test_what_a_dead_channel_alone_reads_goes_too():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1)).eval()
    with torch.no_grad():
        model[1].weight[0, :] = 0
        model[1].weight[1:, 2] = 0
    smaller: Any
    smaller, _ = compact(model, images(size=8))
    assert [layer.out_channels for layer in smaller] == [3, 4, 6]


def test_one_constant_channel_stands_for_all_under_padding():
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = torch.tensor([1.0, -3.0, 2.0, 0.0])
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert smaller[0].out_channels == 3
    assert -3.0 in smaller[0].bias.tolist()
    assert report["0"].stayed == 1
    with torch.no_grad():
        torch.testing.assert_close(smaller(images(size=8)), model(images(size=8)))


def test_every_layer_keeps_a_channel():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
    smaller: Any
    smaller, _ = compact(model, images(size=8))
    assert smaller[0].out_channels == 1
    with torch.no_grad():
        torch.testing.assert_close(smaller(images(size=8)), model(images(size=8)))


def grouped(dead: list[int]) -> nn.Sequential:
    """A grouped convolution, 4 groups of 3 channels, behind a layer with dead channels."""
    source = nn.Conv2d(3, 12, 1, bias=False)
    with torch.no_grad():
        source.weight[dead] = 0
    return nn.Sequential(source, nn.Conv2d(12, 8, 3, groups=4), nn.Conv2d(8, 2, 1)).eval()


@pytest.mark.parametrize(
    ("dead", "left"),
    [([0, 4, 8, 9], 8), ([0, 1, 4, 8, 9], 8), ([0, 1, 2], 12), ([0, 1, 3, 4, 6, 7, 9, 10], 4)],
)
def test_groups_lose_equally_many_channels(dead, left):
    model = grouped(dead)
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert (smaller[0].out_channels, smaller[1].in_channels, smaller[1].groups) == (left, left, 4)
    assert report["0"].stayed == len(dead) - (12 - left)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images(size=8)), model(images(size=8)))


def test_the_report_says_why_dead_channels_stay():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].weight[3] = 0
    _, report = compact(model, images(size=8))
    assert (report["0"].stayed, report["0"].reason) == (
        1,
        "read by 1 (it pads its input by zeros, so that its output differs at the border)",
    )
    assert (report["1"].stayed, report["1"].reason) == (1, "its channels are the model's output")


def test_channels_that_a_norm_mixes_stay():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert smaller[0].out_channels == 4
    assert "group_norm" in str(report["0"].reason)


def test_the_table_holds_layers_totals_and_reasons():
    _, _, report = compacted("resnet18")
    table = format_compaction(report)
    lines = table.splitlines()
    assert lines[0].split()[:3] == ["layer", "in", "out"]
    assert len(lines) == 2 + len(report.layers) + 2
    assert f"{report.parameters[0]:,} -> {report.parameters[1]:,}" in lines[-2]
    assert "of the largest output" in lines[-1]
    assert any(layer.reason and layer.reason in table for layer in report.layers)


def test_layers_of_the_report_are_found_by_name_or_refused():
    _, _, report = compacted("resnet18")
    assert report["fc"].outputs == (10, 10)
    with pytest.raises(KeyError, match="nothing"):
        report["nothing"]


def test_the_model_itself_is_left_as_it_is():
    model = SmallNet().train()
    ck_structured(model.stem, amount=0.9)
    before = snapshot(model)
    smaller, _ = compact(model, images(size=8))
    assert equal_states(before, snapshot(model))
    assert model.training
    assert not smaller.training


def test_frozen_parameters_stay_frozen():
    model = SmallNet()
    filter_structured(model.stem, amount=0.5)
    prune.remove(model.stem, "weight")  # type: ignore[no-untyped-call]
    model.stem.requires_grad_(False)
    smaller, _ = compact(model, images(size=8))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in smaller.named_parameters()} == trainable


class WrittenIn(nn.Module):
    """Has the number of its channels in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 4, 1, bias=False)
        self.reader = nn.Linear(4 * 64, 2)
        with torch.no_grad():
            self.source.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.source(x).view(len(x), 4 * 64))
        return output


def test_models_with_numbers_of_channels_written_in_are_refused():
    with pytest.raises(RuntimeError, match=r"does not run .* use fold_constants"):
        compact(WrittenIn(), images(size=8))


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'starfire-prune\[compact\]'"):
        compact(SmallNet(), images(size=8))


def test_importing_the_module_does_not_load_torch_pruning():
    code = "import sys, starfire_prune.compact; sys.exit('torch_pruning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
