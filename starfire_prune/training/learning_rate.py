"""The learning rate as a function of the epoch alone, so that a resumed run has the same."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starfire_prune.recipe.sections import LrSchedule

__all__ = ["learning_rate_factor"]


def learning_rate_factor(schedule: LrSchedule, epoch: int, epochs: int) -> float:
    """What the learning rate of an epoch is multiplied by.

    Args:
        schedule: of the recipe.
        epoch: 0-based.
        epochs: of the run, at whose end a cosine is at 0.

    Example:
        >>> from starfire_prune.recipe import LrSchedule
        >>> learning_rate_factor(LrSchedule(milestones=(30, 60)), 30, epochs=90)
        0.1
    """
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    if schedule.name == "cosine":
        return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
    return float(schedule.gamma ** bisect.bisect_right(schedule.milestones, epoch))
