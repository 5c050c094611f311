"""Folding constants: outputs stay what they are, and the weights that read constants go."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from starfire_prune import ck_structured
from starfire_prune.compact.folding import FoldReport, fold_constants, fold_in_place
from starfire_prune.structure import ops, rules
from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.graph import dense_copy
from tests.support.networks import SmallNet, equal_states, snapshot
from tests.support.sparse_networks import (
    FULL,
    NARROW,
    NARROW_CASES,
    TOLERANCES,
    difference,
    images,
    randomize,
    sparse_network,
    sparsify,
)

every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@functools.cache
def exported(name: str) -> tuple[nn.Module, ChannelAnalysis]:
    """A network that takes the weights of others of its kind, so that it is exported once."""
    model = dense_copy(sparse_network(NARROW[name]))
    return model, ChannelAnalysis(model, images(torch.float64, size_for(name)))


def size_for(name: str) -> int:
    return 64 if name == "vgg_bn of convolutions" else 32


def fold_again(name: str, model: nn.Module) -> tuple[nn.Module, FoldReport]:
    """`fold_constants` on the graph that is there."""
    folded, analysis = exported(name)
    folded.to(next(model.parameters()).dtype).load_state_dict(dense_copy(model).state_dict())
    return folded, fold_in_place(folded, analysis)


@every_dtype
@pytest.mark.parametrize("name", NARROW_CASES)
def test_folded_networks_give_the_same_outputs(name, dtype):
    for seed, amount in enumerate((0.6, 0.95)):
        model = sparse_network(NARROW[name], seed, dtype, amount)
        folded, report = fold_again(name, model)
        inputs = images(dtype, size_for(name), seed=seed + 1)
        assert difference(model, folded, inputs) < TOLERANCES[dtype]
        assert report.redundant > 0
        assert report.folded > 0
        assert report.unknown == ()


@functools.cache
def small_network() -> tuple[nn.Module, ChannelAnalysis]:
    model = SmallNet().double().eval()
    return model, ChannelAnalysis(model, images(torch.float64, 8))


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), amount=st.floats(0.6, 0.95), share=st.floats(0.0, 0.9))
def test_folding_is_exact_whichever_channels_die(seed, amount, share):
    folded, analysis = small_network()
    model = SmallNet().double().eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    sparsify(model, generator, amount, share)
    folded.load_state_dict(dense_copy(model).state_dict())
    fold_in_place(folded, analysis)
    inputs = images(torch.float64, 8, seed)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), model(inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("name", [name for name in FULL if name != "vgg16_bn"])
def test_folded_networks_of_full_size_give_the_same_outputs(name, dtype):
    model = sparse_network(FULL[name], dtype=dtype)
    folded, report = fold_constants(model, images(dtype, 64))
    assert difference(model, folded, images(dtype, 64, seed=1)) < TOLERANCES[dtype]
    assert report.redundant + report.folded > 0


# ---------------------------------------------------------------------------------------------
# Wrong rules are found out
# ---------------------------------------------------------------------------------------------


def zero_for_constants(rule: Any) -> Any:
    def wrong(*args: Any) -> Any:
        output, *rest = rule(*args)
        return output.masked_fill(output.isfinite(), 0.0), *rest

    return wrong


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "densenet121"])
def test_taking_the_constant_of_a_batch_norm_for_zero_changes_outputs(name, monkeypatch):
    norm = ops.BATCH_NORMS[0]
    wrong = zero_for_constants(rules.RULES[norm])
    monkeypatch.setitem(rules.RULES, norm, wrong)
    model = sparse_network(NARROW[name])
    folded, _ = fold_again(name, model)
    assert difference(model, folded, images(torch.float64)) > 1e-3


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
def test_folding_through_padding_changes_outputs(name, monkeypatch):
    monkeypatch.setattr(rules, "is_padded", lambda node: False)
    model = sparse_network(NARROW[name])
    folded, _ = fold_again(name, model)
    assert difference(model, folded, images(torch.float64)) > 1e-3


# ---------------------------------------------------------------------------------------------
# Where the constants go
# ---------------------------------------------------------------------------------------------


def chain(*reader: nn.Module, constant: float = 2.0) -> nn.Sequential:
    """A convolution whose first output channel is constant, and what reads it."""
    source = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        source.weight[0] = 0
        source.bias.fill_(constant)  # type: ignore[union-attr]
    return nn.Sequential(source, *reader).eval()


def folded_chain(*reader: nn.Module, constant: float = 2.0) -> tuple[Any, Any, FoldReport]:
    model = chain(*reader, constant=constant)
    folded, report = fold_constants(model, images(size=8))
    with torch.no_grad():
        torch.testing.assert_close(folded(images(size=8)), model(images(size=8)))
    return model, folded, report


def test_constants_are_folded_into_the_bias():
    model, folded, report = folded_chain(nn.Conv2d(2, 4, 3))
    assert not folded[1].weight[:, 0].any()
    assert torch.equal(folded[1].weight[:, 1], model[1].weight[:, 1])
    expected = model[1].bias + 2 * model[1].weight[:, 0].sum((1, 2))
    torch.testing.assert_close(folded[1].bias, expected)
    (layer,) = report.layers
    assert (layer.name, layer.redundant, layer.folded, layer.into) == ("1", 0, 36, "1.bias")
    assert (layer.left, layer.reason) == (0, None)


def test_constants_are_folded_into_the_running_mean_without_a_bias():
    model, folded, report = folded_chain(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert not folded[1].weight[:, 0].any()
    assert folded[1].bias is None
    torch.testing.assert_close(folded[2].running_mean, -2 * model[1].weight[:, 0].sum((1, 2)))
    assert report.layers[0].into == "2.running_mean"


def test_weights_that_read_zero_become_zero_under_padding():
    _, folded, report = folded_chain(nn.Conv2d(2, 4, 3, padding=1), constant=0.0)
    assert not folded[1].weight[:, 0].any()
    assert (report.layers[0].redundant, report.layers[0].folded, report.layers[0].into) == (
        36,
        0,
        None,
    )


def test_padding_leaves_weights_that_read_another_constant():
    model, folded, report = folded_chain(nn.Conv2d(2, 4, 3, padding=1))
    assert torch.equal(folded[1].weight, model[1].weight)
    assert report.layers[0].left == 36
    assert "pads its input by zeros" in str(report.layers[0].reason)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_the_image_itself_lets_constants_pass(mode):
    _, folded, report = folded_chain(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode))
    assert not folded[1].weight[:, 0].any()
    assert report.folded == 36


def test_weights_are_kept_without_a_bias_and_a_norm():
    model, folded, report = folded_chain(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU())
    assert torch.equal(folded[1].weight, model[1].weight)
    assert "neither a bias nor a batch norm" in str(report.layers[0].reason)


class Forked(nn.Module):
    """Two readers of a layer's output, one of them a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.Conv2d(2, 4, 3, bias=False))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        output: Tensor = self.norm(features) + features
        return output


