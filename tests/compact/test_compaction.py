"""Compaction: smaller tensors, the same outputs, and a report of both."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from starfire_prune import ck_structured, filter_structured
from starfire_prune.compact.compaction import CompactReport, compact, format_compaction
from starfire_prune.compact.surgery import Surgery
from starfire_prune.utils.errors import TraceError
from tests.support.networks import Detector, SmallNet, equal_states, snapshot
from tests.support.sparse_networks import (
    FULL,
    NARROW,
    NARROW_CASES,
    TOLERANCES,
    difference,
    images,
    sparse_network,
)

every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def size_for(name: str) -> int:
    return 64 if name == "vgg_bn of convolutions" else 32


@functools.cache
def compacted(name: str) -> tuple[nn.Module, Any, CompactReport]:
    """A narrow sparse network, the compact one, and the report."""
    model = sparse_network(NARROW[name])
    return model, *compact(model, images(torch.float64, size_for(name)))


@pytest.mark.parametrize("name", NARROW_CASES)
def test_compact_networks_give_the_same_outputs(name):
    model, smaller, report = compacted(name)
    for seed in (1, 2):
        inputs = images(torch.float64, size_for(name), seed)
        assert difference(model, smaller, inputs) < TOLERANCES[torch.float64]
    assert report.deviation < TOLERANCES[torch.float64]


@pytest.mark.parametrize("name", NARROW_CASES)
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
@pytest.mark.parametrize("name", NARROW_CASES)
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


def test_pruned_filters_are_removed():
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


def test_channels_that_only_a_dead_channel_reads_are_removed():
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
    assert report["0"].dead_kept == 1
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
    assert report["0"].dead_kept == len(dead) - (12 - left)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images(size=8)), model(images(size=8)))


def test_the_report_says_why_dead_channels_are_kept():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].weight[3] = 0
    _, report = compact(model, images(size=8))
    assert (report["0"].dead_kept, report["0"].reason) == (
        1,
        "read by 1 (it pads its input by zeros, so that its output differs at the border)",
    )
    assert (report["1"].dead_kept, report["1"].reason) == (1, "its channels are the model's output")


def test_channels_that_a_norm_mixes_are_kept():
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


def test_frozen_parameters_are_still_frozen():
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
    with pytest.raises(RuntimeError, match=r"does not run in the model \(.* use fold_constants"):
        compact(WrittenIn(), images(size=8))
    model = nn.Sequential(nn.Identity(), WrittenIn())
    with pytest.raises(RuntimeError, match=r"does not run in module 1 \("):
        compact(model, images(size=8))


class Scaled(nn.Conv2d):
    """A convolution that computes its weight by a gain for each of its filters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.weight * self.gain, None)
        return output


def test_a_layer_that_computes_its_weight_keeps_all_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        half_dead(Scaled(3, 4)), half_dead(nn.Conv2d(4, 6, 1)), nn.Conv2d(6, 2, 1)
    )
    smaller, report = compact(model, images())
    assert report["0"].outputs == (4, 4)
    assert report["0"].reason == "no operation of the model reads its weight as it is"
    assert report["1"].outputs == (6, 4)
    torch.testing.assert_close(smaller(images()), model(images()))


class Network(nn.Module):
    """Modules, put together by a function of the network itself and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def half_dead(layer: nn.Module) -> nn.Module:
    """The layer with the first two output channels constantly zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[:2] = 0
    return layer


def pair(function: Callable[[Any, Tensor], Any], reader: nn.Module | None = None) -> nn.Module:
    """A convolution of 8 channels, two of them dead, and a reader of its 6 times 6 places."""
    source = half_dead(nn.Conv2d(3, 8, 3))
    return Network(function, source=source, reader=reader or nn.Conv2d(8, 4, 1)).eval()


def assert_same_outputs(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other(images(size=8)), one(images(size=8)))


def test_other_outputs_are_found_though_the_example_is_all_zero():
    model = pair(lambda m, x: m.reader(m.source(x)) * len(m.source.weight))
    for layer in model.children():
        layer.register_parameter("bias", None)
    with pytest.raises(RuntimeError, match=r"outputs differ by .* use fold_constants"):
        compact(model, torch.zeros(2, 3, 8, 8))


def test_the_deviation_is_not_only_of_an_all_zero_example():
    model = sparse_network(NARROW["resnet18"], dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.zeros(module.num_features)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.get_parameter("fc.bias"))
    _, report = compact(model, torch.zeros(2, 3, 32, 32))
    assert 0 < report.deviation < TOLERANCES[torch.float32]


