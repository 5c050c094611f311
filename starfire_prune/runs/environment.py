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

__all__ = ["check_environment", "current_environment", "forked_environment", "reproducing"]


# The environment


def check_environment(folder: Path, accelerator: Accelerator) -> None:
    """Raise RunError where resuming would not repeat the unbroken run's bits."""
    path = folder / "environment.json"
    own = reproducing(accelerator)
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


def reproducing(accelerator: Accelerator) -> dict[str, int]:
    """What has to be the same for a resumed run to repeat the unbroken one."""
    return {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}


def current_environment(accelerator: Accelerator) -> dict[str, Any]:
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


def forked_environment(source: Path, epochs: int) -> dict[str, Any]:
    """Which epochs of which run were taken over, and with what they were trained."""
    saved = json.loads((source / "environment.json").read_text(encoding="utf-8"))
    there = {key: saved[key] for key in ("commit", "packages", "device") if key in saved}
    return {"run": source.resolve().name, "epochs": epochs, **there}


def _commit() -> str | None:
    """The commit of the package's source tree, where it is run from one."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # installed, perhaps within another project's repository
        return None
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