def test_no_constant_is_folded_into_a_norm_beside_other_readers():
    model = Forked().eval()
    folded, report = fold_constants(model, images(size=8))
    assert equal_states(snapshot(model), snapshot(folded))
    assert report.layers[0].left == 36


def test_grouped_convolutions_fold_by_group():
    source = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        source.weight[[0, 3]] = 0
    model = nn.Sequential(source, nn.Conv2d(4, 6, 3, groups=2)).eval()
    folded: Any
    folded, report = fold_constants(model, images(size=8))
    assert not folded[1].weight[:3, 0].any()
    assert not folded[1].weight[3:, 1].any()
    assert report.folded == 54
    with torch.no_grad():
        torch.testing.assert_close(folded(images(size=8)), model(images(size=8)))


def test_the_model_itself_is_left_as_it_is():
    model = ck_structured(chain(nn.Conv2d(2, 4, 3))[0], amount=0.5)
    whole = nn.Sequential(model, nn.Conv2d(2, 4, 3))
    before = snapshot(whole)
    folded, _ = fold_constants(whole, images(size=8))
    assert equal_states(before, snapshot(whole))
    assert prune.is_pruned(whole)
    assert not prune.is_pruned(folded)
    assert folded.training


def test_a_network_without_constants_is_not_changed():
    model = SmallNet()
    folded, report = fold_constants(model, images(size=8))
    assert equal_states(snapshot(model), snapshot(folded))
    assert report.layers == ()
    assert (report.redundant, report.folded) == (0, 0)