def test_the_global_generator_is_left_as_it_is():
    model = SmallNet()
    state = torch.get_rng_state()
    compact(model, images(size=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_integer_arguments_are_used_as_they_are():
    embedding = nn.Embedding(5, 3)
    reader = half_dead(nn.Linear(3, 8))
    model = nn.Sequential(embedding, reader, nn.ReLU(), nn.Linear(8, 2)).eval()
    smaller: Any
    smaller, _ = compact(model, torch.tensor([0, 4, 2]))
    assert smaller[1].out_features == 6


def test_models_that_change_their_input_are_compared_on_the_same_one():
    model = pair(lambda m, x: m.reader(m.source(x.add_(1))))
    example = images(size=8)
    _, report = compact(model, example)
    assert report["source"].outputs == (8, 6)
    assert torch.equal(example, images(size=8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compaction_in_half_precision(dtype):
    model = sparse_network(NARROW["resnet18"], dtype=dtype)
    _, report = compact(model, images(dtype))
    assert report.parameters[1] < 0.95 * report.parameters[0]
    assert 0 < report.deviation < 16 * torch.finfo(dtype).eps


NEED_ALL: dict[str, Callable[[], nn.Module]] = {
    "pixel shuffle": lambda: pair(
        lambda m, x: m.reader(functional.pixel_shuffle(m.source(x), 2)), nn.Conv2d(2, 4, 1)
    ),
    "flattening twice": lambda: pair(
        lambda m, x: m.reader(m.source(x).flatten(2).flatten(1)), nn.Linear(8 * 36, 4)
    ),
    "bilinear": lambda: pair(
        lambda m, x: m.reader(m.source(x).mean((2, 3)), x.mean((2, 3))), nn.Bilinear(8, 3, 4)
    ),
    "recurrent": lambda: pair(
        lambda m, x: m.reader(m.source(x).flatten(2).mT)[0], nn.GRU(8, 4, batch_first=True)
    ),
    "transposed weight": lambda: Network(
        lambda m, x: functional.linear(m.source(x.mean((2, 3))).relu(), m.source.weight.T),
        source=half_dead(nn.Linear(3, 8)),
    ).eval(),
    "a constant": lambda: pair(
        lambda m, x: m.reader(m.source(x) * torch.tensor([[1.0] * 6] * 8).unsqueeze(1))
    ),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # of the GRU
@pytest.mark.parametrize("build", NEED_ALL.values(), ids=NEED_ALL)
def test_channels_that_something_other_than_a_layer_reads_are_kept(build):
    model = build()
    smaller, report = compact(model, images(size=8))
    assert report["source"].outputs == (8, 8)
    assert report["source"].dead_kept == 2
    assert_same_outputs(model, smaller)


def test_every_layer_keeps_a_channel_where_another_is_coupled_with_two():
    model = Network(
        lambda m, x: m.reader(m.wide(x) + torch.cat([m.one(x), m.other(x)], 1)),
        wide=nn.Conv2d(3, 8, 1),
        one=nn.Conv2d(3, 4, 1),
        other=nn.Conv2d(3, 4, 1),
        reader=nn.Conv2d(8, 4, 1),
    ).eval()
    with torch.no_grad():
        model.get_parameter("reader.weight")[:, :4] = 0
    smaller, report = compact(model, images(size=8))
    assert [layer.outputs[1] for layer in report.layers] == [5, 1, 4, 4]
    assert_same_outputs(model, smaller)


@pytest.mark.slow
def test_weights_that_the_forward_pass_standardises_are_refused():
    model = timm.create_model("nf_regnet_b0", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            half_dead(module)
    with pytest.raises(RuntimeError, match="use fold_constants"):
        compact(model, images(size=64))


class Attention(nn.Module):
    """Attention over pixels for some channels, which Torch-Pruning can't follow, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 1)
        self.qkv = nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(8, 8, 1)
        self.inner = nn.Conv2d(8, 16, 1)
        self.after = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.before(x)
        attended, other = features.split(4, 1)
        q, k, v = self.qkv(attended).flatten(2).split(4, 1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(attended.shape)
        features = features + self.project(torch.cat([mixed, other], 1).relu())
        output: Tensor = features + self.after(self.inner(features).relu())
        return output


def test_what_torch_pruning_can_not_follow_is_kept_and_the_rest_is_cut():
    model = Attention().eval()
    for module in (model.before, model.qkv, model.project, model.inner):
        half_dead(module)
    smaller, report = compact(model, images(size=4))
    assert {layer.name: layer.outputs for layer in report.layers} == {
        "before": (8, 8),
        "qkv": (12, 12),
        "project": (8, 8),
        "inner": (16, 14),
        "after": (8, 8),
    }
    assert_same_outputs(model, smaller)


def test_any_error_while_following_channels_keeps_them(monkeypatch):
    def fail(graph: object, node: object) -> None:
        raise ZeroDivisionError

    pruning: Any = importlib.import_module("torch_pruning.dependency.index_mapping")
    monkeypatch.setattr(pruning, "update_reshape_index_mapping", fail)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 64, 10)
    ).eval()
    for index in (0, 2):
        half_dead(model[index])
    smaller, report = compact(model, images(size=8))
    assert [layer.outputs for layer in report.layers] == [(8, 6), (8, 8), (10, 10)]
    assert report["2"].dead_kept == 2
    assert report["2"].reason == "its channels are coupled with _Reshape_0"
    assert_same_outputs(model, smaller)
    assert pruning.update_reshape_index_mapping is fail


def test_a_model_with_data_dependent_shapes_names_the_part_to_cut():
    with pytest.raises(TraceError, match=r"; use its part `model.backbone` instead, which can be"):
        compact(Detector(), images(size=8))
    backbone = Detector().backbone.eval()
    smaller, _ = compact(backbone, images(size=8))
    assert_same_outputs(backbone, smaller)


def test_any_error_of_the_surgery_names_the_way_out(monkeypatch):
    def run(surgery: Surgery) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(Surgery, "run", run)
    with pytest.raises(RuntimeError, match=r"can't cut .*IndexError: list.* use fold_constants"):
        compact(SmallNet(), images(size=8))


def test_an_error_of_the_surgery_names_the_layer(monkeypatch):
    def fail(surgery: Surgery, item: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(Surgery, "_cut", fail)
    model = nn.Sequential(half_dead(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(RuntimeError, match=r"^Torch-Pruning can't cut the model at layer 0 \(Ind"):
        compact(model, images(size=8))


def test_outputs_may_hold_integers_bools_and_other_things():
    model = pair(lambda m, x: {"y": (y := m.reader(m.source(x))), "n": [None, 3, y > 0, y.shape]})
    _, report = compact(model, images(size=8))
    assert report["source"].outputs == (8, 6)


def test_models_of_integer_outputs_are_left_whole():
    model = pair(lambda m, x: m.reader(m.source(x)).argmax(1))
    smaller, report = compact(model, images(size=8))
    assert report.parameters[0] == report.parameters[1]
    assert_same_outputs(model, smaller)


CHANGED: dict[str, Callable[[Any, Tensor], Any]] = {
    "integers": lambda m, x: (m.reader(m.source(x)), torch.tensor(len(m.source.weight))),
    "shapes": lambda m, x: (m.reader(m.source(x)), m.source.bias.clone()),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_other_integers_and_shapes_are_refused(kind):
    with pytest.raises(RuntimeError, match=f"outputs .*{kind}.* use fold_constants"):
        compact(pair(CHANGED[kind]), images(size=8))


def test_equal_infinities_and_nans_are_no_deviation():
    model = pair(lambda m, x: (m.reader(m.source(x)), 1 / (x * 0), (x * 0) / (x * 0)))
    assert compact(model, images(size=8))[1].deviation < TOLERANCES[torch.float32]


def tied(dead: bool) -> Any:
    """Two convolutions of one weight, whose outputs may have dead channels."""
    model: Any = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3))).eval()
    if dead:
        half_dead(model[0])
    model[1].weight = model[0].weight
    return nn.Sequential(nn.Conv2d(3, 8, 1), *model).eval()


def test_layers_that_share_a_weight_are_cut_separately():
    model = tied(dead=True)
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert [layer.inputs[1] for layer in report.layers] == [3, 8, 6, 6]
    assert_same_outputs(model, smaller)


def test_a_weight_is_still_shared_if_nothing_is_removed():
    model = tied(dead=False)
    smaller: Any
    smaller, report = compact(model, images(size=8))
    assert smaller[1].weight is smaller[2].weight
    assert report.parameters[0] == report.parameters[1]


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'starfire-prune\[compact\]'"):
        compact(SmallNet(), images(size=8))
