"""Curves of metrics, and their means."""

from typing import Any

from starfire_prune.reporting.curves import curve, mean_curve


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
