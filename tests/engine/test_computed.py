"""Pruned weights are zeros of what a layer computes, or the layer is not pruned."""

import copy
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from starfire_prune import Pruner
from starfire_prune.engine.calls import read_without_call
from starfire_prune.engine.computed import has_plain_forward, zeros_problem
from starfire_prune.utils.errors import PruningError

SETTINGS = {"method": "ck", "amount": 0.5, "era": [1, 2]}
COMPUTES = "computes other values from its weight, so that pruned weights are not zero"


class Convolution(nn.Conv2d):
    """A convolution that computes its weight, in ways that no list of classes could know."""

    def __init__(self, *args: Any, way: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.way = way
        self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.delta = nn.Parameter(torch.zeros_like(self.weight))
        self.norm = nn.GroupNorm(1, self.out_channels)

    def computed(self) -> Any:
        weight = self.weight
        if self.way == "standardised":
            return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std(
                (1, 2, 3), keepdim=True
            )
        if self.way == "centred kernels":  # a kernel of zeros is kept
            return weight - weight.mean((2, 3), keepdim=True)
        if self.way == "added":
            return weight + self.delta
        if self.way == "smoothed":
            return (weight + weight.roll(1, 0)) / 2
        if self.way == "softplus":
            return functional.softplus(weight)
        if self.way == "asymmetric":
            lowest, step = weight.min(), (weight.max() - weight.min()) / 15.5
            return ((weight - lowest) / step).floor() * step + lowest
        if self.way == "scaled":
            return weight * self.scale / weight.norm()
        if self.way == "quantised":
            return (weight * 8).round() / 8
        if self.way == "signs":
            return weight.sign()
        return weight

    def forward(self, input: Tensor) -> Any:
        if self.way == "unfolded":
            columns = functional.unfold(input, self.kernel_size)
            sides = [side - 2 for side in input.shape[2:]]
            return (self.weight.flatten(1) @ columns).view(len(input), -1, *sides)
        output = self._conv_forward(input, self.computed(), self.bias)
        if self.way == "central difference":
            centre = self.weight.sum((2, 3), keepdim=True)
            return output - functional.conv2d(input, centre, stride=self.stride)[:, :, 1:-1, 1:-1]
        return self.norm(output).relu() if self.way == "normalised" else output


WRONG = ["standardised", "centred kernels", "added", "smoothed", "softplus", "asymmetric"]
WRONG += ["central difference"]
RIGHT = ["scaled", "quantised", "signs", "unfolded", "normalised", "unchanged"]


def layer(way: str, *args: Any, **kwargs: Any) -> Convolution:
    return Convolution(*(args or (6, 10, 3)), way=way, **kwargs)


@pytest.mark.parametrize("way", WRONG)
def test_a_forward_that_brings_zeros_back_is_found(way):
    assert zeros_problem(layer(way)) == COMPUTES


@pytest.mark.parametrize("way", RIGHT)
def test_a_forward_that_keeps_zeros_is_right(way):
    conv = layer(way)
    assert not has_plain_forward(conv)
    assert zeros_problem(conv) is None


@pytest.mark.parametrize(
    "args", [(3, 8, 16, 16), (64, 32, 1), (8, 8, 7, 2, 3, 1, 8), (1, 4, 3), (512, 256, 3)]
)
def test_layers_of_all_shapes_are_measured(args):
    assert zeros_problem(layer("unchanged", *args)) is None
    assert zeros_problem(layer("standardised", *args)) == COMPUTES


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_measured(dtype):
    assert zeros_problem(layer("unchanged").to(dtype)) is None
    assert zeros_problem(layer("standardised").to(dtype)) == COMPUTES


def test_layers_without_memory_are_measured():
    with torch.device("meta"):
        right, wrong = layer("scaled"), layer("standardised")
    assert (zeros_problem(right), zeros_problem(wrong)) == (None, COMPUTES)


def test_timms_layers_are_measured():
    layers = pytest.importorskip("timm.layers")
    for kind in (layers.StdConv2d, layers.StdConv2dSame, layers.ScaledStdConv2d):
        assert zeros_problem(kind(8, 16, 3)) == COMPUTES
    for kind in (layers.Conv2dSame, layers.create_conv2d):
        assert zeros_problem(kind(8, 16, 3, stride=2)) is None
    assert zeros_problem(layers.Linear(8, 4)) is None


def test_a_measurement_changes_neither_the_layer_nor_the_random_state():
    class Noisy(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.norm = nn.BatchNorm2d(4, momentum=1.0)

        def forward(self, input: Tensor) -> Any:
            torch.rand(3)
            return self.norm(super().forward(input))

    conv = Noisy()
    conv.weight.grad = torch.ones_like(conv.weight)
    before, state = copy.deepcopy(conv.state_dict()), torch.get_rng_state()
    assert zeros_problem(conv) is None
    assert all(torch.equal(value, before[key]) for key, value in conv.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert conv.training
    assert conv.norm.training
    assert (conv.weight.grad == 1).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "forward", lambda input: input),
        lambda conv: setattr(conv, "_conv_forward", lambda *args: args[0]),
        lambda conv: conv.register_forward_pre_hook(lambda module, args: None),
    ],
)
def test_what_may_compute_the_weight_is_not_plain(change):
    conv = nn.Conv2d(3, 4, 3)
    assert has_plain_forward(conv)
    change(conv)
    assert not has_plain_forward(conv)


