"""Where a run continues: its last checkpoint, or that of the run it forks from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from starfire_prune.recipe.compare import beyond_pruning, dense_epochs, training_differences
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.checkpoint import checkpoint_epoch, checkpoints_in, latest_checkpoint
from starfire_prune.runs.environment import forked_environment, run_environment
from starfire_prune.runs.folder import (
    RunError,
    check_recipe,
    checkpoints_of,
    exported_file,
    listed,
    metrics_file,
    read_metrics,
)
from starfire_prune.utils.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["begin_folder", "checkpoint_to_resume", "forked_checkpoint"]


def checkpoint_to_resume(folder: Path, recipe: Recipe, *, resume: bool = False) -> Path | None:
    """The checkpoint from which a run goes on, or None where it begins.

    Args:
        folder: of the run; it may not be there yet.
        recipe: to train.
        resume: refuse to start from nothing.

    Raises:
        RunError: if the folder holds another recipe's run or a finished one, or nothing to resume.
    """
    saved = folder / "recipe.yaml"
    checkpoint = latest_checkpoint(checkpoints_of(folder))
    if resume and checkpoint is None:
        raise RunError(f"{folder} holds no checkpoint to resume from")
    if not saved.is_file():
        if checkpoint is not None:
            raise RunError(
                f"{folder} holds checkpoints but not the {saved.name} they belong to: restore it, "
                f"choose another --output, or delete the folder"
            )
        return None
    check_recipe(folder, load_recipe(saved), recipe)
    if exported_file(folder).is_file():
        raise RunError(
            f"{folder} holds a finished run of this recipe: choose another --output, or delete it"
        )
    return checkpoint


def forked_checkpoint(source: Path, recipe: Recipe) -> Path:
    """The last checkpoint of another run that the run of `recipe` would have written too.

    Until its era a run trains as a dense one: those that differ in their pruning alone share the
    epochs before the first of their eras, bit for bit.

    Args:
        source: folder of the other run.
        recipe: to train.

    Raises:
        RunError: if that is no run of the same recipe but for `pruning`, or has kept none of those.
    """
    saved = source / "recipe.yaml"
    if not saved.is_file():
        raise RunError(
            f"--fork {source} is no run's folder, as it holds no {saved.name}: train that run "
            f"first, or name another"
        )
    other = load_recipe(saved)
    if unlike := beyond_pruning(training_differences(other, recipe)):
        raise RunError(
            f"--fork {source} trains otherwise than this recipe ({listed(unlike)}): only what is "
            f"within pruning may differ"
        )
    shared = min(dense_epochs(other), dense_epochs(recipe))
    found = [
        path for path in checkpoints_in(checkpoints_of(source)) if checkpoint_epoch(path) <= shared
    ]
    if not found:
        raise RunError(
            f"--fork {source} has kept no checkpoint of the {shared} epochs that both train dense: "
            f"train it with training.keep_checkpoints=[{shared}], or go without --fork"
            if shared
            else f"--fork {source} has no use: this recipe or that run prunes from epoch 0 on"
        )
    return found[-1]


def begin_folder(
    folder: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    first_epoch: int = 0,
    source: Path | None = None,
) -> None:
    """Write what a run begins with, or cut its metrics to the epochs before the one to resume.

    Args:
        folder: of the run.
        recipe: that it trains.
        accelerator: of this process.
        first_epoch: to train.
        source: folder of the run whose epochs before that it takes over.

    Raises:
        RunError: if `source` has not kept the metrics of all of them; nothing is written then.
    """
    done = [row for row in read_metrics(source or folder) if row["epoch"] < first_epoch]
    if source is not None and [row["epoch"] for row in done] != list(range(first_epoch)):
        raise RunError(
            f"{metrics_file(source)} lacks lines of the {first_epoch} epochs that are "
            f"done: restore it, or train that run anew"
        )
    if first_epoch == 0 or source is not None:
        if not (folder / "recipe.yaml").is_file():  # else an equal one, perhaps of the user's
            write_text(folder / "recipe.yaml", dump_recipe(recipe))
        environment = run_environment(accelerator, recipe.seed)
        if source is not None:
            environment["forked"] = forked_environment(source, first_epoch)
        write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    write_text(metrics_file(folder), "".join(json.dumps(row) + "\n" for row in done))
