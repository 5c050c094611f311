"""The numbers of a report, from metrics made by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starfire_prune.reporting.numbers import curve, mean_curve, run_numbers
from starfire_prune.utils.text import mean_of, number_text, spread_text

# Twelve epochs: the best top-1 is reached in epochs 9 and 11, from 1
TOP1 = (0.1, 0.2, 0.3, 0.35, 0.4, 0.42, 0.45, 0.5, 0.625, 0.6, 0.625, 0.59375)
METRICS = [
    {"epoch": epoch, "top1": top1, "top5": 0.9, "sparsity": 0.61, "sparsity_network": 0.6}
    for epoch, top1 in enumerate(TOP1)
]


def test_the_last_and_the_best_epoch_are_told_apart():
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
def test_what_is_no_finite_number_counts_nowhere(value):
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


def test_a_curve_leaves_out_epochs_without_a_number():
    rows: list[dict[str, Any]] = [
        {"epoch": 0, "top1": 0.5},
        {"epoch": 1, "top1": None},
        {"epoch": 2, "top1": 0.25},
    ]
    assert curve(rows, "top1") == ((1.0, 3.0), (50.0, 25.0))


def test_the_mean_of_curves_is_over_the_points_that_all_have():
    assert mean_curve([((1, 2), (10.0, 20.0)), ((2, 3), (40.0, 50.0))]) == ((2,), (30.0,))
    assert mean_curve([]) == ((), ())


def test_the_mean_leaves_out_what_is_not_there():
    assert (mean_of([1.0, None, 2.0]), mean_of([None])) == (1.5, None)


def test_numbers_are_written_with_their_digits_and_no_negative_zero():
    assert number_text(60.005, 1) == "60.0"
    assert number_text(-0.001) == "0.00"
    assert number_text(0.8, 2, sign=True) == "+0.80"
    assert number_text(None) == "-"


def test_means_have_a_deviation_where_there_are_several_runs():
    assert spread_text([50.0, 52.0], 2) == "51.00 ± 1.41"
    assert spread_text([50.0], 1) == "50.00"


def test_a_mean_of_fewer_runs_says_so():
    assert spread_text([50.0, None], 2) == "50.00 (1 of 2)"
    assert spread_text([None, None], 2) == "-"
