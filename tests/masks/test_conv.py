"""The masks of convolutions against masks written by hand, the oracle and their properties."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from starfire_prune.masks.conv import ck_mask, intra_mask, window_mask
from starfire_prune.masks.counts import ck_units, count
from tests.masks.cases import (
    NAN,
    assert_golden,
    assert_large_equals_oracle,
    compare,
    error_case,
    examples,
    golden,
    more_examples,
    naming,
    shares,
    weights,
    wrong,
)
from tests.support import oracle

exact_mask = partial(window_mask, exact_layer_sparsity=True)

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
EXACT = [[[1, 5, 9], [2, 6, 8]], [[3, 4, 7], [1, 10, 11]]]
EXACT_1 = [[[0, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
EXACT_4 = [[[0, 1, 1], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
EXACT_6 = [[[0, 0, 1], [0, 1, 1]], [[0, 0, 1], [0, 1, 1]]]
EXACT_8 = [[[0, 0, 1], [0, 0, 1]], [[0, 0, 1], [0, 0, 1]]]
EXACT_EMPTY = [[[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
EXACT_EMPTY_6 = [[[0, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
EXACT_AHEAD = [[[1, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
EXACT_AHEAD_5 = [[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 1, 1]]]
EXACT_AHEAD_6 = [[[1, 0, 0], [0, 1, 1]], [[0, 0, 1], [0, 1, 1]]]
EXACT_TIED = [[[1, -1, 1], [1, 1, 1]], [[-1, 1, 1], [1, -1, 1]]]
EXACT_TIED_6 = [[[0, 0, 1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1]]]

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
# Without its 4 the first kernel is the lowest of channel 0; the third one stays half empty.
CK_HOLES = [[[1, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [1, 1]]]
CK_HOLES_1 = [[[0, 0], [1, 1]], [[1, 1], [0, 0]], [[0, 1], [1, 1]], [[1, 1], [1, 1]]]
# Two groups of two output channels; ungrouped, both kernels of the first would be pruned.
CK_GROUPED = [[[1, 1]], [[-2, 0]], [[3, 0]], [[-4, 4]]]
CK_GROUPED_1 = [[[0, 0]], [[1, 1]], [[0, 0]], [[1, 1]]]
CK_UNGROUPED_2 = [[[0, 0]], [[0, 0]], [[1, 1]], [[1, 1]]]
CK_DEPTHWISE = [[[2, 0]], [[1, -1]], [[3, 3]]]
CK_DEPTHWISE_1 = [[[1, 1]], [[0, 0]], [[1, 1]]]


# 4x1 kernels of three weights. 0.5: one kernel is pruned (c = 1/3) and one weight of each other.
# 0.6: two kernels are pruned (c = 3/7), which leaves one zero of seven, of the tied 1 and -1.
INTRA = [[[1, 5, 9]], [[2, 6, 8]], [[3, 4, 7]], [[-1, 10, 11]]]
INTRA_05 = [[[0, 1, 1]], [[0, 1, 1]], [[0, 0, 0]], [[0, 1, 1]]]
INTRA_06 = [[[0, 1, 1]], [[0, 0, 0]], [[0, 0, 0]], [[1, 1, 1]]]
INTRA_10 = [[[0, 0, 0]], [[0, 0, 0]], [[0, 0, 0]], [[0, 0, 0]]]
INTRA_WINDOWS = [[[0, 0, 1]], [[0, 1, 1]], [[0, 0, 1]], [[0, 1, 1]]]
INTRA_KERNELS = [[[1, 1, 1]], [[0, 0, 0]], [[0, 0, 0]], [[1, 1, 1]]]
POINTWISE = [[[4]], [[-1]], [[3]], [[2]]]
POINTWISE_2 = [[[1]], [[0]], [[1]], [[0]]]

GOLDEN = [
    golden("window", window_mask, WINDOW, 4, WINDOW_4),
    golden("window: half a weight rounds up", window_mask, WINDOW, 0.5, WINDOW_5),
    golden("window: max_nonzero", window_mask, WINDOW, 0.5, WINDOW_7, max_nonzero=2),
    golden("window: slack max_nonzero", window_mask, WINDOW, 0.5, WINDOW_5, max_nonzero=8),
    golden("window: max_nonzero only", window_mask, WINDOW, 0.0, WINDOW_7, max_nonzero=2),
    golden("window: earlier zeros", window_mask, WINDOW, 3, WINDOW_BEST_3, mask=WINDOW_BEST),
    golden("window: ties", window_mask, WINDOW_TIED, 4, WINDOW_TIED_4),
    golden("exact", exact_mask, EXACT, 0.5, EXACT_6),
    golden("exact: an int is the layer's", exact_mask, EXACT, 6, EXACT_6),
    golden("exact: rest only", exact_mask, EXACT, 1, EXACT_1),
    golden("exact: base only", exact_mask, EXACT, 4, EXACT_4),
    golden("exact: the last weight is kept", exact_mask, EXACT, 1.0, EXACT_8),
    golden("exact: max_nonzero", exact_mask, EXACT, 0.0, EXACT_4, max_nonzero=2),
    golden("exact: max_nonzero and rest", exact_mask, EXACT, 6, EXACT_6, max_nonzero=2),
    golden("exact: an empty kernel", exact_mask, EXACT, 0.5, EXACT_EMPTY_6, mask=EXACT_EMPTY),
    golden("exact: a kernel ahead", exact_mask, EXACT, 6, EXACT_AHEAD_6, mask=EXACT_AHEAD),
    golden("exact: base for all", exact_mask, EXACT, 4, EXACT_AHEAD_5, mask=EXACT_AHEAD),
    golden("exact: ties", exact_mask, EXACT_TIED, 6, EXACT_TIED_6),
    golden("ck", ck_mask, CK, 0.5, CK_2),
    golden("ck: ties", ck_mask, CK, 1, CK_1),
    golden("ck: max_nonzero", ck_mask, CK, 0.25, CK_3, max_nonzero=1),
    golden("ck: slack max_nonzero", ck_mask, CK, 0.25, CK_1, max_nonzero=3),
    golden("ck: blocks of outputs", ck_mask, CK, 0.5, CK_PAIRS, block_size=(2, 1)),
    golden("ck: layer", ck_mask, CK, 0.5, CK_LAYER_4, scope="layer"),
    golden("ck: layer, max_nonzero", ck_mask, CK, 0, CK_LAYER_7, scope="layer", max_nonzero=1),
    golden("ck: layer, (2, 1)", ck_mask, CK, 1, CK_LAYER_PAIR, scope="layer", block_size=(2, 1)),
    golden(
        "ck: layer, (2, 1), ties",
        ck_mask,
        CK,
        3,
        CK_LAYER_PAIRS_3,
        scope="layer",
        block_size=(2, 1),
    ),
    golden("ck: masked weights", ck_mask, CK, 0.25, CK_HOLES_1, mask=CK_HOLES),
    golden("ck: ungrouped", ck_mask, CK_GROUPED, 0.5, CK_UNGROUPED_2),
    golden("ck: grouped", ck_mask, CK_GROUPED, 0.5, CK_GROUPED_1, groups=2),
    golden("ck: depthwise", ck_mask, CK_DEPTHWISE, 1, CK_DEPTHWISE_1, groups=3, scope="layer"),
    golden("intra", intra_mask, INTRA, 0.5, INTRA_05),
    golden("intra: rest", intra_mask, INTRA, 0.6, INTRA_06),
    golden("intra: all", intra_mask, INTRA, 1.0, INTRA_10),
    golden("intra: depthwise", intra_mask, INTRA, 0.5, INTRA_05, groups=4, scope="layer"),
    golden("intra: windows only", intra_mask, INTRA, 0.5, INTRA_WINDOWS, window_fraction=1.0),
    golden("intra: kernels only", intra_mask, INTRA, 0.5, INTRA_KERNELS, window_fraction=0.0),
    golden("intra: pointwise", intra_mask, POINTWISE, 0.5, POINTWISE_2),
]


@pytest.mark.parametrize(("prune", "weight", "amount", "options", "expected"), GOLDEN)
def test_golden_masks(prune, weight, amount, options, expected):
    assert_golden(prune, weight, amount, options, expected)


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
def test_exact_layer_sparsity_equals_the_oracle(data, out_channels, in_channels, window):
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


CONV = (64, 48, 3, 3)
LARGE = {
    "window": (window_mask, oracle.window, CONV, {}),
    "window, max_nonzero": (window_mask, oracle.window, CONV, {"max_nonzero": 4}),
    "exact_layer_sparsity": (window_mask, oracle.window, CONV, {"exact_layer_sparsity": True}),
    "ck": (ck_mask, oracle.ck, CONV, {}),
    "ck, groups, (2, 1)": (ck_mask, oracle.ck, CONV, {"groups": 4, "block_size": (2, 1)}),
    "ck, (1, 4)": (ck_mask, oracle.ck, CONV, {"block_size": (1, 4)}),
    "ck, (4, 4), layer": (ck_mask, oracle.ck, CONV, {"block_size": (4, 4), "scope": "layer"}),
    "ck, (5, 7)": (ck_mask, oracle.ck, CONV, {"block_size": (5, 7), "groups": 2}),
    "ck, layer": (ck_mask, oracle.ck, CONV, {"scope": "layer"}),
    "intra": (intra_mask, oracle.intra, CONV, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prune", "expect", "shape", "options"), LARGE.values(), ids=LARGE)
def test_layers_of_real_size_equal_the_oracle(prune, expect, shape, options, dtype):
    assert_large_equals_oracle(prune, expect, shape, dtype, **options)


CONV2D = (6, 4, 3, 2)


@examples
@given(st.data(), shares)
def test_kernels_differ_by_one_weight_at_most_under_exact_layer_sparsity(data, amount):
    mask = exact_mask(data.draw(weights(CONV2D)), amount)
    n_kept = mask.sum(dim=(2, 3))
    assert n_kept.max() - n_kept.min() <= 1


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
def test_intra_reaches_its_total_within_a_kernel_a_channel(data, amount, window_fraction):
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
def test_intra_selects_the_kernels_that_ck_selects(data, amount):
    weight = data.draw(weights(CONV2D))
    kernels = intra_mask(weight, amount).flatten(2).any(dim=2)
    part = (amount - 0.5 * amount) / (1 - 0.5 * amount)
    assert torch.equal(kernels, ck_mask(weight, part).flatten(2).any(dim=2))


ERRORS = [
    error_case("window: linear", ValueError, ["6, 5"], window_mask, 6, 5),
    error_case("exact: linear", ValueError, ["6, 5"], exact_mask, 6, 5),
    error_case("ck: linear", ValueError, ["6, 5"], ck_mask, 6, 5),
    error_case("intra: linear", ValueError, ["6, 5"], intra_mask, 6, 5),
    error_case("window: pointwise", ValueError, ["(?i:ck)"], window_mask, 6, 5, 1, 1),
    error_case("exact: pointwise", ValueError, ["(?i:ck)"], exact_mask, 6, 5, 1),
    error_case("window: below", ValueError, ["nonzero", -1], window_mask, 2, 2, 3, max_nonzero=-1),
    error_case("window: half", wrong, ["nonzero", 1.5], window_mask, 2, 2, 3, max_nonzero=1.5),
    error_case("ck: below", ValueError, ["nonzero", -1], ck_mask, 2, 2, 3, max_nonzero=-1),
    error_case("ck: groups", ValueError, ["groups", 4], ck_mask, 6, 2, 3, groups=4),
    error_case("ck: scope", ValueError, ["scope", "row"], ck_mask, 6, 2, 3, scope="row"),
    error_case("ck: depthwise", ValueError, ["scope", "layer"], ck_mask, 4, 1, 3, 3, groups=4),
    error_case("ck: one filter", ValueError, ["scope", "layer"], ck_mask, 1, 3, 3),
    error_case("intra: depthwise", ValueError, ["scope", "layer"], intra_mask, 4, 1, 3, groups=4),
    error_case("intra: number", TypeError, ["amount", 3], intra_mask, 4, 2, 3, amount=3),
    error_case("intra: number, pointwise", TypeError, ["amount", 3], intra_mask, 4, 2, 1, amount=3),
    error_case(
        "intra: share above",
        ValueError,
        ["window_fraction", 1.5],
        intra_mask,
        4,
        2,
        3,
        window_fraction=1.5,
    ),
    error_case(
        "intra: share below",
        ValueError,
        ["window_fraction", -0.5],
        intra_mask,
        4,
        2,
        3,
        window_fraction=-0.5,
    ),
    error_case(
        "intra: share nan",
        ValueError,
        ["window_fraction", NAN],
        intra_mask,
        4,
        2,
        3,
        window_fraction=NAN,
    ),
    error_case("intra: scope", ValueError, ["scope", "row"], intra_mask, 6, 2, 3, scope="row"),
]


@pytest.mark.parametrize(("prune", "shape", "amount", "options", "error", "words"), ERRORS)
def test_bad_arguments_are_errors(prune, shape, amount, options, error, words):
    with pytest.raises(error, match=naming(*words)):
        prune(torch.ones(shape), amount, **options)
