"""The mask functions against masks written by hand, an independent oracle and their properties."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from numpy.typing import NDArray
from torch import Tensor

from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from starfire_prune.masks.conv import ck_mask, ck_units, intra_mask, window_mask
from starfire_prune.masks.counts import count
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask, fc_structure_mask
from tests.support import oracle

examples = settings(max_examples=25)
more_examples = settings(max_examples=150)

Prune = Callable[..., Tensor]  # (weight, amount, *, mask, ...) -> mask
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------------------------------
# Masks written by hand
# ---------------------------------------------------------------------------------------------

# One 3x3 kernel, magnitudes 1 to 9.
WINDOW = [[[[9, -1, 8], [2, -7, 3], [6, 4, -5]]]]
WINDOW_4 = [[[[1, 0, 1], [0, 1, 0], [1, 0, 1]]]]
WINDOW_5 = [[[[1, 0, 1], [0, 1, 0], [1, 0, 0]]]]
WINDOW_7 = [[[[1, 0, 1], [0, 0, 0], [0, 0, 0]]]]
WINDOW_BEST = [[[[0, 1, 1], [1, 1, 1], [1, 1, 1]]]]
WINDOW_BEST_3 = [[[[0, 0, 1], [0, 1, 1], [1, 1, 1]]]]
WINDOW_TIED = [[[[2, -2, 2], [-2, 2, -2], [2, -2, 2]]]]
WINDOW_TIED_4 = [[[[0, 0, 0], [0, 1, 1], [1, 1, 1]]]]

# 2x2 kernels of three weights.
SPREAD = [[[1, 5, 9], [2, 6, 8]], [[3, 4, 7], [1, 10, 11]]]
SPREAD_1 = [[[0, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
SPREAD_4 = [[[0, 1, 1], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
SPREAD_6 = [[[0, 0, 1], [0, 1, 1]], [[0, 0, 1], [0, 1, 1]]]
SPREAD_8 = [[[0, 0, 1], [0, 0, 1]], [[0, 0, 1], [0, 0, 1]]]
SPREAD_GONE = [[[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
SPREAD_GONE_6 = [[[0, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
SPREAD_AHEAD = [[[1, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
SPREAD_AHEAD_5 = [[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
SPREAD_AHEAD_6 = [[[1, 0, 0], [0, 1, 1]], [[0, 0, 1], [0, 1, 1]]]
SPREAD_TIED = [[[1, -1, 1], [1, 1, 1]], [[-1, 1, 1], [1, -1, 1]]]
SPREAD_TIED_6 = [[[0, 0, 1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1]]]

# 4x2 kernels of two weights, with the maxima 4 3 / 3 2 / 2 5 / 5 2.
CK = [[[1, -4], [3, 3]], [[3, 0], [-1, 2]], [[2, 2], [5, 0]], [[-5, 1], [2, -2]]]
CK_1 = [[[1, 1], [1, 1]], [[1, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [1, 1]]]
CK_2 = [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]]
CK_3 = [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]]
CK_LAYER_4 = [[[1, 1], [0, 0]], [[1, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]]
CK_LAYER_7 = [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]]
CK_PAIRS = [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]]]
CK_LAYER_PAIR = [[[1, 1], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]]]
CK_LAYER_PAIRS_3 = [[[0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [1, 1]]]
# Without its 4 the first kernel is the lowest of channel 0; the half-empty third one stays so.
CK_HOLES = [[[1, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [1, 1]]]
CK_HOLES_1 = [[[0, 0], [1, 1]], [[1, 1], [0, 0]], [[0, 1], [1, 1]], [[1, 1], [1, 1]]]
# Two groups of two output channels; ungrouped, both kernels of the first would go.
CK_GROUPED = [[[1, 1]], [[-2, 0]], [[3, 0]], [[-4, 4]]]
CK_GROUPED_1 = [[[0, 0]], [[1, 1]], [[0, 0]], [[1, 1]]]
CK_UNGROUPED_2 = [[[0, 0]], [[0, 0]], [[1, 1]], [[1, 1]]]
CK_DEPTHWISE = [[[2, 0]], [[1, -1]], [[3, 3]]]
CK_DEPTHWISE_1 = [[[1, 1]], [[0, 0]], [[1, 1]]]

# 4x1 kernels of three weights. 0.5: one kernel goes (c = 1/3) and each survivor loses one weight.
# 0.6: two kernels go (c = 3/7), which leaves one zero of seven for the survivors' tied 1 and -1.
INTRA = [[[1, 5, 9]], [[2, 6, 8]], [[3, 4, 7]], [[-1, 10, 11]]]
INTRA_05 = [[[0, 1, 1]], [[0, 1, 1]], [[0, 0, 0]], [[0, 1, 1]]]
INTRA_06 = [[[0, 1, 1]], [[0, 0, 0]], [[0, 0, 0]], [[1, 1, 1]]]
INTRA_10 = [[[0, 0, 0]], [[0, 0, 0]], [[0, 0, 0]], [[0, 0, 0]]]
INTRA_WINDOWS = [[[0, 0, 1]], [[0, 1, 1]], [[0, 0, 1]], [[0, 1, 1]]]
INTRA_KERNELS = [[[1, 1, 1]], [[0, 0, 0]], [[0, 0, 0]], [[1, 1, 1]]]
POINTWISE = [[[4]], [[-1]], [[3]], [[2]]]
POINTWISE_2 = [[[1]], [[0]], [[1]], [[0]]]

# 3x5 in blocks of 2: the sums are 2 6 5 / 4 1 1; the 6 and the 4 are protected.
BLOCKS = [[1, 0, -3, 0, 5], [0, 1, 0, 3, 0], [2, 2, -1, 0, 1]]
BLOCKS_1 = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
BLOCKS_3 = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
BLOCKS_4 = [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
# Without its 3s the second block is the lowest, not gone, and the 5 is protected in its place.
BLOCKS_HOLES = [[1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
BLOCKS_HOLES_1 = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
BLOCKS_BEST = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
BLOCKS_BEST_4 = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]
BLOCKS_TIED = [[1, -1, 1, 1], [1, 1, -1, 1]]
BLOCKS_TIED_1 = [[0, 0, 1, 1], [0, 0, 1, 1]]

# The 3, the 6 and the 9 are protected.
FINE = [[1, -2, 3], [6, 5, 4], [-7, 8, 9]]
FINE_4 = [[0, 0, 1], [1, 0, 0], [1, 1, 1]]
FINE_6 = [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
FINE_BEST = [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
FINE_BEST_3 = [[0, 1, 0], [1, 1, 0], [1, 1, 1]]
FINE_ROW = [[0, 0, 0], [1, 1, 1], [1, 1, 1]]
FINE_ROW_7 = [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
FINE_TIED = [[2, -2], [-2, 2]]
FINE_TIED_1 = [[0, 1], [1, 1]]
FINE_TIED_2 = [[0, 1], [0, 1]]

MAGNITUDE = [[3, -1], [1, 2]]
MAGNITUDE_1 = [[1, 0], [1, 1]]
MAGNITUDE_3 = [[1, 0], [0, 0]]
BEST = [[0, 1], [1, 1]]
BEST_2 = [[0, 0], [1, 1]]

# L1 norms 3, 4 and 3; without its 4 the second is the lowest.
FILTERS = [[[1, -2]], [[4, 0]], [[-3, 0]]]
FILTERS_1 = [[[0, 0]], [[1, 1]], [[1, 1]]]
FILTERS_2 = [[[0, 0]], [[1, 1]], [[0, 0]]]
FILTERS_HOLE = [[[1, 1]], [[0, 1]], [[1, 1]]]
FILTERS_HOLE_1 = [[[1, 1]], [[0, 0]], [[1, 1]]]

spread_mask = partial(window_mask, exact_layer_sparsity=True)
pairs_mask = partial(fc_block_mask, block_size=(2, 2))


def golden(
    name: str, prune: Prune, weight: Any, amount: float, expected: Any, **options: Any
) -> Any:
    return pytest.param(prune, weight, amount, options, expected, id=name)


GOLDEN = [
    golden("window", window_mask, WINDOW, 4, WINDOW_4),
    golden("window: half a weight rounds up", window_mask, WINDOW, 0.5, WINDOW_5),
    golden("window: max_nonzero", window_mask, WINDOW, 0.5, WINDOW_7, max_nonzero=2),
    golden("window: slack max_nonzero", window_mask, WINDOW, 0.5, WINDOW_5, max_nonzero=8),
    golden("window: max_nonzero alone", window_mask, WINDOW, 0.0, WINDOW_7, max_nonzero=2),
    golden("window: earlier zeros", window_mask, WINDOW, 3, WINDOW_BEST_3, mask=WINDOW_BEST),
    golden("window: ties", window_mask, WINDOW_TIED, 4, WINDOW_TIED_4),
    golden("spread", spread_mask, SPREAD, 0.5, SPREAD_6),
    golden("spread: an int is the layer's", spread_mask, SPREAD, 6, SPREAD_6),
    golden("spread: rest alone", spread_mask, SPREAD, 1, SPREAD_1),
    golden("spread: base alone", spread_mask, SPREAD, 4, SPREAD_4),
    golden("spread: the last weight stays", spread_mask, SPREAD, 1.0, SPREAD_8),
    golden("spread: max_nonzero", spread_mask, SPREAD, 0.0, SPREAD_4, max_nonzero=2),
    golden("spread: max_nonzero and rest", spread_mask, SPREAD, 6, SPREAD_6, max_nonzero=2),
    golden("spread: a kernel gone", spread_mask, SPREAD, 0.5, SPREAD_GONE_6, mask=SPREAD_GONE),
    golden("spread: a kernel ahead", spread_mask, SPREAD, 6, SPREAD_AHEAD_6, mask=SPREAD_AHEAD),
    golden("spread: base for all", spread_mask, SPREAD, 4, SPREAD_AHEAD_5, mask=SPREAD_AHEAD),
    golden("spread: ties", spread_mask, SPREAD_TIED, 6, SPREAD_TIED_6),
    golden("ck", ck_mask, CK, 0.5, CK_2),
    golden("ck: ties", ck_mask, CK, 1, CK_1),
    golden("ck: max_nonzero", ck_mask, CK, 0.25, CK_3, max_nonzero=1),
    golden("ck: slack max_nonzero", ck_mask, CK, 0.25, CK_1, max_nonzero=3),
    golden("ck: group", ck_mask, CK, 0.5, CK_PAIRS, block_size=(2, 1)),
    golden("ck: layer", ck_mask, CK, 0.5, CK_LAYER_4, scope="layer"),
    golden("ck: layer, max_nonzero", ck_mask, CK, 0, CK_LAYER_7, scope="layer", max_nonzero=1),
    golden("ck: layer, group", ck_mask, CK, 1, CK_LAYER_PAIR, scope="layer", block_size=(2, 1)),
    golden(
        "ck: layer, group, ties", ck_mask, CK, 3, CK_LAYER_PAIRS_3, scope="layer", block_size=(2, 1)
    ),
    golden("ck: masked weights", ck_mask, CK, 0.25, CK_HOLES_1, mask=CK_HOLES),
    golden("ck: ungrouped", ck_mask, CK_GROUPED, 0.5, CK_UNGROUPED_2),
    golden("ck: grouped", ck_mask, CK_GROUPED, 0.5, CK_GROUPED_1, groups=2),
    golden("ck: depthwise", ck_mask, CK_DEPTHWISE, 1, CK_DEPTHWISE_1, groups=3, scope="layer"),
    golden("intra", intra_mask, INTRA, 0.5, INTRA_05),
    golden("intra: rest", intra_mask, INTRA, 0.6, INTRA_06),
    golden("intra: all", intra_mask, INTRA, 1.0, INTRA_10),
    golden("intra: depthwise", intra_mask, INTRA, 0.5, INTRA_05, groups=4, scope="layer"),
    golden("intra: windows alone", intra_mask, INTRA, 0.5, INTRA_WINDOWS, window_fraction=1.0),
    golden("intra: kernels alone", intra_mask, INTRA, 0.5, INTRA_KERNELS, window_fraction=0.0),
    golden("intra: pointwise", intra_mask, POINTWISE, 0.5, POINTWISE_2),
    golden("block", pairs_mask, BLOCKS, 1, BLOCKS_1),
    golden("block: protection", pairs_mask, BLOCKS, 0.5, BLOCKS_3),
    golden("block: all that may", pairs_mask, BLOCKS, 1.0, BLOCKS_4),
    golden("block: masked weights", pairs_mask, BLOCKS, 1, BLOCKS_HOLES_1, mask=BLOCKS_HOLES),
    golden("block: the best is gone", pairs_mask, BLOCKS, 1.0, BLOCKS_BEST_4, mask=BLOCKS_BEST),
    golden("block: ties", pairs_mask, BLOCKS_TIED, 1, BLOCKS_TIED_1),
    golden("fine", fc_fine_mask, FINE, 4, FINE_4),
    golden("fine: all that may", fc_fine_mask, FINE, 1.0, FINE_6),
    golden("fine: the best is gone", fc_fine_mask, FINE, 3, FINE_BEST_3, mask=FINE_BEST),
    golden("fine: a row is gone", fc_fine_mask, FINE, 1.0, FINE_ROW_7, mask=FINE_ROW),
    golden("fine: ties", fc_fine_mask, FINE_TIED, 1, FINE_TIED_1),
    golden("fine: ties among the protected", fc_fine_mask, FINE_TIED, 3, FINE_TIED_2),
    golden("magnitude: ties", magnitude_mask, MAGNITUDE, 0.25, MAGNITUDE_1),
    golden("magnitude: a row may go", magnitude_mask, MAGNITUDE, 3, MAGNITUDE_3),
    golden("magnitude: earlier zeros", magnitude_mask, MAGNITUDE, 2, BEST_2, mask=BEST),
    golden("filter", filter_mask, FILTERS, 0.6, FILTERS_2),
    golden("filter: ties", filter_mask, FILTERS, 1, FILTERS_1),
    golden("filter: masked weights", filter_mask, FILTERS, 1, FILTERS_HOLE_1, mask=FILTERS_HOLE),
]


@pytest.mark.parametrize(("prune", "weight", "amount", "options", "expected"), GOLDEN)
def test_golden_masks(prune, weight, amount, options, expected):
    if "mask" in options:
        options = {**options, "mask": torch.tensor(options["mask"], dtype=torch.bool)}
    result = prune(torch.tensor(weight, dtype=torch.float32), amount, **options)
    assert result.int().tolist() == expected


def test_blocks_hold_four_by_four_weights_unless_told():
    weight = torch.ones(4, 9)
    weight[:, 4:8] = 0.5
    weight[:, 8] = 3.0
    assert fc_block_mask(weight, 1)[0].tolist() == [True] * 4 + [False] * 4 + [True]


def test_block_sums_do_not_overflow_half_precision():
    weight = torch.full((2, 6), 60000.0, dtype=torch.float16)
    weight[:, 2:4] = 50000.0
    mask = fc_block_mask(weight, 1, block_size=(2, 2))
    assert mask[0].tolist() == [True, True, False, False, True, True]


def test_filter_norms_do_not_overflow_half_precision():
    weight = torch.full((3, 8), 60000.0, dtype=torch.float16)
    weight[1] = 50000.0
    assert filter_mask(weight, 1)[:, 0].tolist() == [True, False, True]


# ---------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([step / 16 for step in range(17)]) | st.floats(0, 1)
KINDS = ["continuous", "few", "zeros", "close", "equal"]


def draw_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Scores of one kind: all but the continuous ones tie often."""
    rng = np.random.default_rng(seed)
    values: NDArray[Any]
    if kind == "continuous":
        values = rng.standard_normal(shape)
    elif kind == "few":
        values = rng.choice([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], shape)
    elif kind == "zeros":
        values = rng.choice([-1.0, 1.0, 0.25], shape) * (rng.random(shape) < 0.3)
    elif kind == "close":  # neighbours in the dtype: ranking them in a narrower one ties them
        values = 1 + rng.integers(0, 4, shape) * torch.finfo(dtype).eps
    else:
        values = rng.choice([-1.0, 1.0], shape)
    return torch.from_numpy(values).to(dtype)


