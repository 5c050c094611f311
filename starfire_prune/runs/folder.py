"""The folder of a run: whether a run may begin or go on there, its environment and its metrics."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starfire_prune.recipe.compare import training_differences
from starfire_prune.recipe.sections import Recipe

__all__ = [
    "RunError",
    "append_metrics",
    "check_recipe",
    "check_writable",
    "checkpoints_of",
    "existing_part",
    "exported_file",
    "listed",
    "locked",
    "metrics_file",
    "read_metrics",
    "writing",
]


if sys.platform != "win32":
    import fcntl


class RunError(RuntimeError):
    """A run that can't start or go on; the message says why and what to do."""


def checkpoints_of(folder: Path) -> Path:
    """The folder of a run's checkpoints."""
    return folder / "checkpoints"


def exported_file(folder: Path) -> Path:
    """The weights of a run, whose presence marks it as finished."""
    return folder / "export" / "model.safetensors"


def check_recipe(folder: Path, saved: Recipe, recipe: Recipe) -> None:
    if differing := training_differences(saved, recipe):
        raise RunError(
            f"{folder} holds the run of another recipe ({listed(differing)}): choose another "
            f"--output, or delete the folder"
        )


def listed(differing: Mapping[str, tuple[object, object]]) -> str:
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
    path = metrics_file(folder)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`, an epoch each; none where there is no such file.

    Raises:
        RunError: if the file is damaged, but for a last line that was cut short.
    """
    path = metrics_file(folder)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:  # a kill cuts the last line short
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(rows, key=lambda row: int(row["epoch"]))
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): mend or delete it") from error


def metrics_file(folder: Path) -> Path:
    return folder / "metrics.jsonl"
