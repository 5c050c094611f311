"""Where a run continues: from its last checkpoint, or from that of the run it forks from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from starfire_prune.recipe.compare import (
    WORKERS,
    beyond_pruning,
    shared_epochs,
    training_differences,
)
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.checkpoint import checkpoint_epoch, checkpoints_in, latest_checkpoint
from starfire_prune.runs.environment import forked_environment, run_environment
from starfire_prune.runs.folder import (
    RunError,
    check_recipe,
    checkpoints_of,
    differences_text,
    exported_file,
    metrics_file,
    read_metrics,
)
from starfire_prune.utils.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["begin_folder", "checkpoint_to_resume", "forked_checkpoint", "resume_notices"]


def checkpoint_to_resume(folder: Path, recipe: Recipe, *, resume: bool = False) -> Path | None:
    """The checkpoint from which a run continues, or None if it starts from the beginning.

    Args:
        folder: Folder of the run; it need not exist yet.
        recipe: Recipe to train.
        resume: Raise an error if there is nothing to resume.

    Raises:
        RunError: If the folder holds another recipe's run or a finished one, or nothing to resume.
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


def resume_notices(folder: Path, recipe: Recipe) -> Iterator[str]:
    """What makes a resumed run differ from an uninterrupted one, although it may be resumed so."""
    saved = load_recipe(folder / "recipe.yaml", keep_unset=True)
    differing = training_differences(saved, recipe)
    if WORKERS in differing:
        before, now = differing[WORKERS]
        yield (
            f"{WORKERS} was {before} and is {now}: images are augmented by other random numbers, "
            f"so that the run does not repeat the uninterrupted one bit for bit"
        )


def forked_checkpoint(source: Path, recipe: Recipe) -> tuple[Path, Recipe]:
    """The last checkpoint of another run that the run of `recipe` would have written as well.

    Returned with the other run's recipe.

    A run trains densely until its era. Runs that differ only in their pruning and quantization
    therefore share, bit for bit, the epochs before the first of their eras, and with the same
    pruning all epochs before quantization.

    Args:
        source: Folder of the other run.
        recipe: Recipe to train.

    Raises:
        RunError: If the other run's recipe differs in more than `pruning` and `quantization`, or if
            the run has kept no checkpoint of the shared epochs.
    """
    saved = source / "recipe.yaml"
    if not saved.is_file():
        raise RunError(
            f"--fork {source} is not a run's folder: it holds no {saved.name}; train that run "
            f"first, or name another"
        )
    other = load_recipe(saved)
    if unlike := beyond_pruning(training_differences(other, recipe)):
        raise RunError(
            f"--fork {source} trains differently from this recipe ({differences_text(unlike)}): "
            f"only settings within pruning and quantization may differ"
        )
    shared = shared_epochs(other, recipe)
    if not shared:
        _refuse_era_updates(source, other, recipe)
        raise RunError(
            f"--fork {source} has no effect: this recipe or that run prunes from epoch 0 on"
        )
    found = [
        path for path in checkpoints_in(checkpoints_of(source)) if checkpoint_epoch(path) <= shared
    ]
    if not found:
        raise RunError(
            f"--fork {source} has kept no checkpoint of the {shared} epochs that both train alike: "
            f"train it with training.keep_checkpoints=[{shared}], or leave out --fork"
        )
    return found[-1], other


def _refuse_era_updates(source: Path, *recipes: Recipe) -> None:
    if any(own.pruning != "none" and own.pruning.era_updates for own in recipes):
        raise RunError(
            f"--fork {source} can't be used with pruning.era_updates, which doesn't say how many "
            f"epochs are dense: give the era in epochs, as pruning.era, or leave out --fork"
        )


def begin_folder(
    folder: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    first_epoch: int = 0,
    source: Path | None = None,
) -> None:
    """Write the files of a new run, or remove the metrics of epochs that will be repeated.

    Args:
        folder: Folder of the run.
        recipe: Recipe that the run trains.
        accelerator: The accelerator of this process.
        first_epoch: First epoch to train.
        source: Folder of the run whose earlier epochs are taken over, if the run forks.

    Raises:
        RunError: If `source` lacks the metrics of one of those epochs; nothing is written then.
    """
    done = [row for row in read_metrics(source or folder) if row["epoch"] < first_epoch]
    if source is not None and [row["epoch"] for row in done] != list(range(first_epoch)):
        raise RunError(
            f"{metrics_file(source)} lacks lines of the first {first_epoch} epochs: restore it, or "
            f"train that run again"
        )
    if first_epoch == 0 or source is not None:
        saved = folder / "recipe.yaml"  # it may be an equal one written by the user
        if not saved.is_file() or training_differences(load_recipe(saved), recipe):
            write_text(saved, dump_recipe(recipe))
        environment = run_environment(accelerator, recipe.seed)
        if source is not None:
            environment["forked"] = forked_environment(source, first_epoch)
        write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    elif list(resume_notices(folder, recipe)):
        _record_workers(folder, first_epoch, recipe.data.workers)
    write_text(metrics_file(folder), "".join(json.dumps(row) + "\n" for row in done))


def _record_workers(folder: Path, epoch: int, workers: int) -> None:
    """Record in `environment.json` with how many workers a run goes on from an epoch."""
    path = folder / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    environment.setdefault("resumed", []).append({"epoch": epoch, WORKERS: workers})
    write_text(path, json.dumps(environment, indent=1) + "\n")