# ---------------------------------------------------------------------------------------------
# Weights and biases that more than their layer uses
# ---------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A convolution with a channel that is constantly 2 and one that is 0, and a reader."""

    def __init__(self, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3)
        self.d: Any = nn.Conv2d(8, 4, 1) if reader is None else reader
        with torch.no_grad():
            self.c.weight[:2] = 0
            self.c.bias[:2] = torch.tensor([2.0, 0.0])  # type: ignore[index]

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x))


class ScaledByWeight(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x)) * self.d.weight.sum()


class ReadTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        features = self.c(x)
        return self.d(features) + functional.conv2d(features, self.d.weight)


class WeightAsOutput(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x)).sum() + self.d.weight


class BiasAddedAgain(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x)) + self.d.bias.view(1, -1, 1, 1)


class Tied(Pair):
    """Two layers of one weight, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Conv2d(8, 4, 1)
        self.e.weight = self.d.weight

    def forward(self, x: Tensor) -> Any:
        features = self.c(x)
        return self.d(features) * self.e(features)


class CalledTwice(Pair):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x)) * self.d(self.c(x.flip(0)))


class Outer(nn.Conv2d):
    """A reader that holds the layer before it."""

    def __init__(self) -> None:
        super().__init__(8, 4, 1)
        self.c = Pair().c

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.c(x))


class TwiceTheBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, 2 * self.bias)  # type: ignore[operator, arg-type]


class ScaledByBias(nn.Module):
    """A linear layer of its own kind, over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.movedim(1, -1), self.weight) * self.bias


class WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.movedim(1, -1), self.weight)


class NormWithMean(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.running_mean.sum()  # type: ignore[union-attr]


def folded_pair(model: nn.Module) -> FoldReport:
    """The report of folding, which must have left the outputs alone."""
    folded, report = fold_constants(model.eval(), images(size=8))
    with torch.no_grad():
        torch.testing.assert_close(
            folded(images(size=8)), model(images(size=8)), rtol=1e-4, atol=1e-5
        )
    return report


@pytest.mark.parametrize("build", [ScaledByWeight, WeightAsOutput])
def test_weights_used_elsewhere_are_kept(build):
    (layer,) = folded_pair(build()).layers
    assert (layer.redundant, layer.folded, layer.left) == (0, 0, 8)
    assert str(layer.reason).startswith("its weight is ")
    assert not ChannelAnalysis(build(), images(size=8)).zero_inputs()[layer.name].any()


@pytest.mark.parametrize(
    "build",
    [
        BiasAddedAgain,
        ReadTwice,
        Tied,
        lambda: Pair(TwiceTheBias(8, 4, 1)),
        lambda: Pair(ScaledByBias()),
    ],
    ids=["added again", "left out once", "tied weights", "doubled", "a scale"],
)
def test_no_constants_are_folded_into_biases_used_elsewhere(build):
    (layer,) = folded_pair(build()).layers
    assert (layer.redundant, layer.folded, layer.left) == (4, 0, 4)
    assert "uses its bias elsewhere" in str(layer.reason)


def test_layers_of_other_kinds_may_have_no_bias():
    (layer,) = folded_pair(Pair(WithoutBias())).layers
    assert "neither a bias nor" in str(layer.reason)


def test_no_constants_are_folded_into_running_means_used_elsewhere():
    reader = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), NormWithMean(4))
    (layer,) = folded_pair(Pair(reader)).layers
    assert "neither a bias nor" in str(layer.reason)


def test_layers_that_are_called_twice_fold():
    assert folded_pair(CalledTwice()).folded == 4


def test_weights_that_are_not_finite_are_kept():
    model = Pair()
    with torch.no_grad():
        model.d.weight[:, 1] = torch.inf
    folded: Any
    folded, report = fold_constants(model.eval(), images(size=8))
    assert folded.d.weight[:, 1].isinf().all()
    assert report.redundant == 0


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 can't export compiled layers"
)
def test_compiled_layers_fold():
    model = Pair()
    model.d = torch.compile(model.d)
    _, report = fold_constants(model, images(size=8))
    assert (report.folded, report.layers[0].into) == (4, "d.bias")


def test_a_model_that_is_a_layer_with_another_inside_folds_into_its_own_bias():
    (layer,) = folded_pair(Outer()).layers
    assert (layer.name, layer.into, layer.folded, layer.redundant) == ("", "bias", 4, 4)