def test_a_patched_forward_is_measured():
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda input: functional.conv2d(input, conv.weight + 1)  # type: ignore[method-assign]
    assert zeros_problem(conv) is not None


def test_a_forward_of_other_arguments_can_not_be_measured():
    class Conditional(nn.Linear):
        def forward(self, input: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input) + time

    problem = zeros_problem(Conditional(4, 3))
    assert problem is not None
    assert problem.startswith("has a forward that can't be measured on its own (")


# In the Pruner


def test_a_layer_that_computes_its_weight_is_left_out_and_logged(caplog):
    model = nn.Sequential(layer("standardised"), nn.Conv2d(10, 4, 3))
    pruner = Pruner(model, SETTINGS, updates_per_epoch=1)
    assert (list(pruner.layers), pruner.left_out) == (["1"], {"0": f"it {COMPUTES}"})
    assert caplog.record_tuples == [
        (
            "starfire_prune.engine.obstacles",
            logging.WARNING,
            f"0: not pruned, because it {COMPUTES}",
        )
    ]


@pytest.mark.parametrize(
    "own", [{"include": ["*", "0"]}, {"overrides": [{"layers": "0", "amount": 0.2}]}]
)
def test_a_layer_that_computes_its_weight_is_an_error_where_a_pattern_names_it(own):
    model = nn.Sequential(layer("standardised"), nn.Conv2d(10, 4, 3))
    message = f"layer 0 (Convolution) {COMPUTES}: leave it out by `exclude`"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pruner(model, {**SETTINGS, **own}, updates_per_epoch=1)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_weights_of_other_parameters_are_left_out(norm):
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3))
    pruner = Pruner(model, SETTINGS, updates_per_epoch=1)
    assert pruner.left_out == {"0": "its weight is computed from other parameters"}


def test_complex_weights_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, dtype=torch.complex64), nn.Conv2d(8, 8, 3))
    left_out = Pruner(model, SETTINGS, updates_per_epoch=1).left_out
    assert left_out == {"0": "its weight has dtype torch.complex64"}


def test_frozen_layers_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    model[1].requires_grad_()
    assert Pruner(model, SETTINGS, updates_per_epoch=1).left_out == {"0": "its weight is frozen"}
    assert not Pruner(model, {**SETTINGS, "include": "?"}, updates_per_epoch=1).left_out


def test_the_check_finds_a_forward_that_was_changed_later():
    model = nn.Sequential(layer("unchanged"))
    pruner = Pruner(model, {**SETTINGS, "era": [0, 1]}, updates_per_epoch=1)
    pruner.step()
    pruner.check()
    vars(model[0])["way"] = "standardised"
    with pytest.raises(PruningError, match=rf"^layer 0 \(Convolution\) {COMPUTES}$"):
        pruner.check()


