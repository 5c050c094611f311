"""The masks of the baselines against masks written by hand, the oracle and their properties."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from tests.masks.cases import (
    assert_golden,
    assert_large_equals_oracle,
    compare,
    draw_values,
    golden,
    more_examples,
)
from tests.support import oracle

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

GOLDEN = [
    golden("magnitude: ties", magnitude_mask, MAGNITUDE, 0.25, MAGNITUDE_1),
    golden("magnitude: a row may be pruned", magnitude_mask, MAGNITUDE, 3, MAGNITUDE_3),
    golden("magnitude: earlier zeros", magnitude_mask, MAGNITUDE, 2, BEST_2, mask=BEST),
    golden("filter", filter_mask, FILTERS, 0.6, FILTERS_2),
    golden("filter: ties", filter_mask, FILTERS, 1, FILTERS_1),
    golden("filter: masked weights", filter_mask, FILTERS, 1, FILTERS_HOLE_1, mask=FILTERS_HOLE),
]


@pytest.mark.parametrize(("prune", "weight", "amount", "options", "expected"), GOLDEN)
def test_golden_masks(prune, weight, amount, options, expected):
    assert_golden(prune, weight, amount, options, expected)


def test_filter_norms_do_not_overflow_half_precision():
    weight = torch.full((3, 8), 60000.0, dtype=torch.float16)
    weight[1] = 50000.0
    assert filter_mask(weight, 1)[:, 0].tolist() == [True, False, True]


any_shape = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


@more_examples
@given(st.data(), any_shape)
def test_magnitude_equals_the_oracle(data, shape):
    compare(data, magnitude_mask, oracle.magnitude, shape, math.prod(shape))


@more_examples
@given(st.data(), any_shape)
def test_filter_equals_the_oracle(data, shape):
    compare(data, filter_mask, oracle.filters, shape, shape[0], exact_sums=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("prune", "expect", "shape"),
    [
        (magnitude_mask, oracle.magnitude, (100, 70)),
        (filter_mask, oracle.filters, (64, 48, 3, 3)),
    ],
    ids=["magnitude", "filter"],
)
def test_layers_of_real_size_equal_the_oracle(prune, expect, shape, dtype):
    assert_large_equals_oracle(prune, expect, shape, dtype)


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
    kept = random_mask(torch.ones(100, 100), 0.5).sum(dim=1)
    assert kept.min() > 25
    assert kept.max() < 75
