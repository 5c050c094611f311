"""Curves of a run's metrics over the epochs, and their means."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from starfire_prune.experiments.run_numbers import percent_of

__all__ = ["Curve", "curve", "mean_curve"]

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""The x and the y values of a curve's points."""


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """A share in the metrics, in percent, over the epochs from 1 in which it is a number.

    Example:
        >>> curve([{"epoch": 0, "top1": 0.5}, {"epoch": 1, "top1": None}], "top1")
        ((1.0,), (50.0,))
    """
    found = [(row["epoch"] + 1.0, percent_of(row, key)) for row in metrics]
    points = [(epoch, value) for epoch, value in found if value is not None]
    return tuple(epoch for epoch, _ in points), tuple(value for _, value in points)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves, at the x values that all of them have.

    Example:
        >>> mean_curve([((1, 2), (10.0, 20.0)), ((1, 2, 3), (20.0, 40.0, 50.0))])
        ((1, 2), (15.0, 30.0))
    """
    points = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, points))) if points else []
    return tuple(shared), tuple(statistics.mean(curve[x] for curve in points) for x in shared)
