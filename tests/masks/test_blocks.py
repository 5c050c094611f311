"""Blocks of kernels: masks written by hand, edges, groups, and layers that are too small."""

from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from starfire_prune.masks.conv import ck_mask
from tests.masks.cases import (
    assert_golden,
    bad_block_sizes,
    block_size_error,
    examples,
    golden,
    shares,
    weights,
)


def as_1x1(rows: list[list[int]]) -> list[list[list[int]]]:
    """1x1 kernels `(K, C)` as a weight, or mask, of a one-dimensional convolution."""
    return [[[value] for value in row] for row in rows]


# 3x8 kernels in blocks of 1x4, with the maxima 2 9 / 3 1 / 1 4.
WIDE = as_1x1([[1, 0, 0, 2, 9, 0, 0, 0], [0, -3, 0, 0, 0, 0, 1, 0], [0, 0, 0, -1, 4, 4, 4, 4]])
WIDE_1 = as_1x1([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
WIDE_2 = as_1x1([[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
WIDE_LAYER_3 = as_1x1(
    [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
)
# Without their 9 and 1, one block of each column is the lowest; the third one keeps a half.
WIDE_HOLES = as_1x1([[1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 1, 0]])
WIDE_HOLES_1 = as_1x1(
    [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 1, 0]]
)

# 8x2 kernels in blocks of 4x1, with the maxima 2 9 / 3 1.
TALL = as_1x1([[1, 9], [0, 0], [0, 0], [2, 0], [-3, 0], [0, -1], [0, 0], [0, 0]])
TALL_1 = as_1x1([[0, 1], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]])
TALL_LAYER_3 = as_1x1([[0, 1], [0, 1], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
# Two groups of 5 output channels in blocks of 2, with the maxima 1 4 3 / 5 0 6.
TALL_GROUPED = as_1x1([[1], [0], [4], [0], [3], [0], [-5], [0], [0], [6]])
TALL_GROUPED_1 = as_1x1([[0], [0], [1], [1], [1], [1], [1], [0], [0], [1]])
TALL_GROUPED_LAYER_3 = as_1x1([[0], [0], [1], [1], [0], [1], [1], [0], [0], [1]])

# 8x8 kernels in blocks of 4x4, with the maxima 5 2 / 4 3.
SQUARE = as_1x1(
    [
        [1, 0, 0, 0, 0, 0, 0, 1],
        [0, 0, 5, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, -2, 0, 0, 0],
        [0, 1, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 4, 0, 0, 0, 0],
        [0, 0, 4, 0, 0, -3, 0, 0],
        [0, 4, 0, 0, 0, 0, 0, 0],
        [4, 0, 0, 0, 0, 0, 0, 1],
    ]
)
SQUARE_1 = as_1x1([[1, 1, 1, 1, 0, 0, 0, 0]] * 4 + [[0, 0, 0, 0, 1, 1, 1, 1]] * 4)
SQUARE_LAYER_1 = as_1x1([[1, 1, 1, 1, 0, 0, 0, 0]] * 4 + [[1, 1, 1, 1, 1, 1, 1, 1]] * 4)

# 5x7 kernels in blocks of 2x3, smaller ones at the edges, with the maxima 2 6 1 / 3 5 2 / 4 4 3.
EDGES = as_1x1(
    [
        [1, 0, 0, 6, 0, 0, 1],
        [0, 0, 2, 0, 0, 0, 0],
        [3, 0, 0, 0, 5, 0, -2],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 4, 0, 0, -4, -3],
    ]
)
EDGES_1 = as_1x1([[0, 0, 0, 1, 1, 1, 0]] * 2 + [[1] * 7] * 2 + [[1, 1, 1, 0, 0, 0, 1]])
EDGES_2 = as_1x1([[0, 0, 0, 1, 1, 1, 0]] * 2 + [[0] * 7] * 2 + [[1, 1, 1, 0, 0, 0, 1]])
EDGES_LAYER_4 = as_1x1([[0, 0, 0, 1, 1, 1, 0]] * 2 + [[0, 0, 0, 1, 1, 1, 0]] * 2 + [[1] * 7])

# 4x3 kernels in blocks of 2x2: three input channels aren't blocked, since only one block fits.
NARROW = as_1x1([[1, 0, 3], [0, 4, 0], [2, 0, 2], [0, 3, 0]])
NARROW_1 = as_1x1([[0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]])

wide_mask = partial(ck_mask, block_size=(1, 4))
tall_mask = partial(ck_mask, block_size=(4, 1))
pairs_mask = partial(ck_mask, block_size=(2, 1))
square_mask = partial(ck_mask, block_size=(4, 4))
edges_mask = partial(ck_mask, block_size=(2, 3))
few_inputs_mask = partial(ck_mask, block_size=(2, 2))

GOLDEN = [
    golden("(1, 4)", wide_mask, WIDE, 1, WIDE_1),
    golden("(1, 4), half a unit rounds up", wide_mask, WIDE, 0.5, WIDE_2),
    golden("(1, 4), max_nonzero", wide_mask, WIDE, 1, WIDE_2, max_nonzero=1),
    golden("(1, 4), layer", wide_mask, WIDE, 3, WIDE_LAYER_3, scope="layer"),
    golden("(1, 4), masked weights", wide_mask, WIDE, 1, WIDE_HOLES_1, mask=WIDE_HOLES),
    golden("(4, 1)", tall_mask, TALL, 0.5, TALL_1),
    golden("(4, 1), layer", tall_mask, TALL, 3, TALL_LAYER_3, scope="layer"),
    golden("groups", pairs_mask, TALL_GROUPED, 1, TALL_GROUPED_1, groups=2),
    golden(
        "groups, layer",
        pairs_mask,
        TALL_GROUPED,
        3,
        TALL_GROUPED_LAYER_3,
        groups=2,
        scope="layer",
    ),
    golden("(4, 4)", square_mask, SQUARE, 0.5, SQUARE_1),
    golden("(4, 4), layer", square_mask, SQUARE, 1, SQUARE_LAYER_1, scope="layer"),
    golden("(4, 4), masked block", square_mask, SQUARE, 1, SQUARE_1, mask=SQUARE_LAYER_1),
    golden("(2, 3), edges", edges_mask, EDGES, 1, EDGES_1),
    golden("(2, 3), edges, two", edges_mask, EDGES, 2, EDGES_2),
    golden("(2, 3), edges, layer", edges_mask, EDGES, 4, EDGES_LAYER_4, scope="layer"),
    golden("too few inputs", few_inputs_mask, NARROW, 1, NARROW_1),
]


@pytest.mark.parametrize(("prune", "weight", "amount", "options", "expected"), GOLDEN)
def test_golden_masks_of_blocks(prune, weight, amount, options, expected):
    assert_golden(prune, weight, amount, options, expected)


@examples
@given(st.data(), shares, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_blocks_never_cross_groups(data, amount, block_size):
    weight = data.draw(weights((15, 7, 2)))
    options: dict[str, Any] = {"block_size": block_size}
    grouped = ck_mask(weight, amount, groups=3, **options)
    each = [ck_mask(part, amount, **options) for part in weight.split(5)]
    assert torch.equal(grouped, torch.cat(each))


@examples
@given(st.data(), shares, st.sampled_from(["channel", "layer"]))
def test_a_block_is_pruned_or_kept_as_one(data, amount, scope):
    mask = ck_mask(data.draw(weights((8, 6, 3))), amount, block_size=(4, 3), scope=scope)
    blocks = mask.view(2, 4, 2, 3, 3)
    assert torch.equal(blocks, blocks[:, :1, :, :1, :1].expand(blocks.shape))


def test_blocks_of_one_kernel_are_the_default():
    weight = torch.randn(12, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ck_mask(weight, 0.6), ck_mask(weight, 0.6, block_size=(1, 1)))


def test_scopes_of_blocks_have_two_units_or_more():
    weight = torch.randn(7, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    unblocked = ck_mask(weight, 0.6, block_size=(4, 2))
    assert torch.equal(unblocked, ck_mask(weight, 0.6, block_size=(1, 2)))


@bad_block_sizes
def test_bad_block_sizes_are_errors(block_size, error, text):
    with pytest.raises(error, match=block_size_error(text)):
        ck_mask(torch.ones(8, 8, 3), 0.5, block_size=block_size)
