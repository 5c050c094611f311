"""The numbers that the metrics of a run give, from metrics made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starfire_prune.experiments.run_numbers import run_numbers

# Twelve epochs: the best top-1 is reached in epochs 9 and 11, from 1
TOP1 = (0.1, 0.2, 0.3, 0.35, 0.4, 0.42, 0.45, 0.5, 0.625, 0.6, 0.625, 0.59375)
METRICS = [
    {"epoch": epoch, "top1": top1, "top5": 0.9, "sparsity": 0.61, "sparsity_network": 0.6}
    for epoch, top1 in enumerate(TOP1)
]


def test_the_last_and_the_best_epoch_have_their_own_numbers():
    numbers = run_numbers(METRICS, 0.6)
    assert (numbers.epochs, numbers.last_top1, numbers.last_top5) == (12, 59.375, 90.0)
    assert numbers.best_top1 == 62.5


def test_the_epoch_of_convergence_is_the_first_of_the_best():
    assert run_numbers(METRICS, 0.6).best_epoch == 9


def test_the_gain_is_that_of_the_last_ten_epochs():
    assert run_numbers(METRICS, 0.6).gain == pytest.approx(59.375 - 20.0)


def test_a_run_of_ten_epochs_has_no_gain_over_them():
    assert run_numbers(METRICS[:10], 0.6).gain is None


def test_sparsity_asked_and_reached_are_percent():
    numbers = run_numbers(METRICS, 0.6)
    assert (numbers.asked, numbers.reached, numbers.reached_selected) == (60.0, 60.0, 61.0)


def test_a_run_without_an_epoch_has_no_numbers():
    numbers = run_numbers([], 0.6)
    assert (numbers.epochs, numbers.asked) == (0, 60.0)
    assert {numbers.last_top1, numbers.best_epoch, numbers.reached, numbers.gain} == {None}


@pytest.mark.parametrize("value", [None, float("nan"), "0.5", True])
def test_a_value_that_is_not_a_finite_number_is_left_out(value):
    numbers = run_numbers([*METRICS[:2], {**METRICS[2], "top1": value}], 0.6)
    assert (numbers.last_top1, numbers.best_top1, numbers.best_epoch) == (None, 20.0, 2)


def test_a_run_that_never_had_a_finite_accuracy_has_no_best_epoch():
    numbers = run_numbers([{"epoch": 0, "top1": None}], 0.0)
    assert (numbers.best_top1, numbers.best_epoch) == (None, None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15))
def test_no_epoch_is_better_than_the_best_and_none_before_it_as_good(top1):
    numbers = run_numbers([{"epoch": e, "top1": value} for e, value in enumerate(top1)], 0.0)
    assert numbers.best_epoch is not None
    assert numbers.best_top1 == 100.0 * max(top1)
    assert max(top1[: numbers.best_epoch - 1], default=-1.0) < max(top1)
