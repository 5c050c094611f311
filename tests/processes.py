"""Training runs as processes of their own, and what they leave."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from starfire_prune.checkpoint import read_metadata

ROOT = Path(__file__).parent.parent


def exported(run: Path) -> dict[str, Tensor]:
    """The weights that a run has left."""
    return load_file(run / "export" / "model.safetensors")


def same_exports(one: Path, other: Path) -> bool:
    """Whether weights and metadata are equal; safetensors gives metadata in any order."""
    first, second = exported(one), exported(other)
    files = [run / "export" / "model.safetensors" for run in (one, other)]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
        and read_metadata(files[0]) == read_metadata(files[1])
    )


def launch(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`tools/train.py` on the CPU, in a process group of its own; stdout and stderr are one."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / "train.py", *arguments],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1", **environment},
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What a process prints that ends well."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_for_line(process: subprocess.Popen[str], *starts: str) -> None:
    """Read what a process prints up to a line with one of these starts."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(starts):
            return
    pytest.fail("".join(lines))


def launch_two(*arguments: str | Path) -> list[subprocess.Popen[str]]:
    """The processes of a distributed run on the CPU, the main one first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        launch(
            *arguments,
            OMP_NUM_THREADS="1",
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
