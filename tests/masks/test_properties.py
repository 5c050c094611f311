"""The properties that every mask function has, and the errors that all of them raise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from starfire_prune.masks.conv import ck_mask, intra_mask, window_mask
from starfire_prune.masks.counts import (
    Units,
    ck_units,
    fc_block_units,
    fc_fine_units,
    filter_units,
    weight_units,
    window_units,
)
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask, fc_structure_mask
from tests.masks.cases import (
    DTYPES,
    INF,
    NAN,
    Prune,
    amounts,
    bad_amounts,
    draw_values,
    examples,
    layouts,
    naming,
    seeds,
    shares,
    weights,
)
from tests.support import oracle

# What each scope keeps of its units: from a mask to a bool matrix (scope, unit).
Scopes = Callable[[oracle.Mask], oracle.Mask]


def each_kernel(kept: oracle.Mask) -> oracle.Mask:
    return kept.reshape(kept.shape[0] * kept.shape[1], -1)


def whole_layer(kept: oracle.Mask) -> oracle.Mask:
    return kept.reshape(1, -1)


def kernels_of(**options: Any) -> Scopes:
    def scopes(kept: oracle.Mask) -> oracle.Mask:
        every = oracle.ck_scopes(kept.shape, **options)
        return np.array(
            [[any(kept[k, c].any() for k, c in unit) for unit in units] for units in every]
        )

    return scopes


def areas_of(out: int, in_: int) -> Scopes:
    def scopes(kept: oracle.Mask) -> oracle.Mask:
        rows, columns = range(0, kept.shape[0], out), range(0, kept.shape[1], in_)
        return np.array([[kept[r : r + out, c : c + in_].any() for r in rows for c in columns]])

    return scopes


def output_channels(kept: oracle.Mask) -> oracle.Mask:
    return np.array([[channel.any() for channel in kept]])


@dataclass(frozen=True)
class Method:
    """A mask function and a shape; a new method is a new row of `METHODS`.

    Attributes:
        prune: Mask function, with its options.
        shape: Shape of the weights.
        scopes: How the units lie in scopes; None where the number of pruned units is not fixed.
        counted: Units as the package counts them, where `scopes` is given.
        protected: Number of units of a scope that are never pruned, where `counted` lacks it.
        numbers: Whether amounts may be numbers of units.
    """

    prune: Prune
    shape: tuple[int, ...]
    scopes: Scopes | None = None
    counted: Units | None = None
    protected: int | None = None
    numbers: bool = True

    @property
    def units(self) -> int:
        """Number of units in a scope."""
        if self.scopes is None:
            return math.prod(self.shape)
        return int(self.scopes(np.ones(self.shape, dtype=bool)).shape[1])

    def pruned(self, amount: float) -> int:
        """Number of units of each scope that an amount prunes."""
        assert self.counted is not None
        protected = self.counted.protected if self.protected is None else self.protected
        return min(oracle.share_count(amount, self.units), self.units - protected)

    def amounts(self) -> st.SearchStrategy[float]:
        return amounts(self.units) if self.numbers else shares

    def kept(self, mask: Tensor) -> oracle.Mask:
        """Which units each scope keeps."""
        assert self.scopes is not None
        return self.scopes(mask.numpy())


def ck_row(shape: tuple[int, ...], **options: Any) -> Method:
    scopes = kernels_of(**options)
    return Method(partial(ck_mask, **options), shape, scopes, ck_units(shape, **options))


CONV2D, EDGES, LINEAR = (6, 4, 3, 2), (10, 7, 2, 2), (7, 10)
METHODS = {
    "window": Method(window_mask, CONV2D, each_kernel, window_units(CONV2D)),
    "exact_layer_sparsity": Method(
        partial(window_mask, exact_layer_sparsity=True),
        CONV2D,
        whole_layer,
        window_units(CONV2D, exact_layer_sparsity=True),
        protected=24,
    ),
    "ck": ck_row(CONV2D),
    "ck, groups": ck_row(CONV2D, groups=2),
    "ck, layer": ck_row(CONV2D, scope="layer"),
    "ck, (3, 1)": ck_row(CONV2D, block_size=(3, 1)),
    "ck, (1, 3), edges": ck_row(EDGES, block_size=(1, 3)),
    "ck, (2, 3), edges": ck_row(EDGES, block_size=(2, 3)),
    "ck, (2, 3), groups, edges": ck_row(EDGES, block_size=(2, 3), groups=2),
    "ck, (2, 2), layer, edges": ck_row(EDGES, block_size=(2, 2), groups=2, scope="layer"),
    "intra": Method(intra_mask, CONV2D, numbers=False),
    "fc_block": Method(
        partial(fc_block_mask, block_size=(3, 3)),
        LINEAR,
        areas_of(3, 3),
        fc_block_units(LINEAR, block_size=(3, 3)),
    ),
    "fc_block, (2, 4)": Method(
        partial(fc_block_mask, block_size=(2, 4)),
        LINEAR,
        areas_of(2, 4),
        fc_block_units(LINEAR, block_size=(2, 4)),
    ),
    "fc_fine": Method(fc_fine_mask, LINEAR, whole_layer, fc_fine_units(LINEAR)),
    "fc_structure": Method(fc_structure_mask, LINEAR, whole_layer, fc_fine_units(LINEAR)),
    "fc_structure, blocks": Method(
        partial(fc_structure_mask, then="block", block_size=(3, 3)), LINEAR
    ),
    "magnitude": Method(magnitude_mask, CONV2D, whole_layer, weight_units(CONV2D)),
    "random": Method(random_mask, CONV2D, whole_layer, weight_units(CONV2D)),
    "filter": Method(filter_mask, CONV2D, output_channels, filter_units(CONV2D)),
}
COUNTED = {name: method for name, method in METHODS.items() if method.scopes is not None}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_counted_method = pytest.mark.parametrize("method", COUNTED.values(), ids=COUNTED)


@every_counted_method
def test_units_are_counted_as_they_lie_in_scopes(method):
    scopes = method.kept(torch.ones(method.shape, dtype=torch.bool))
    assert scopes.shape == (method.counted.scopes, method.counted.size)


@every_counted_method
@examples
@given(st.data())
def test_exactly_the_count_is_pruned(method, data):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    n_kept = method.kept(method.prune(weight, amount)).sum(1)
    assert set(n_kept) == {method.units - method.pruned(amount)}


@every_counted_method
@examples
@given(st.data())
def test_exactly_the_count_is_pruned_on_top_of_an_earlier_mask(method, data):
    mask, most = None, 0
    for _ in range(3):  # the weights change between the calls, as in training
        weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
        most = max(most, method.pruned(amount))
        mask = method.prune(weight, amount, mask=mask)
        assert set(method.kept(mask).sum(1)) == {method.units - most}


UNPROTECTED = {
    name: method
    for name, method in COUNTED.items()
    if method.pruned(1.0) == method.units and name != "random"
}


@pytest.mark.parametrize("method", UNPROTECTED.values(), ids=UNPROTECTED)
@examples
@given(st.data())
def test_of_equal_units_the_first_of_each_scope_are_pruned(method, data):
    amount = data.draw(method.amounts())
    n_pruned = method.pruned(amount)
    kept = method.kept(method.prune(torch.ones(method.shape), amount))
    assert (kept == (np.arange(method.units) >= n_pruned)).all()


@every_method
@examples
@given(st.data())
def test_nothing_pruned_comes_back(method, data):
    mask = torch.ones(method.shape, dtype=torch.bool)
    for _ in range(3):
        weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
        later = method.prune(weight, amount, mask=mask)
        assert not (later & ~mask).any()
        mask = later


@every_method
@examples
@given(st.data())
def test_nothing_pruned_comes_back_in_any_mask(method, data):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    rng = np.random.default_rng(data.draw(seeds))
    mask = torch.from_numpy(rng.random(method.shape) < 0.5)
    assert not (method.prune(weight, amount, mask=mask) & ~mask).any()


@every_method
@examples
@given(st.data())
def test_a_lower_amount_changes_nothing(method, data):
    pair = data.draw(st.tuples(shares, shares))
    mask = method.prune(data.draw(weights(method.shape)), max(pair))
    again = method.prune(data.draw(weights(method.shape)), min(pair), mask=mask)
    assert torch.equal(again, mask)


@every_method
@examples
@given(st.data())
def test_pruning_twice_is_pruning_once(method, data):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    once = method.prune(weight, amount)
    assert torch.equal(method.prune(weight, amount, mask=once), once)


@every_method
@examples
@given(st.data(), st.integers(1, 6))
def test_scale_and_sign_do_not_matter(method, data, exponent):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    signs = 1 - 2 * torch.randint(2, method.shape, generator=torch.Generator().manual_seed(3))
    scaled = weight * (2.0**exponent * signs).to(weight.dtype)
    assert torch.equal(method.prune(scaled, amount), method.prune(weight, amount))


@every_method
@examples
@given(st.data())
def test_memory_format_does_not_matter(method, data):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    rng = np.random.default_rng(data.draw(seeds))
    mask = torch.from_numpy(rng.random(method.shape) < 0.8)
    expected = method.prune(weight, amount, mask=mask)
    for laid_out in layouts(weight):
        assert torch.equal(method.prune(laid_out, amount, mask=mask), expected)
    for laid_out in layouts(mask):
        assert torch.equal(method.prune(weight, amount, mask=laid_out), expected)


@every_method
def test_expanded_weights_are_accepted(method):
    expanded = torch.tensor(1.0).expand(method.shape)
    expected = method.prune(torch.ones(method.shape), 0.5)
    assert torch.equal(method.prune(expanded, 0.5), expected)


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_bool_and_of_the_weights_shape(method, dtype):
    mask = method.prune(torch.nn.Parameter(torch.ones(method.shape, dtype=dtype)), 0.5)
    assert (mask.dtype, mask.shape) == (torch.bool, torch.Size(method.shape))


@every_method
@pytest.mark.parametrize("amount", [0.0, 0.6])
def test_inputs_are_left_alone(method, amount):
    weight = draw_values("continuous", method.shape, torch.float32, seed=1)
    mask = draw_values("continuous", method.shape, torch.float32, seed=2) > -1
    before = weight.clone(), mask.clone()
    method.prune(weight, amount, mask=mask).zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(mask, before[1])


@every_method
def test_masks_of_zeros_and_ones_are_masks(method):
    weight = draw_values("few", method.shape, torch.float32, seed=1)
    mask = draw_values("continuous", method.shape, torch.float32, seed=2) > -1
    expected = method.prune(weight, 0.6, mask=mask)
    assert torch.equal(method.prune(weight, 0.6, mask=mask.float()), expected)


@every_method
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_masked_scores_need_not_be_finite(method, value):
    weight = draw_values("few", method.shape, torch.float32, seed=1)
    mask = draw_values("continuous", method.shape, torch.float32, seed=2) > -1
    expected = method.prune(weight, 0.6, mask=mask)
    assert torch.equal(method.prune(weight.masked_fill(~mask, value), 0.6, mask=mask), expected)


@every_method
def test_without_an_amount_nothing_is_pruned(method):
    assert method.prune(torch.zeros(method.shape), 0.0).all()


@every_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter(method):
    weight = draw_values("few", method.shape, torch.float32, seed=1)
    mask = draw_values("continuous", method.shape, torch.float32, seed=2) > -1
    on_device = method.prune(weight.cuda(), 0.6, mask=mask.cuda())
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), method.prune(weight, 0.6, mask=mask))


@bad_amounts
@every_method
def test_bad_amounts_are_errors(method, amount, error):
    if isinstance(amount, int) and not method.numbers:
        error = TypeError
    with pytest.raises(error, match=naming("amount", amount)):
        method.prune(torch.ones(method.shape), amount)


@every_counted_method
def test_numbers_beyond_the_scope_are_errors(method):
    with pytest.raises(ValueError, match=naming("amount", method.units + 1)):
        method.prune(torch.ones(method.shape), method.units + 1)


@every_method
def test_masks_of_another_shape_are_errors(method):
    shape = (*method.shape[:-1], method.shape[-1] + 9)
    texts = [", ".join(map(str, each)) for each in (method.shape, shape)]
    with pytest.raises(ValueError, match=naming("mask", *texts)):
        method.prune(torch.ones(method.shape), 0.5, mask=torch.ones(shape))


@every_method
def test_masks_are_not_broadcast(method):
    mask = torch.ones(method.shape)[:1]
    with pytest.raises(ValueError, match=naming("mask", "1, ")):
        method.prune(torch.ones(method.shape), 0.5, mask=mask)


@every_method
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_not_floating_are_errors(method, dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        method.prune(torch.ones(method.shape, dtype=dtype), 0.5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "method",
    [method for name, method in METHODS.items() if name != "random"],
    ids=[name for name in METHODS if name != "random"],
)
def test_scores_that_are_not_finite_are_errors(method, dtype, value):
    weight = torch.ones(method.shape, dtype=dtype)
    weight[(-1,) * len(method.shape)] = value
    with pytest.raises(ValueError, match="not finite"):
        method.prune(weight, 0.5)