def values_of(weight: Tensor) -> oracle.Weight:
    """The tensor as the oracle takes it."""
    return np.ascontiguousarray(weight.detach().double().numpy())


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...], exact_sums: bool = False) -> Tensor:
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from(DTYPES))
    if exact_sums and kind == "close" and dtype == torch.float64:
        dtype = torch.float32  # float64 sums of float64 neighbours depend on the order
    return draw_values(kind, shape, dtype, draw(seeds))


@st.composite
def earlier_masks(
    draw: st.DrawFn, weight: Tensor, own: Callable[..., oracle.Mask]
) -> Tensor | None:
    """None, or single weights, whole kernels (rows) or what the method makes of other weights."""
    shape = tuple(weight.shape)
    rng = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["none", "weights", "kernels", "own"]))
    share = draw(st.sampled_from([0.1, 0.3, 0.5, 0.8]))
    if kind == "none":
        return None
    if kind == "weights":
        kept = rng.random(shape) >= share
    elif kind == "kernels":
        kept = np.ones(shape, dtype=bool)
        kept[rng.random(shape[: 2 if len(shape) > 2 else 1]) < share] = False
    else:
        other = values_of(draw(weights(shape)))
        kept = own(other, share / 2, np.ones(shape, dtype=bool))
    mask = torch.from_numpy(kept)
    return mask if draw(st.booleans()) else mask.to(weight.dtype)


