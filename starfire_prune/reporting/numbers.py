"""The numbers of a report: what the metrics of a run come to, and how variants of it compare."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = [
    "LAST_EPOCHS",
    "Curve",
    "RunNumbers",
    "curve",
    "mean_curve",
    "run_numbers",
]


LAST_EPOCHS: Final = 10
Curve = tuple[tuple[float, ...], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """What the metrics of a run come to.

    Attributes:
        epochs: that are done.
        asked: the sparsity asked for, in percent.
        reached: zeros among all convolution and linear weights, in percent, so far.
        reached_selected: zeros among those of the pruned layers, in percent, so far.
        last_top1: after the last epoch that is done, in percent.
        last_top5: likewise.
        best_top1: the highest so far, in percent.
        best_epoch: the first, from 1, that has it: the epoch of convergence in the paper's Table 5.
        gain: of top-1 over the last ten epochs, in points: the paper's Table 7.
        average_top1: of the moving average of the weights, in percent; None if there is none.
    """

    epochs: int = 0
    asked: float = 0.0
    reached: float | None = None
    reached_selected: float | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    gain: float | None = None
    average_top1: float | None = None


def run_numbers(metrics: Sequence[Mapping[str, Any]], asked: float) -> RunNumbers:
    """The numbers of a run.

    Args:
        metrics: the objects of `metrics.jsonl`, an epoch each. What is not there or was not finite
            gives None.
        asked: the sparsity asked for, in [0, 1].

    Example:
        >>> numbers = run_numbers([{"epoch": 0, "top1": 0.5}, {"epoch": 1, "top1": 0.25}], 0.6)
        >>> numbers.best_top1, numbers.best_epoch, numbers.last_top1, numbers.gain
        (50.0, 1, 25.0, None)
    """
    rows = {int(row["epoch"]) + 1: row for row in metrics}
    if not rows:
        return RunNumbers(asked=100 * asked)
    top1 = {epoch: _percent(row, "top1") for epoch, row in sorted(rows.items())}
    known = {epoch: value for epoch, value in top1.items() if value is not None}
    best = max(known, key=lambda epoch: known[epoch], default=None)
    epochs = max(rows)
    last, earlier = top1[epochs], top1.get(epochs - LAST_EPOCHS)
    return RunNumbers(
        epochs=epochs,
        asked=100 * asked,
        reached=_percent(rows[epochs], "sparsity_network"),
        reached_selected=_percent(rows[epochs], "sparsity"),
        last_top1=last,
        last_top5=_percent(rows[epochs], "top5"),
        best_top1=None if best is None else known[best],
        best_epoch=best,
        gain=None if last is None or earlier is None else last - earlier,
        average_top1=_percent(rows[epochs], "ema_top1"),
    )


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """A share of the metrics in percent over the epochs from 1, where it is a number.

    Example:
        >>> curve([{"epoch": 0, "top1": 0.5}, {"epoch": 1, "top1": None}], "top1")
        ((1.0,), (50.0,))
    """
    found = [(row["epoch"] + 1.0, _percent(row, key)) for row in metrics]
    points = [(epoch, value) for epoch, value in found if value is not None]
    return tuple(epoch for epoch, _ in points), tuple(value for _, value in points)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves where all of them have a point.

    Example:
        >>> mean_curve([((1, 2), (10.0, 20.0)), ((1, 2, 3), (20.0, 40.0, 50.0))])
        ((1, 2), (15.0, 30.0))
    """
    points = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, points))) if points else []
    return tuple(shared), tuple(statistics.mean(own[x] for own in points) for x in shared)


def _percent(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return 100.0 * value if math.isfinite(value) else None
