"""`environment.json`: the versions, commit, device and seed of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starfire_prune.runs.folder import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["check_environment", "environment", "forked_environment", "run_environment"]


def environment(device: torch.device) -> dict[str, Any]:
    """The versions, the commit and the hardware that results depend on, as plain data."""
    packages = ("starfire-prune", "torch", "torchvision", "timm", "accelerate", "numpy")
    is_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
    }


def run_environment(accelerator: Accelerator, seed: int) -> dict[str, Any]:
    """The contents of a new run's `environment.json`."""
    return {
        "command": sys.argv,
        **environment(accelerator.device),
        "seed": seed,
        **_reproducing(accelerator),
    }


def forked_environment(source: Path, epochs: int) -> dict[str, Any]:
    """The run that epochs were taken over from, and the environment in which it trained them."""
    saved = json.loads((source / "environment.json").read_text(encoding="utf-8"))
    there = {key: saved[key] for key in ("commit", "packages", "device") if key in saved}
    return {"run": source.resolve().name, "epochs": epochs, **there}


def check_environment(folder: Path, accelerator: Accelerator) -> None:
    """Raise RunError if a resumed run would not equal the uninterrupted run bit for bit.

    Args:
        folder: Folder of the run to resume.
        accelerator: The accelerator of this process.
    """
    path = folder / "environment.json"
    current = _reproducing(accelerator)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        before = {key: saved[key] for key in current}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{path} of the run can't be read: restore it, or delete {folder} to train again"
        ) from error
    ways = {"processes": "accelerate launch --num_processes {}", "threads": "OMP_NUM_THREADS={}"}
    for key, value in current.items():
        if before[key] != value:
            raise RunError(
                f"{folder} was trained with {key} = {before[key]}, and now it is {value}: a "
                f"resumed run would not repeat the uninterrupted one; start it as before: "
                f"{ways[key].format(before[key])}"
            )


def _reproducing(accelerator: Accelerator) -> dict[str, int]:
    """The settings that must not change for a resumed run to equal the uninterrupted one."""
    return {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}


def _commit() -> str | None:
    """The commit of the source tree that the package runs from; None if it is installed."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # installed, perhaps within another project's repository
        return None
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