def amounts(units: int) -> st.SearchStrategy[float]:
    """Shares and, for a locale of `units`, numbers."""
    return shares | st.integers(0, units)


def compare(
    data: st.DataObject,
    prune: Prune,
    expect: Callable[..., oracle.Mask],
    shape: tuple[int, ...],
    units: int | None = None,
    exact_sums: bool = False,
    **options: Any,
) -> None:
    """Draw a weight, an amount and an earlier mask; `prune` must give what `expect` does."""
    weight = data.draw(weights(shape, exact_sums))
    amount = data.draw(shares if units is None else amounts(units))
    mask = data.draw(earlier_masks(weight, partial(expect, **options)))
    assert_equals_oracle(prune, expect, weight, amount, mask, **options)


def assert_equals_oracle(
    prune: Prune,
    expect: Callable[..., oracle.Mask],
    weight: Tensor,
    amount: float,
    mask: Tensor | None,
    **options: Any,
) -> None:
    kept = np.ones(tuple(weight.shape), dtype=bool) if mask is None else mask.bool().numpy()
    result = prune(weight, amount, mask=mask, **options)
    np.testing.assert_array_equal(
        result.numpy(), expect(values_of(weight), amount, kept, **options)
    )


windows = st.one_of(
    st.tuples(st.integers(2, 5)),
    st.tuples(st.integers(1, 5), st.integers(2, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(2, 3)),
)
pointwise = st.sampled_from([(1,), (1, 1), (1, 1, 1)])


@more_examples
@given(st.data(), st.integers(1, 8), st.integers(1, 6), windows)
def test_window_equals_the_oracle(data, out_channels, in_channels, window):
    n = math.prod(window)
    most = data.draw(st.none() | st.integers(1, n + 1))
    shape = (out_channels, in_channels, *window)
    compare(data, window_mask, oracle.window, shape, n, max_nonzero=most)


@more_examples
@given(st.data(), st.integers(1, 8), st.integers(1, 6), windows)
def test_spread_equals_the_oracle(data, out_channels, in_channels, window):
    n = math.prod(window)
    most = data.draw(st.none() | st.integers(1, n + 1))
    shape = (out_channels, in_channels, *window)
    units = math.prod(shape)
    compare(
        data, window_mask, oracle.window, shape, units, max_nonzero=most, exact_layer_sparsity=True
    )


def length(size: int) -> st.SearchStrategy[int]:
    """Channels of a group: fewer than a block, two whole ones, or three with a smaller one."""
    return st.integers(1, 3 * size + 1)


@more_examples
@given(
    st.data(),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    windows | pointwise,
    st.sampled_from(["channel", "layer"]),
)
def test_ck_equals_the_oracle(data, groups, block_size, window, scope):
    out_channels, in_channels = (data.draw(length(size)) for size in block_size)
    assume(out_channels > 1 or scope == "layer")
    shape = (groups * out_channels, in_channels, *window)
    options = {"groups": groups, "block_size": block_size, "scope": scope}
    units = ck_units(shape, **options).size
    most = data.draw(st.none() | st.integers(1, units + 1))
    compare(data, ck_mask, oracle.ck, shape, units, **options, max_nonzero=most)


@more_examples
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 6),
    windows | pointwise,
    st.sampled_from(["channel", "layer"]),
)
def test_intra_equals_the_oracle(data, groups, units, in_channels, window, scope):
    share = data.draw(st.sampled_from([0.5, 0.0, 1.0, 0.25]) | shares)
    shape = (groups * units, in_channels, *window)
    options = {"window_fraction": share, "groups": groups, "scope": scope}
    compare(data, intra_mask, oracle.intra, shape, **options)


