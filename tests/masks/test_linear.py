"""The masks of linear layers against masks written by hand, the oracle and their properties."""

import math
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from starfire_prune.masks.counts import count
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask, fc_structure_mask
from tests.masks.cases import (
    amounts,
    assert_golden,
    assert_large_equals_oracle,
    bad_block_sizes,
    block_size_error,
    compare,
    error_case,
    examples,
    golden,
    more_examples,
    naming,
    seeds,
    shares,
    weights,
)
from tests.support import oracle

# 3x5 in blocks of 2: the sums are 2 6 5 / 4 1 1; the 6 and the 4 are protected.
BLOCKS = [[1, 0, -3, 0, 5], [0, 1, 0, 3, 0], [2, 2, -1, 0, 1]]
BLOCKS_1 = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]
BLOCKS_3 = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
BLOCKS_4 = [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
# Without its 3s the second block is the lowest, not pruned, and the 5 is protected in its place.
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

# 3x7 in blocks of 2x3: the sums are 3 4 9 / 3 2 2; the 9 and the 3 below are protected.
AREAS = [[1, 0, -2, 0, 4, 0, 9], [0, 0, 0, 0, 0, 0, 0], [3, 0, 0, 1, -1, 0, 2]]
AREAS_2 = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
AREAS_3 = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
# In blocks of 1x4 the sums are 3 13 / 0 0 / 4 3, in blocks of 4x1 those of the columns.
AREAS_WIDE_3 = [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
AREAS_TALL_4 = [[1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 1]]

areas_mask = partial(fc_block_mask, block_size=(2, 3))
wide_mask = partial(fc_block_mask, block_size=(1, 4))
tall_mask = partial(fc_block_mask, block_size=(4, 1))
pairs_mask = partial(fc_block_mask, block_size=(2, 2))

GOLDEN = [
    golden("block", pairs_mask, BLOCKS, 1, BLOCKS_1),
    golden("block: protection", pairs_mask, BLOCKS, 0.5, BLOCKS_3),
    golden("block: all that may be pruned", pairs_mask, BLOCKS, 1.0, BLOCKS_4),
    golden("block: masked weights", pairs_mask, BLOCKS, 1, BLOCKS_HOLES_1, mask=BLOCKS_HOLES),
    golden("block: the best is pruned", pairs_mask, BLOCKS, 1.0, BLOCKS_BEST_4, mask=BLOCKS_BEST),
    golden("block: ties", pairs_mask, BLOCKS_TIED, 1, BLOCKS_TIED_1),
    golden("block, (2, 3): ties", areas_mask, AREAS, 2, AREAS_2),
    golden("block, (2, 3)", areas_mask, AREAS, 0.5, AREAS_3),
    golden("block, (1, 4)", wide_mask, AREAS, 1.0, AREAS_WIDE_3),
    golden("block, (4, 1)", tall_mask, AREAS, 4, AREAS_TALL_4),
    golden("fine", fc_fine_mask, FINE, 4, FINE_4),
    golden("fine: all that may be pruned", fc_fine_mask, FINE, 1.0, FINE_6),
    golden("fine: the best is pruned", fc_fine_mask, FINE, 3, FINE_BEST_3, mask=FINE_BEST),
    golden("fine: a row is pruned", fc_fine_mask, FINE, 1.0, FINE_ROW_7, mask=FINE_ROW),
    golden("fine: ties", fc_fine_mask, FINE_TIED, 1, FINE_TIED_1),
    golden("fine: ties among the protected", fc_fine_mask, FINE_TIED, 3, FINE_TIED_2),
]


@pytest.mark.parametrize(("prune", "weight", "amount", "options", "expected"), GOLDEN)
def test_golden_masks(prune, weight, amount, options, expected):
    assert_golden(prune, weight, amount, options, expected)


def test_blocks_hold_four_by_four_weights_by_default():
    weight = torch.ones(4, 9)
    weight[:, 4:8] = 0.5
    weight[:, 8] = 3.0
    assert fc_block_mask(weight, 1)[0].tolist() == [True] * 4 + [False] * 4 + [True]


def test_block_sums_do_not_overflow_half_precision():
    weight = torch.full((2, 6), 60000.0, dtype=torch.float16)
    weight[:, 2:4] = 50000.0
    mask = fc_block_mask(weight, 1, block_size=(2, 2))
    assert mask[0].tolist() == [True, True, False, False, True, True]


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


@more_examples
@given(
    st.data(),
    st.integers(1, 13),
    st.integers(1, 13),
    st.sampled_from(["fine", "block"]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_fc_structure_equals_the_oracle(data, out_features, in_features, then, block_size):
    shape = (out_features, in_features)
    rng = np.random.default_rng(data.draw(seeds))
    columns = torch.from_numpy(rng.random(in_features) < data.draw(st.sampled_from([0, 0.3, 0.9])))
    compare(
        data,
        fc_structure_mask,
        oracle.fc_structure,
        shape,
        math.prod(shape),
        columns=columns,
        then=then,
        block_size=block_size,
    )


LINEAR = (100, 70)
LARGE = {
    "fc_block": (fc_block_mask, oracle.fc_block, LINEAR, {}),
    "fc_block, (1, 4)": (fc_block_mask, oracle.fc_block, LINEAR, {"block_size": (1, 4)}),
    "fc_fine": (fc_fine_mask, oracle.fc_fine, LINEAR, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prune", "expect", "shape", "options"), LARGE.values(), ids=LARGE)
def test_layers_of_real_size_equal_the_oracle(prune, expect, shape, options, dtype):
    assert_large_equals_oracle(prune, expect, shape, dtype, **options)


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


ERRORS = [
    error_case("block: convolution", ValueError, ["2, 2, 3, 3"], fc_block_mask, 2, 2, 3, 3),
    error_case("fine: convolution", ValueError, ["2, 2, 3, 3"], fc_fine_mask, 2, 2, 3, 3),
    error_case("fine: vector", ValueError, ["weight", "5"], fc_fine_mask, 5),
]


@pytest.mark.parametrize(("prune", "shape", "amount", "options", "error", "words"), ERRORS)
def test_bad_arguments_are_errors(prune, shape, amount, options, error, words):
    with pytest.raises(error, match=naming(*words)):
        prune(torch.ones(shape), amount, **options)


@pytest.mark.parametrize("prune", [fc_block_mask, partial(fc_structure_mask, then="block")])
@bad_block_sizes
def test_bad_block_sizes_are_errors(prune, block_size, error, text):
    with pytest.raises(error, match=block_size_error(text)):
        prune(torch.ones(8, 8), 0.5, block_size=block_size)


WEIGHT_FC = torch.tensor([[1.0, 2.0, 9.0, 8.0], [4.0, 3.0, 9.0, 7.0]])
THIRD = torch.tensor([False, False, True, False])


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0.0, [[1, 1, 0, 1], [1, 1, 0, 1]]),
        (0.25, [[1, 1, 0, 1], [1, 1, 0, 1]]),  # the column is all of the amount
        (0.5, [[0, 0, 0, 1], [1, 1, 0, 1]]),
        (5, [[0, 0, 0, 1], [1, 0, 0, 1]]),
        (1.0, [[0, 0, 0, 1], [0, 0, 0, 1]]),
    ],
)
def test_fc_structure_prunes_columns_first_and_counts_them(amount, expected):
    assert fc_structure_mask(WEIGHT_FC, amount, THIRD).int().tolist() == expected


def test_fc_structure_keeps_the_largest_weight_where_all_columns_are_pruned():
    mask = fc_structure_mask(WEIGHT_FC, 0.0, torch.ones(4, dtype=torch.bool))
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_fc_structure_leaves_a_neuron_what_an_earlier_mask_left_it():
    earlier = torch.tensor([[False, False, True, False], [True, True, True, True]])
    mask = fc_structure_mask(WEIGHT_FC, 0.0, THIRD, mask=earlier)
    assert mask.int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]


@examples
@given(st.data())
def test_fc_structure_without_columns_prunes_as_fine_or_block(data):
    weight, amount = data.draw(weights((8, 12))), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    assert torch.equal(fc_structure_mask(weight, amount), fc_fine_mask(weight, amount))
    blocks = fc_structure_mask(weight, amount, then="block", block_size=(4, 4))
    expected = count(count(amount, 96) / 96, 6)
    assert torch.equal(blocks, fc_block_mask(weight, expected, block_size=(4, 4)))


@examples
@given(st.data())
def test_fc_structure_by_blocks_is_as_near_as_blocks_allow(data):
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
def test_fc_structure_reports_columns_that_do_not_fit(columns):
    with pytest.raises(ValueError, match=r"`columns` of shape .* must be bool of shape \(4,\)"):
        fc_structure_mask(WEIGHT_FC, 0.5, columns)


def test_fc_structure_reports_other_values_of_then():
    with pytest.raises(ValueError, match=r"`then` \(='rows'\) must be one of 'fine', 'block'"):
        fc_structure_mask(WEIGHT_FC, 0.5, then="rows")


@given(st.data())
@pytest.mark.parametrize("amount", [0.5, 0.9, 1.0])
def test_fc_block_leaves_every_neuron_that_holds_a_weight_one(amount, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    weight = torch.randn(6, 9, generator=generator)
    earlier = torch.rand(6, 9, generator=generator) < data.draw(st.floats(0, 1))
    kept = fc_block_mask(weight, amount, mask=earlier, block_size=(3, 3))
    assert torch.equal(kept.any(1), earlier.any(1))
    assert not (kept & ~earlier).any()
    assert torch.equal(fc_block_mask(weight, amount, mask=kept, block_size=(3, 3)), kept)
