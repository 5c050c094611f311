"""Metrics sent to Accelerate's trackers, such as TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import RunError

__all__ = ["check_trackers", "log_metrics", "start_trackers"]


_PACKAGES = {"comet_ml": "comet-ml"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise RunError for a tracker that is not installed, which Accelerate would leave out."""
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise RunError(
                f"training.trackers: {name} is not installed: pip install "
                f"{_PACKAGES.get(name, name)}, or leave it out"
            )


def start_trackers(
    accelerator: Accelerator, recipe: Recipe, folder: Path, first_epoch: int = 0
) -> None:
    """Start the recipe's trackers, which write their files, if any, to `folder/logs`.

    When a run is resumed, TensorBoard discards what came after the checkpoint and continues the
    same chart; other trackers begin a new run under the same name.

    Args:
        accelerator: The accelerator of this process.
        recipe: Recipe of the run.
        folder: Folder of the run.
        first_epoch: First epoch to train; 0 for a new run.
    """
    if recipe.training.trackers:
        accelerator.init_trackers(
            folder.name,
            config=None if first_epoch else dict(_flat(recipe.model_dump(), "")),
            init_kwargs={"tensorboard": {"purge_step": first_epoch}},
        )


def log_metrics(accelerator: Accelerator, metrics: Mapping[str, Any]) -> None:
    """Send the finite numbers among an epoch's metrics to the trackers."""
    numbers = {
        key: value
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    accelerator.log(numbers, step=metrics["epoch"])


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (int, float, str)) else str(value)
