"""The numbers that the metrics of a run give: accuracy, convergence, gain and sparsity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from starfire_prune.runs.folder import QUANTIZATION_PHASE

__all__ = ["LAST_EPOCHS", "RunNumbers", "percent_of", "run_numbers"]


LAST_EPOCHS: Final = 10


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """The numbers that the metrics of a run give; accuracies and sparsity are in percent.

    Attributes:
        epochs: Number of epochs done.
        asked: The sparsity asked for.
        reached: Zeros among all convolution and linear weights so far.
        reached_selected: Zeros among the weights of the pruned layers so far.
        last_top1: Top-1 after the last epoch done.
        last_top5: Top-5 after the last epoch done.
        best_top1: The highest top-1 so far.
        best_epoch: The first epoch, from 1, with `best_top1`: the epoch of convergence in the
            paper's Table 5.
        gain: Gain of top-1 over the last ten epochs, in percentage points: the paper's Table 7.
        average_top1: Top-1 of the moving average of the weights; None if there is no average.
        float_top1: Top-1 after the last epoch before a quantization phase, whose own epochs are
            measured in int8; None if it has not begun.
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
    float_top1: float | None = None


def run_numbers(metrics: Sequence[Mapping[str, Any]], asked: float) -> RunNumbers:
    """The numbers of a run.

    Args:
        metrics: The objects of `metrics.jsonl`, one per epoch. An absent or non-finite value gives
            None.
        asked: The sparsity asked for, in [0, 1].

    Example:
        >>> numbers = run_numbers([{"epoch": 0, "top1": 0.5}, {"epoch": 1, "top1": 0.25}], 0.6)
        >>> numbers.best_top1, numbers.best_epoch, numbers.last_top1, numbers.gain
        (50.0, 1, 25.0, None)
    """
    rows = {int(row["epoch"]) + 1: row for row in metrics}
    if not rows:
        return RunNumbers(asked=100 * asked)
    top1 = {epoch: percent_of(row, "top1") for epoch, row in sorted(rows.items())}
    known = {epoch: value for epoch, value in top1.items() if value is not None}
    best = max(known, key=lambda epoch: known[epoch], default=None)
    epochs = max(rows)
    last, earlier = top1[epochs], top1.get(epochs - LAST_EPOCHS)
    return RunNumbers(
        epochs=epochs,
        asked=100 * asked,
        reached=percent_of(rows[epochs], "sparsity_network"),
        reached_selected=percent_of(rows[epochs], "sparsity"),
        last_top1=last,
        last_top5=percent_of(rows[epochs], "top5"),
        best_top1=None if best is None else known[best],
        best_epoch=best,
        gain=None if last is None or earlier is None else last - earlier,
        average_top1=percent_of(rows[epochs], "ema_top1"),
        float_top1=_float_top1(rows),
    )


def _float_top1(rows: Mapping[int, Mapping[str, Any]]) -> float | None:
    floats = [epoch for epoch, row in rows.items() if row.get("phase") != QUANTIZATION_PHASE]
    if not floats or len(floats) == len(rows):
        return None
    return percent_of(rows[max(floats)], "top1")


def percent_of(row: Mapping[str, Any], key: str) -> float | None:
    """A share of the metrics in percent; None if it is absent or not finite."""
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return 100.0 * value if math.isfinite(value) else None
