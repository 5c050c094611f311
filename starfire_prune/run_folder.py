"""The folder of a run: whether a run may begin or go on there, its environment and its metrics."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starfire_prune.checkpoint import checkpoint_epoch, checkpoints_in, latest_checkpoint
from starfire_prune.files import write_text
from starfire_prune.recipe import (
    Recipe,
    beyond_pruning,
    dense_epochs,
    dump_recipe,
    load_recipe,
    training_differences,
)

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "RunError",
    "append_metrics",
    "begin_folder",
    "check_environment",
    "check_writable",
    "checkpoint_to_resume",
    "checkpoints_of",
    "existing_part",
    "exported_file",
    "forked_checkpoint",
    "locked",
    "read_metrics",
    "writing",
]


class RunError(RuntimeError):
    """A run that can't start or go on; the message says why and what to do."""


def checkpoints_of(folder: Path) -> Path:
    """The folder of a run's checkpoints."""
    return folder / "checkpoints"


def exported_file(folder: Path) -> Path:
    """The weights of a run, whose presence marks it as finished."""
    return folder / "export" / "model.safetensors"


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
    _check_recipe(folder, load_recipe(saved), recipe)
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
            f"--fork {source} trains otherwise than this recipe ({_listed(unlike)}): only what is "
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


def _check_recipe(folder: Path, saved: Recipe, recipe: Recipe) -> None:
    if differing := training_differences(saved, recipe):
        raise RunError(
            f"{folder} holds the run of another recipe ({_listed(differing)}): choose another "
            f"--output, or delete the folder"
        )


def _listed(differing: Mapping[str, tuple[object, object]]) -> str:
    return "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a run, which must be there, within the block.

    The lock goes with the process, however that ends. Where there are none (Windows, some network
    disks) nothing is locked.

    Raises:
        RunError: if another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    path = folder / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{folder} is being trained in by process {file.read().strip() or 'unknown'}: wait "
                f"for it, end it, or choose another --output"
            ) from None
        except OSError:  # this disk knows no locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise RunError if the folder of a run can't be made or written to; nothing is written."""
    place = existing_part(folder)
    if not place.is_dir():
        raise RunError(f"{place} is a file, not a folder for the run: choose another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{place} can't be written to: choose another --output, or its permissions")


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is there."""
    path = path.absolute()
    return next(part for part in (path, *path.parents) if part.exists())


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
            f"{_metrics_file(source)} lacks lines of the {first_epoch} epochs that are "
            f"done: restore it, or train that run anew"
        )
    if first_epoch == 0 or source is not None:
        if not (folder / "recipe.yaml").is_file():  # else an equal one, perhaps of the user's
            write_text(folder / "recipe.yaml", dump_recipe(recipe))
        environment = _environment(accelerator) | {"seed": recipe.seed} | _reproducing(accelerator)
        if source is not None:
            environment["forked"] = _forked_environment(source, first_epoch)
        write_text(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    write_text(_metrics_file(folder), "".join(json.dumps(row) + "\n" for row in done))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that fails within a run into RunError: a full disk's own error names no file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} can't be written: {error.strerror or error}; what was saved before is whole: "
            f"make room and run the same command again"
        ) from error


# Metrics


def append_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Add the object of an epoch to `metrics.jsonl`; numbers that are not finite become null.

    Raises:
        RunError: if the disk is full.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
    path = _metrics_file(folder)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`, an epoch each; none where there is no such file.

    Raises:
        RunError: if the file is damaged, but for a last line that was cut short.
    """
    path = _metrics_file(folder)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:  # a kill cuts the last line short
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(rows, key=lambda row: int(row["epoch"]))
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): mend or delete it") from error


def _metrics_file(folder: Path) -> Path:
    return folder / "metrics.jsonl"


# The environment


def check_environment(folder: Path, accelerator: Accelerator) -> None:
    """Raise RunError where resuming would not repeat the unbroken run's bits."""
    path = folder / "environment.json"
    own = _reproducing(accelerator)
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
        saved = {key: environment[key] for key in own}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{path} of the run can't be read: restore it, or delete {folder} to train anew"
        ) from error
    ways = {"processes": "accelerate launch --num_processes {}", "threads": "OMP_NUM_THREADS={}"}
    for key, value in own.items():
        if saved[key] != value:
            raise RunError(
                f"{folder} was trained with {key} = {saved[key]}, and now it is {value}: a "
                f"resumed run would not repeat what the unbroken one had done; start it as then: "
                f"{ways[key].format(saved[key])}"
            )


def _reproducing(accelerator: Accelerator) -> dict[str, int]:
    """What has to be the same for a resumed run to repeat the unbroken one."""
    return {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    packages = ("starfire-prune", "torch", "torchvision", "timm", "accelerate", "numpy")
    device = accelerator.device
    is_cuda = device.type == "cuda"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
    }


def _forked_environment(source: Path, epochs: int) -> dict[str, Any]:
    """Which epochs of which run were taken over, and with what they were trained."""
    saved = json.loads((source / "environment.json").read_text(encoding="utf-8"))
    there = {key: saved[key] for key in ("commit", "packages", "device") if key in saved}
    return {"run": source.resolve().name, "epochs": epochs, **there}


def _commit() -> str | None:
    """The commit of the package's source tree, where it is run from one."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():  # installed, perhaps within another project's repository
        return None
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
