"""The learning rate of an epoch. It depends on nothing else, so that a resumed run repeats it."""

from __future__ import annotations

import bisect
import math

from starfire_prune.recipe.sections import LrSchedule, Recipe

__all__ = ["learning_rate_factor", "recipe_factor"]

_QUANTIZATION = 0.01


def learning_rate_factor(schedule: LrSchedule, epoch: int, epochs: int) -> float:
    """The factor by which an epoch's learning rate differs from the optimizer's `lr`.

    Args:
        schedule: Learning rate schedule of the recipe.
        epoch: Number of the epoch, from 0.
        epochs: Number of epochs of the run; a cosine schedule reaches 0 at their end.

    Returns:
        The factor, in (0, 1].

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


def recipe_factor(recipe: Recipe, epoch: int) -> float:
    """The factor of an epoch of a recipe, which may be one of its quantization phase.

    Args:
        recipe: The recipe.
        epoch: Number of the epoch, from 0.
    """
    quantization = recipe.quantization
    if quantization is None or epoch < recipe.epochs:
        return learning_rate_factor(recipe.lr_schedule, epoch, recipe.epochs)
    if quantization.lr is None:
        return _QUANTIZATION
    return quantization.lr / recipe.optimizer.lr