@more_examples
@given(
    st.data(),
    st.integers(1, 13),
    st.integers(1, 13),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_fc_block_equals_the_oracle(data, out_features, in_features, block_size):
    shape = (out_features, in_features)
    units = math.ceil(out_features / block_size[0]) * math.ceil(in_features / block_size[1])
    compare(data, fc_block_mask, oracle.fc_block, shape, units, block_size=block_size)


@more_examples
@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_fc_fine_equals_the_oracle(data, out_features, in_features):
    shape = (out_features, in_features)
    compare(data, fc_fine_mask, oracle.fc_fine, shape, math.prod(shape))


any_shape = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


@more_examples
@given(st.data(), any_shape)
def test_magnitude_equals_the_oracle(data, shape):
    compare(data, magnitude_mask, oracle.magnitude, shape, math.prod(shape))


@more_examples
@given(st.data(), any_shape)
def test_filter_equals_the_oracle(data, shape):
    compare(data, filter_mask, oracle.filters, shape, shape[0], exact_sums=True)


CONV, LINEAR = (64, 48, 3, 3), (100, 70)
LARGE = {
    "window": (window_mask, oracle.window, CONV, {}),
    "window, max_nonzero": (window_mask, oracle.window, CONV, {"max_nonzero": 4}),
    "exact_layer_sparsity": (window_mask, oracle.window, CONV, {"exact_layer_sparsity": True}),
    "ck": (ck_mask, oracle.ck, CONV, {}),
    "ck, groups, group": (ck_mask, oracle.ck, CONV, {"groups": 4, "block_size": (2, 1)}),
    "ck, layer": (ck_mask, oracle.ck, CONV, {"scope": "layer"}),
    "intra": (intra_mask, oracle.intra, CONV, {}),
    "fc_block": (fc_block_mask, oracle.fc_block, LINEAR, {}),
    "fc_fine": (fc_fine_mask, oracle.fc_fine, LINEAR, {}),
    "magnitude": (magnitude_mask, oracle.magnitude, LINEAR, {}),
    "filter": (filter_mask, oracle.filters, CONV, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prune", "expect", "shape", "options"), LARGE.values(), ids=LARGE)
def test_layers_of_real_size_equal_the_oracle(prune, expect, shape, options, dtype):
    generator = torch.Generator().manual_seed(7)
    mask = None
    for amount in (0.31, 0.6):
        weight = torch.randn(shape, generator=generator).to(dtype)
        assert_equals_oracle(prune, expect, weight, amount, mask, **options)
        mask = prune(weight, amount, mask=mask, **options)


# ---------------------------------------------------------------------------------------------
# Properties every method has
# ---------------------------------------------------------------------------------------------


def each_kernel(kept: oracle.Mask) -> oracle.Mask:
    return kept.reshape(kept.shape[0] * kept.shape[1], -1)


def whole_layer(kept: oracle.Mask) -> oracle.Mask:
    return kept.reshape(1, -1)


def kernels_of(**options: Any) -> Callable[[oracle.Mask], oracle.Mask]:
    def locales(kept: oracle.Mask) -> oracle.Mask:
        every = oracle.ck_scopes(kept.shape, **options)
        return np.array(
            [[any(kept[k, c].any() for k, c in unit) for unit in units] for units in every]
        )

    return locales


def blocks_of_3(kept: oracle.Mask) -> oracle.Mask:
    rows, columns = (range(0, size, 3) for size in kept.shape)
    return np.array([[kept[r : r + 3, c : c + 3].any() for r in rows for c in columns]])


def output_channels(kept: oracle.Mask) -> oracle.Mask:
    return np.array([[channel.any() for channel in kept]])


@dataclass(frozen=True)
class Method:
    """A mask function, a shape, and how its units lie in locales; a new method is a new row."""

    prune: Prune
    shape: tuple[int, ...]
    locales: Callable[[oracle.Mask], oracle.Mask] | None  # mask -> (locale, unit), True = not gone
    protected: int = 0  # units of a locale that never go
    numbers: bool = True  # whether amounts may be numbers of units

    @property
    def units(self) -> int:
        """Units in a locale."""
        if self.locales is None:
            return math.prod(self.shape)
        return int(self.locales(np.ones(self.shape, dtype=bool)).shape[1])

    def amounts(self) -> st.SearchStrategy[float]:
        return amounts(self.units) if self.numbers else shares

    def left(self, mask: Tensor) -> list[int]:
        """How many units each locale has left."""
        assert self.locales is not None
        return [int(units.sum()) for units in self.locales(mask.numpy())]


CONV2D = (6, 4, 3, 2)
METHODS = {
    "window": Method(window_mask, CONV2D, each_kernel),
    "exact_layer_sparsity": Method(spread_mask, CONV2D, whole_layer, protected=24),
    "ck": Method(ck_mask, CONV2D, kernels_of()),
    "ck, group": Method(partial(ck_mask, block_size=(3, 1)), CONV2D, kernels_of(block_size=(3, 1))),
    "ck, groups": Method(partial(ck_mask, groups=2), CONV2D, kernels_of(groups=2)),
    "ck, layer": Method(partial(ck_mask, scope="layer"), CONV2D, kernels_of(scope="layer")),
    "intra": Method(intra_mask, CONV2D, None, numbers=False),
    "fc_block": Method(
        partial(fc_block_mask, block_size=(3, 3)), (7, 10), blocks_of_3, protected=3
    ),
    "fc_fine": Method(fc_fine_mask, (7, 10), whole_layer, protected=7),
    "fc_structure": Method(fc_structure_mask, (7, 10), whole_layer, protected=7),
    "fc_structure, blocks": Method(
        partial(fc_structure_mask, then="block", block_size=(3, 3)), (7, 10), None
    ),
    "magnitude": Method(magnitude_mask, CONV2D, whole_layer),
    "random": Method(random_mask, CONV2D, whole_layer),
    "filter": Method(filter_mask, CONV2D, output_channels),
}
COUNTED = {name: method for name, method in METHODS.items() if method.locales is not None}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_counted_method = pytest.mark.parametrize("method", COUNTED.values(), ids=COUNTED)


@every_counted_method
@examples
@given(st.data())
def test_exactly_the_count_goes(method, data):
    weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
    gone = oracle.share_count(amount, method.units)
    left = method.units - min(gone, method.units - method.protected)
    assert set(method.left(method.prune(weight, amount))) == {left}


@every_counted_method
@examples
@given(st.data())
def test_exactly_the_count_goes_on_top_of_an_earlier_mask(method, data):
    mask, most = None, 0
    for _ in range(3):  # the weights change between the calls, as in training
        weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
        most = max(most, oracle.share_count(amount, method.units))
        mask = method.prune(weight, amount, mask=mask)
        left = method.units - min(most, method.units - method.protected)
        assert set(method.left(mask)) == {left}


@every_method
@examples
@given(st.data())
def test_nothing_comes_back(method, data):
    mask = torch.ones(method.shape, dtype=torch.bool)
    for _ in range(3):
        weight, amount = data.draw(weights(method.shape)), data.draw(method.amounts())
        later = method.prune(weight, amount, mask=mask)
        assert not (later & ~mask).any()
        mask = later


@every_method
@examples
@given(st.data())
def test_nothing_comes_back_in_any_mask(method, data):
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


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other orders and places of memory."""
    backwards = tuple(reversed(range(tensor.dim())))
    yield tensor.permute(backwards).contiguous().permute(backwards)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    room = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
    slices = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    yield slices.copy_(tensor)
    if tensor.dim() == 4:
        yield tensor.to(memory_format=torch.channels_last)


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
def test_expanded_weights_are_taken(method):
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
def test_without_an_amount_nothing_goes(method):
    assert method.prune(torch.zeros(method.shape), 0.0).all()


@every_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter(method):
    weight = draw_values("few", method.shape, torch.float32, seed=1)
    mask = draw_values("continuous", method.shape, torch.float32, seed=2) > -1
    on_device = method.prune(weight.cuda(), 0.6, mask=mask.cuda())
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), method.prune(weight, 0.6, mask=mask))


# ---------------------------------------------------------------------------------------------
# Properties of one method
# ---------------------------------------------------------------------------------------------


@examples
@given(st.data(), shares)
def test_spread_kernels_differ_by_one_weight_at_most(data, amount):
    mask = spread_mask(data.draw(weights(CONV2D)), amount)
    left = mask.sum(dim=(2, 3))
    assert left.max() - left.min() <= 1


@examples
@given(st.data(), shares)
def test_max_nonzero_bounds_what_each_kernel_keeps(data, amount):
    most = data.draw(st.integers(1, 6))
    exact_layer_sparsity = data.draw(st.booleans())
    mask = window_mask(
        data.draw(weights(CONV2D)),
        amount,
        max_nonzero=most,
        exact_layer_sparsity=exact_layer_sparsity,
    )
    assert mask.sum(dim=(2, 3)).max() <= most


@examples
@given(st.data(), shares, shares)
def test_intra_hits_its_total_within_a_kernel_a_channel(data, amount, window_fraction):
    mask = intra_mask(data.draw(weights(CONV2D)), amount, window_fraction=window_fraction)
    total = oracle.share_count(amount, mask.numel())
    zeros = mask.numel() - int(mask.sum())
    assert zeros < total + mask.numel() / mask.shape[0]
    assert zeros >= total or mask.sum(dim=(2, 3)).max() <= 1


def test_intra_overshoots_a_rising_amount_by_less_than_a_kernel_a_channel():
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(32, 24, 3, 3, generator=generator)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, 31):
        weight = weight + 0.1 * torch.randn(weight.shape, generator=generator)
        amount = 0.9 * step / 30
        mask = intra_mask(weight, amount, mask=mask)
        zeros = mask.numel() - int(mask.sum())
        assert 0 <= zeros - count(amount, mask.numel()) < mask.numel() / mask.shape[0]


@examples
@given(st.data(), shares)
def test_intra_picks_the_kernels_that_ck_picks(data, amount):
    weight = data.draw(weights(CONV2D))
    kernels = intra_mask(weight, amount).flatten(2).any(dim=2)
    part = (amount - 0.5 * amount) / (1 - 0.5 * amount)
    assert torch.equal(kernels, ck_mask(weight, part).flatten(2).any(dim=2))


@pytest.mark.parametrize("prune", [fc_fine_mask, fc_block_mask])
@examples
@given(data=st.data(), amount=shares)
def test_every_output_neuron_keeps_a_weight(prune, data, amount):
    assert prune(data.draw(weights((7, 10))), amount).any(dim=1).all()


@examples
@given(st.data())
def test_blocks_of_one_weight_are_fine(data):
    weight, amount = data.draw(weights((6, 5))), data.draw(amounts(30))
    blocks = fc_block_mask(weight, amount, block_size=(1, 1))
    assert torch.equal(blocks, fc_fine_mask(weight, amount))


def test_random_masks_follow_the_seed():
    weight = torch.ones(20, 20)
    first, again, other = (random_mask(weight, 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_masks_do_not_depend_on_the_weights():
    weight = draw_values("continuous", (20, 20), torch.float32, seed=1)
    assert torch.equal(random_mask(weight, 0.5), random_mask(torch.zeros(20, 20), 0.5))


def test_random_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    random_mask(torch.ones(4, 4), 0.5, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_masks_are_even_over_the_layer():
    left = random_mask(torch.ones(100, 100), 0.5).sum(dim=1)
    assert left.min() > 25
    assert left.max() < 75


# ---------------------------------------------------------------------------------------------
# Counts and errors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "units", "expected"),
    [
        *[(0.0, 9, 0), (1.0, 9, 9), (0, 9, 0), (9, 9, 9), (1, 9, 1), (4, 9, 4)],
        *[(0.5, 9, 5), (0.5, 8, 4), (0.25, 2, 1), (0.24, 2, 0), (0.1, 5, 1), (0.3, 10, 3)],
        *[(0.29, 100, 29), (0.5, 1, 1), (0.49, 1, 0), (0.5, 0, 0), (0, 0, 0)],
    ],
)
def test_count(amount, units, expected):
    result = count(amount, units)
    assert result == expected
    assert type(result) is int


@more_examples
@given(st.floats(0, 1), st.integers(0, 10**7))
def test_count_rounds_half_up(amount, units):
    assert count(amount, units) == math.floor(amount * units + 0.5)


@more_examples
@given(st.data(), st.integers(0, 10**4))
def test_count_rises_with_the_amount(data, units):
    low, high = sorted(data.draw(st.tuples(shares, shares)))
    assert 0 <= count(low, units) <= count(high, units) <= units


BAD_AMOUNTS = [
    *[(-0.1, ValueError), (1.5, ValueError), (NAN, ValueError), (INF, ValueError)],
    *[(-1, ValueError), (1000000, ValueError)],
    *[("0.5", TypeError), (True, TypeError), (None, TypeError), ([0.5], TypeError)],
]
bad_amounts = pytest.mark.parametrize(
    ("amount", "error"), BAD_AMOUNTS, ids=[repr(amount) for amount, _ in BAD_AMOUNTS]
)


def naming(*words: object) -> str:
    """A pattern for texts that hold all the words, in any order, and numbers as whole numbers."""
    patterns = (
        word if isinstance(word, str) else rf"(?<![\w.-]){re.escape(str(word))}(?!\w)"
        for word in words
    )
    return "(?s)" + "".join(rf"(?=.*{pattern})" for pattern in patterns)


@bad_amounts
def test_count_refuses(amount, error):
    with pytest.raises(error, match=naming("amount", amount)):
        count(amount, 9)


@bad_amounts
@every_method
def test_bad_amounts_are_refused(method, amount, error):
    if isinstance(amount, int) and not method.numbers:
        error = TypeError
    with pytest.raises(error, match=naming("amount", amount)):
        method.prune(torch.ones(method.shape), amount)


@every_counted_method
def test_numbers_beyond_the_locale_are_refused(method):
    with pytest.raises(ValueError, match=naming("amount", method.units + 1)):
        method.prune(torch.ones(method.shape), method.units + 1)


@every_method
def test_masks_of_another_shape_are_refused(method):
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
def test_weights_that_are_not_floating_are_refused(method, dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        method.prune(torch.ones(method.shape, dtype=dtype), 0.5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "method",
    [method for name, method in METHODS.items() if name != "random"],
    ids=[name for name in METHODS if name != "random"],
)
def test_scores_that_are_not_finite_are_refused(method, dtype, value):
    weight = torch.ones(method.shape, dtype=dtype)
    weight[(-1,) * len(method.shape)] = value
    with pytest.raises(ValueError, match="not finite"):
        method.prune(weight, 0.5)


def refused(
    name: str,
    error: Any,
    words: Any,
    prune: Prune,
    *shape: int,
    amount: float = 0.5,
    **options: Any,
) -> Any:
    return pytest.param(prune, shape, amount, options, error, words, id=name)


wrong = (TypeError, ValueError)
REFUSED = [
    refused("window: linear", ValueError, ["6, 5"], window_mask, 6, 5),
    refused("spread: linear", ValueError, ["6, 5"], spread_mask, 6, 5),
    refused("ck: linear", ValueError, ["6, 5"], ck_mask, 6, 5),
    refused("intra: linear", ValueError, ["6, 5"], intra_mask, 6, 5),
    refused("block: convolution", ValueError, ["2, 2, 3, 3"], fc_block_mask, 2, 2, 3, 3),
    refused("fine: convolution", ValueError, ["2, 2, 3, 3"], fc_fine_mask, 2, 2, 3, 3),
    refused("fine: vector", ValueError, ["weight", "5"], fc_fine_mask, 5),
    refused("window: pointwise", ValueError, ["(?i:ck)"], window_mask, 6, 5, 1, 1),
    refused("spread: pointwise", ValueError, ["(?i:ck)"], spread_mask, 6, 5, 1),
    refused("window: below", ValueError, ["nonzero", -1], window_mask, 2, 2, 3, max_nonzero=-1),
    refused("window: half", wrong, ["nonzero", 1.5], window_mask, 2, 2, 3, max_nonzero=1.5),
    refused("ck: below", ValueError, ["nonzero", -1], ck_mask, 2, 2, 3, max_nonzero=-1),
    refused("ck: groups", ValueError, ["groups", 4], ck_mask, 6, 2, 3, groups=4),
    refused("ck: size 0", ValueError, ["block_size", 0], ck_mask, 6, 2, 3, block_size=(0, 1)),
    refused("ck: scope", ValueError, ["scope", "row"], ck_mask, 6, 2, 3, scope="row"),
    refused("ck: depthwise", ValueError, ["scope", "layer"], ck_mask, 4, 1, 3, 3, groups=4),
    refused("ck: one filter", ValueError, ["scope", "layer"], ck_mask, 1, 3, 3),
    refused("intra: depthwise", ValueError, ["scope", "layer"], intra_mask, 4, 1, 3, groups=4),
    refused("intra: number", TypeError, ["amount", 3], intra_mask, 4, 2, 3, amount=3),
    refused("intra: number, pointwise", TypeError, ["amount", 3], intra_mask, 4, 2, 1, amount=3),
    refused(
        "intra: share above",
        ValueError,
        ["window_fraction", 1.5],
        intra_mask,
        4,
        2,
        3,
        window_fraction=1.5,
    ),
    refused(
        "intra: share below",
        ValueError,
        ["window_fraction", -0.5],
        intra_mask,
        4,
        2,
        3,
        window_fraction=-0.5,
    ),
    refused(
        "intra: share nan",
        ValueError,
        ["window_fraction", NAN],
        intra_mask,
        4,
        2,
        3,
        window_fraction=NAN,
    ),
    refused("intra: scope", ValueError, ["scope", "row"], intra_mask, 6, 2, 3, scope="row"),
    refused("block: size", ValueError, ["block_size", 0], fc_block_mask, 4, 4, block_size=(0, 4)),
]


@pytest.mark.parametrize(("prune", "shape", "amount", "options", "error", "words"), REFUSED)
def test_refused_arguments(prune, shape, amount, options, error, words):
    with pytest.raises(error, match=naming(*words)):
        prune(torch.ones(shape), amount, **options)


# ---------------------------------------------------------------------------------------------
# The structure of fully connected layers
# ---------------------------------------------------------------------------------------------

WEIGHT_FC = torch.tensor([[1.0, 2.0, 9.0, 8.0], [4.0, 3.0, 9.0, 7.0]])
THIRD = torch.tensor([False, False, True, False])


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0.0, [[1, 1, 0, 1], [1, 1, 0, 1]]),
        (0.25, [[1, 1, 0, 1], [1, 1, 0, 1]]),  # the column is the whole amount
        (0.5, [[0, 0, 0, 1], [1, 1, 0, 1]]),
        (5, [[0, 0, 0, 1], [1, 0, 0, 1]]),
        (1.0, [[0, 0, 0, 1], [0, 0, 0, 1]]),
    ],
)
def test_fc_structure_takes_columns_first_and_counts_them(amount, expected):
    assert fc_structure_mask(WEIGHT_FC, amount, THIRD).int().tolist() == expected


def test_fc_structure_leaves_a_neuron_its_largest_weight_where_all_columns_go():
    mask = fc_structure_mask(WEIGHT_FC, 0.0, torch.ones(4, dtype=torch.bool))
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_fc_structure_leaves_a_neuron_what_an_earlier_mask_left_it():
    earlier = torch.tensor([[False, False, True, False], [True, True, True, True]])
    mask = fc_structure_mask(WEIGHT_FC, 0.0, THIRD, mask=earlier)
    assert mask.int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]


@examples
@given(st.data())
def test_fc_structure_without_columns_goes_on_as_fine_or_block(data):
    weight, amount = data.draw(weights((8, 12))), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    assert torch.equal(fc_structure_mask(weight, amount), fc_fine_mask(weight, amount))
    blocks = fc_structure_mask(weight, amount, then="block", block_size=(4, 4))
    expected = count(count(amount, 96) / 96, 6)
    assert torch.equal(blocks, fc_block_mask(weight, expected, block_size=(4, 4)))


@examples
@given(st.data())
def test_fc_structure_by_blocks_comes_as_near_as_blocks_allow(data):
    weight, amount = data.draw(weights((8, 12))), data.draw(shares)
    columns = torch.from_numpy(np.random.default_rng(data.draw(seeds)).random(12) < 0.3)
    mask = fc_structure_mask(weight, amount, columns, then="block", block_size=(4, 4))
    wanted = max(oracle.share_count(amount, 96), 8 * int(columns.sum()))
    blocks_left = mask.view(2, 4, 3, 4).any(3).any(1)
    assert mask.any(1).all()
    if blocks_left.sum() > 2:  # the best of each row of blocks is protected
        assert abs(int((~mask).sum()) - wanted) <= 8  # half a block


@pytest.mark.parametrize("then", ["fine", "block"])
@examples
@given(st.data())
def test_fc_structure_brings_nothing_back_as_channels_die(then, data):
    rng = np.random.default_rng(data.draw(seeds))
    mask = torch.ones(8, 12, dtype=torch.bool)
    dead = rng.random(12)
    for share in (0.1, 0.4, 0.7):
        columns = torch.from_numpy(dead < share)
        weight, amount = data.draw(weights((8, 12))), data.draw(shares)
        later = fc_structure_mask(weight, amount, columns, mask=mask, then=then)
        assert not (later & ~mask).any()
        assert later.any(1).all()
        assert not later[:, columns].any() or not later[:, ~columns].any(1).all()
        mask = later


@pytest.mark.parametrize("columns", [torch.ones(3, dtype=torch.bool), torch.ones(4)])
def test_fc_structure_refuses_columns_that_do_not_fit(columns):
    with pytest.raises(ValueError, match=r"`columns` of shape .* must be bool of shape \(4,\)"):
        fc_structure_mask(WEIGHT_FC, 0.5, columns)


def test_fc_structure_refuses_other_ways_to_go_on():
    with pytest.raises(ValueError, match=r"`then` \(='rows'\) must be one of 'fine', 'block'"):
        fc_structure_mask(WEIGHT_FC, 0.5, then="rows")
