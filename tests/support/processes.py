"""Training runs as processes of their own, what happens within them, and what they leave.

As a module, `python -m tests.support.processes`, it is `tools/train.py` that notes what
happens: see `train_noting`.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from starfire_prune import Pruner
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.training import loop
from starfire_prune.training import train as training
from tests.support.paths import ROOT

Note = Callable[[str, Any], None]


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


# Launching


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    """A process on the CPU, in a process group of its own; stdout and stderr are one."""
    inherited = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    if torch.accelerator.is_available():  # elsewhere a user doesn't set it either
        inherited["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
    )


def setting(*overrides: str) -> list[str]:
    """Overrides as arguments of `tools/train.py`."""
    return [f"--set={override}" for override in overrides]


def launch(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`tools/train.py` as a process."""
    return start(sys.executable, ROOT / "tools" / "train.py", *arguments, **environment)


def launch_two(*arguments: str | Path) -> list[subprocess.Popen[str]]:
    """The processes of a distributed run, the main one first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        launch(
            *arguments,
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]


def torchrun(
    notes: Path,
    *arguments: str | Path,
    options: Sequence[str] = ("--standalone", "--nproc_per_node=2"),
    before: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """The launcher of a run that notes in a folder what happens.

    Args:
        notes: the folder; it must be there.
        arguments: of `tools/train.py`.
        options: of torchrun.
        before: the command that torchrun is an argument of.
        environment: of the processes.
    """
    module = ("-m", "torch.distributed.run", *options, "-m", "tests.support.processes")
    environment = {"NOTES": str(notes), **environment}
    return start(*before, sys.executable, *module, *arguments, **environment)


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a process prints that ends with this exit status."""
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher then ends what it has started
        output, _ = process.communicate()
        pytest.fail(output)
    assert process.returncode == status, output
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


# What happens in a run


def notes_of(folder: Path, rank: int, kind: str) -> list[Any]:
    """What a rank has noted of one kind, in the order in which it came about."""
    lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
    return [content for known, content in map(json.loads, lines) if known == kind]


def train_noting() -> None:
    """`tools/train.py` for a rank of a launcher, that notes what happens in `$NOTES`, by kinds.

    - `update`: epoch, phase, target_sparsity and mask hash after an update of the optimizer.
    - `broadcast`: phase, and the elements that DDP sends at once.
    - `train`, `val`: the labels of a batch, of the rank and of all ranks.
    - `error`: the message of an error that every rank raises.

    With `$TAMPER` (=N), rank 1 loses a weight of `conv1` of its own after its N-th update.
    """
    rank = int(os.environ["RANK"])
    path = Path(os.environ["NOTES"]) / f"rank{rank}.jsonl"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:

        def note(kind: str, content: Any) -> None:
            print(json.dumps([kind, content]), file=file, flush=True)

        phase = ["dense"]
        tampered_update = int(os.environ.get("TAMPER", "0")) if rank == 1 else 0
        _note_updates(patch, note, phase, tampered_update)
        _note_broadcasts(patch, note, phase)
        _note_labels(patch, note)
        _note_errors(patch, note)
        runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")


def _note_updates(
    patch: pytest.MonkeyPatch, note: Note, phase: list[str], tampered_update: int
) -> None:
    step, updates = Pruner.step, [0]

    def noting(pruner: Pruner, updated: bool = True) -> None:
        step(pruner, updated)
        if not updated:
            return
        phase[0] = pruner.phase
        note("update", [pruner.epoch, pruner.phase, pruner.target_sparsity, pruner.mask_hash()])
        updates[0] += 1
        if updates[0] == tampered_update:
            mask = pruner.masks()["conv1.weight"]
            mask[tuple(mask.nonzero()[0])] = False

    patch.setattr(Pruner, "step", noting)


def _note_broadcasts(patch: pytest.MonkeyPatch, note: Note, phase: list[str]) -> None:
    broadcast: Any = distributed._broadcast_coalesced  # type: ignore[attr-defined]

    def noting(group: Any, tensors: Sequence[Tensor], *arguments: Any) -> None:
        note("broadcast", [phase[0], sum(tensor.numel() for tensor in tensors)])
        broadcast(group, tensors, *arguments)

    patch.setattr(distributed, "_broadcast_coalesced", noting)


def _note_labels(patch: pytest.MonkeyPatch, note: Note) -> None:
    prepared, loss = loop._prepared_batch, nn.CrossEntropyLoss.forward

    def noting_own(run: Any, images: Tensor, labels: Tensor) -> Any:
        note("train", labels.tolist())
        return prepared(run, images, labels)

    def noting_all(module: nn.CrossEntropyLoss, logits: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            note("val", labels.tolist())
        return loss(module, logits, labels)

    patch.setattr(loop, "_prepared_batch", noting_own)
    patch.setattr(nn.CrossEntropyLoss, "forward", noting_all)


def _note_errors(patch: pytest.MonkeyPatch, note: Note) -> None:
    train = training.train

    def noting(*arguments: Any, **options: Any) -> None:
        try:
            train(*arguments, **options)
        except RuntimeError as error:
            note("error", str(error))
            distributed.monitored_barrier(timeout=timedelta(seconds=60))  # the other notes it too
            raise

    patch.setattr(training, "train", noting)


if __name__ == "__main__":
    train_noting()