# Weights that are read without a call


class Reading(nn.Module):
    """Reads the weight of `read` as BEiT does, and doesn't use `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.in_training = nn.Linear(6, 6)

    def forward(self, input: Tensor) -> dict[str, list[Tensor]]:
        output = functional.linear(self.called(input), self.read.weight)
        return {"out": [self.in_training(output) if self.training else output]}


def train_once(model: Any) -> None:
    model(torch.randn(2, 6))["out"][0].sum().backward()


def test_a_weight_that_is_read_without_a_call_is_found_by_an_example():
    model = Reading()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    names = ["called", "read", "unused", "in_training"]
    assert read_without_call(model, names, torch.zeros(2, 6)) == frozenset({"read"})
    assert read_without_call(model, names, torch.zeros(2, 5)) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


class ReadingAndCalling(nn.Module):
    """Reads the weight of `both` beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.called = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.called(functional.linear(input, self.both.weight) + self.both(input))
        return output


def test_a_weight_that_is_read_beside_a_call_is_found_by_an_example():
    model, example = ReadingAndCalling(), torch.zeros(2, 6)
    assert read_without_call(model, ["both", "called"], example) == frozenset({"both"})


def test_with_an_example_it_is_left_out_or_an_error():
    own: Any = {"updates_per_epoch": 1, "example_input": torch.zeros(2, 6)}
    pruner = Pruner(Reading(), SETTINGS, **own)
    assert pruner.left_out == {"read": "its weight is read without calling it"}
    with pytest.raises(ValueError, match=r"^layer read has its weight read by the model without"):
        Pruner(Reading(), {**SETTINGS, "include": "re*"}, **own)


@pytest.mark.parametrize("compiled", [False, True])
def test_without_an_example_it_is_an_error_at_the_first_update(compiled):
    model: Any = Reading()
    pruner = Pruner(model, SETTINGS, updates_per_epoch=1)
    torch._dynamo.reset()
    train_once(torch.compile(model, backend="eager", fullgraph=True) if compiled else model)
    pruner.step(updated=False)
    message = "^the model reads the weight of read without calling the layer, so that no hook"
    for _ in range(2):
        with pytest.raises(PruningError, match=message):
            pruner.step()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("example", [None, torch.zeros(2, 6)])
def test_branches_without_use_are_no_error(example):
    model = Reading()
    settings = {**SETTINGS, "exclude": "read"}
    pruner = Pruner(model, settings, updates_per_epoch=2, example_input=example)
    train_once(model)
    pruner.step()
    assert list(pruner.layers) == ["called", "unused", "in_training"]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_copies_of_the_model_have_no_watch():
    model = nn.Sequential(nn.Linear(4, 4))
    Pruner(model, SETTINGS, updates_per_epoch=1)
    assert model[0]._forward_pre_hooks
    copied, alone = copy.deepcopy(model), copy.deepcopy(model[0])
    assert not copied[0]._forward_pre_hooks
    assert not alone._forward_pre_hooks
    assert model[0]._forward_pre_hooks
    loaded = pickle.loads(pickle.dumps(model))
    loaded(torch.zeros(1, 4))
    assert not loaded[0]._forward_pre_hooks


def test_a_copy_of_the_pruner_watches_its_own_model():
    original = Reading()
    pruner = Pruner(original, SETTINGS, updates_per_epoch=1)
    model, pruner = copy.deepcopy((original, pruner))
    train_once(model)
    with pytest.raises(PruningError, match="reads the weight of read without"):
        pruner.step()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        (
            "beit_base_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            32,
        ),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [1], "num_heads": [2]},
            64,
        ),
        (
            "eva02_tiny_patch14_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
            32,
        ),
    ],
)
def test_timms_models_that_read_weights(name, options, side):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10, **options)
    images = torch.zeros(2, 3, side, side)
    pruner = Pruner(model, SETTINGS, updates_per_epoch=1, example_input=images)
    assert pruner.left_out
    assert all(".attn." in layer for layer in pruner.left_out)
