"""The folder of a run: its paths, its lock and its metrics."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from starfire_prune.recipe.compare import resume_differences
from starfire_prune.recipe.sections import Recipe
from starfire_prune.utils.files import writing

__all__ = [
    "QUANTIZATION_PHASE",
    "RunError",
    "append_metrics",
    "check_recipe",
    "check_writable",
    "checkpoints_of",
    "create_folder",
    "differences_text",
    "existing_part",
    "exported_file",
    "int8_file",
    "locked",
    "metrics_file",
    "read_metrics",
]


QUANTIZATION_PHASE: Final = "quantization"  # in metrics; other phases are the pruner's
_OWNER: Final = ".lock-owner"


class RunError(RuntimeError):
    """A run that can't start or continue; the message says why and what to do."""


# Paths


def checkpoints_of(folder: Path) -> Path:
    """The folder of a run's checkpoints."""
    return folder / "checkpoints"


def exported_file(folder: Path) -> Path:
    """The exported weights of a run; the run is finished if the file exists."""
    return folder / "export" / "model.safetensors"


def int8_file(folder: Path) -> Path:
    """The int8 model of a run, which a quantization phase or `starfire quantize` writes."""
    return folder / "export" / "int8.safetensors"


def metrics_file(folder: Path) -> Path:
    """The metrics of a run, one JSON object per epoch and line."""
    return folder / "metrics.jsonl"


def existing_part(path: Path) -> Path:
    """The path itself if it exists, or else the nearest of its parents that does."""
    path = path.absolute()
    return next(part for part in (path, *path.parents) if part.exists())


# Whether a run may use the folder


def check_recipe(folder: Path, saved: Recipe, recipe: Recipe) -> None:
    """Raise RunError if the folder's recipe trains differently from the given one.

    Only the number of workers may differ.
    """
    if differing := resume_differences(saved, recipe):
        raise RunError(
            f"{folder} holds the run of another recipe ({differences_text(differing)}): choose "
            f"another --output, or delete the folder"
        )


def differences_text(differing: Mapping[str, tuple[object, object]]) -> str:
    """Enumerate keys of two recipes with their values in the saved and in the current one."""
    return "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())


def check_writable(folder: Path) -> None:
    """Raise RunError if the folder of a run can't be made or written to; nothing is written."""
    place = existing_part(folder)
    if not place.is_dir():
        raise RunError(f"{place} is a file, not a folder for the run: choose another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{place} can't be written to: choose another --output, or its permissions")


def create_folder(folder: Path) -> None:
    """Create the folder of a new run.

    Raises:
        RunError: If another run has created it since this one found that it did not exist.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:  # its lock is not tried, which the other run may want now
        if not folder.is_dir():  # a link to nothing, for example
            raise RunError(f"{folder} is not a folder: choose another --output") from error
        raise _in_use(folder) from error


def _in_use(folder: Path) -> RunError:
    owner = folder / _OWNER
    name = owner.read_text(encoding="utf-8") if owner.is_file() else "unknown"
    return RunError(
        f"{folder} is being trained in by process {name}: wait for it, end it, or choose another "
        f"--output"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of an existing run folder within the block.

    The operating system releases the lock when the process ends, however it ends. On a file system
    without locks, such as some network disks, nothing is locked.

    Raises:
        RunError: If another process holds the lock.
    """
    lock, owner = FileLock(folder / ".lock", timeout=0), folder / _OWNER
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(folder) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        owner.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        if os.name != "nt":  # where filelock removes the file, which can't be removed while open
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# Metrics


def append_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Add an epoch's object to `metrics.jsonl`; numbers that are not finite become null.

    Raises:
        CheckpointError: If the file can't be written, for example on a full disk.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
    path = metrics_file(folder)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl` in the order of their epochs; none if there is no such file.

    Raises:
        RunError: If the file is damaged. An incomplete last line, which a kill leaves behind, is
            skipped.
    """
    path = metrics_file(folder)
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(rows, key=lambda row: int(row["epoch"]))
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): repair or delete it") from error
