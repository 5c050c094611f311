"""How many units an amount stands for, and how many a weight has."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from starfire_prune.masks.counts import (
    Units,
    ck_units,
    count,
    effective_block_size,
    fc_block_units,
    fc_fine_units,
    filter_units,
    weight_units,
    window_units,
)
from tests.masks.cases import bad_amounts, more_examples, naming, shares


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


@bad_amounts
def test_count_reports_bad_amounts(amount, error):
    with pytest.raises(error, match=naming("amount", amount)):
        count(amount, 9)


@pytest.mark.parametrize(
    ("amount", "expected"), [(0.0, 0), (0.5, 4), (0.75, 5), (1.0, 5), (3, 3), (5, 5), (7, 5)]
)
def test_protected_units_are_not_pruned(amount, expected):
    assert Units(size=7, scopes=2, protected=2).pruned(amount) == expected


@bad_amounts
def test_units_report_bad_amounts(amount, error):
    with pytest.raises(error, match=naming("amount", amount)):
        Units(9).pruned(amount)


CONV, POINTWISE, FIRST, LINEAR = (64, 16, 3, 3), (256, 64, 1, 1), (64, 3, 7, 7), (10, 30)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (weight_units(CONV), Units(9216)),
        (filter_units(CONV), Units(64)),
        (window_units(CONV), Units(9, scopes=1024)),
        (window_units(CONV, exact_layer_sparsity=True), Units(9216)),
        (ck_units(CONV), Units(64, scopes=16)),
        (ck_units(CONV, scope="layer"), Units(1024)),
        (ck_units(CONV, groups=4), Units(16, scopes=64)),
        (ck_units(CONV, block_size=(4, 1)), Units(16, scopes=16)),
        (ck_units(CONV, block_size=(1, 4)), Units(64, scopes=4)),
        (ck_units(CONV, block_size=(4, 4), groups=2), Units(8, scopes=8)),
        (ck_units(CONV, block_size=(4, 4), scope="layer"), Units(64)),
        (ck_units(CONV, block_size=(5, 3), groups=2), Units(7, scopes=12)),
        (ck_units(CONV, block_size=(5, 3), groups=2, scope="layer"), Units(84)),
        (ck_units(FIRST, block_size=(4, 4)), Units(16, scopes=3)),
        (ck_units(POINTWISE, block_size=(8, 4)), Units(32, scopes=16)),
        (ck_units((8, 1, 3, 3), groups=8, scope="layer"), Units(8)),
        (fc_fine_units(LINEAR), Units(300, protected=10)),
        (fc_block_units(LINEAR), Units(24, protected=3)),
        (fc_block_units(LINEAR, block_size=(1, 4)), Units(80, protected=10)),
        (fc_block_units((3, 2), block_size=(8, 8)), Units(1, protected=1)),
    ],
)
def test_units_of_a_weight(units, expected):
    assert units == expected


@pytest.mark.parametrize(
    ("shape", "groups", "block_size", "expected"),
    [
        (CONV, 1, (4, 4), (4, 4)),
        (CONV, 1, (32, 8), (32, 8)),  # two blocks each
        (CONV, 1, (33, 9), (1, 1)),
        (CONV, 2, (32, 8), (1, 8)),  # a group holds a single block of outputs
        (CONV, 2, (16, 8), (16, 8)),
        (FIRST, 1, (4, 4), (4, 1)),
        (FIRST, 1, (4, 1), (4, 1)),
        ((7, 8, 1), 1, (4, 4), (1, 4)),
        ((16, 1, 3, 3), 16, (4, 4), (1, 1)),  # depthwise
    ],
)
def test_a_layer_of_fewer_than_two_blocks_is_not_blocked(shape, groups, block_size, expected):
    assert effective_block_size(shape, groups, block_size) == expected
    options = {"groups": groups, "scope": "layer"}
    blocked = ck_units(shape, block_size=block_size, **options)
    assert blocked == ck_units(shape, block_size=expected, **options)


def test_window_has_no_units_in_1x1_kernels():
    with pytest.raises(ValueError, match=r"of shape \(256, 64, 1, 1\) has 1x1 kernels.* by ck"):
        window_units(POINTWISE)
