"""Checkpoints of a training run, and exported weights.

A checkpoint is a folder of safetensors and JSON files, and of the optimizer's state as torch saves
it, loaded with `weights_only`: nothing here executes what a file contains. It appears whole or not
at all, and damage since then is noticed. Random states are not part of it: a run seeds its
generators anew each epoch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from starfire_prune.serialization.pruned import is_writer
from starfire_prune.utils.errors import CheckpointError
from starfire_prune.utils.files import reason, replaced_folder, writing
from starfire_prune.utils.modules import unwrap

if TYPE_CHECKING:
    from starfire_prune.engine.pruner import Pruner

__all__ = [
    "KEPT_CHECKPOINTS",
    "checkpoint_epoch",
    "checkpoints_in",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]


KEPT_CHECKPOINTS = 2
_OWN_SUM = "state_sha256"
# What json, safetensors, torch and optimizers raise for files that are damaged or of another model
_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)


def save_checkpoint(
    folder: Path,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None = None,
    extra: Mapping[str, Any] | None = None,
    average: nn.Module | None = None,
    keep: Collection[int] = (),
) -> Path:
    """Write `folder/epoch-NNNN`, and remove all but the last two checkpoints and those to keep.

    Call it on every rank: the ranks' masks are compared, and rank 0 writes.

    Args:
        folder: of all checkpoints of the run.
        epoch: number of epochs that are done.
        model: in any phase; wrappers are taken off.
        optimizer: built from it.
        pruner: of the model.
        extra: plain numbers and strings to keep along.
        average: of the model's weights, which the pruner mirrors.
        keep: numbers of epochs whose checkpoints stay.

    Raises:
        RuntimeError: from `pruner.check()`: nothing is written then.
        CheckpointError: if the disk is full; the checkpoints that were there stay whole.
    """
    if pruner is not None:
        pruner.check()
    path = folder / f"epoch-{epoch:04d}"
    if not is_writer():
        return path
    state: dict[str, Any] = {"epoch": epoch, "extra": dict(extra or {}), "pruner": None}
    with writing(path), replaced_folder(path) as temporary:
        save_model(unwrap(model), str(temporary / "model.safetensors"))
        if average is not None:
            save_model(average, str(temporary / "average.safetensors"))
        with (temporary / "optimizer.pt").open("wb") as file:
            torch.save(optimizer.state_dict(), file)
        if pruner is not None:
            state["pruner"] = pruner.state_dict()
            masks = state["pruner"].pop("masks")
            save_file(
                {name: mask.contiguous().cpu() for name, mask in masks.items()},
                str(temporary / "masks.safetensors"),
            )
        state["sha256"] = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        state[_OWN_SUM] = _own_sum(state)
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    _remove_old(folder, keep)
    return path


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None = None,
    average: nn.Module | None = None,
    *,
    forks: bool = False,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; the result holds `epoch` and `extra`.

    Args:
        path: of the checkpoint.
        model: of the saved one's architecture.
        optimizer: built from it.
        pruner: of the model.
        average: of the model's weights, which the pruner mirrors.
        forks: the checkpoint is of another run's dense phase, whatever that run prunes later.

    Raises:
        CheckpointError: if a file is missing or damaged, or belongs to another model or settings.
    """
    way_out = (
        "fork another run, or none"
        if forks
        else f"to go on from the checkpoint before it, delete the folder {path}"
    )
    reading = functools.partial(_reading, way_out=way_out)
    with reading(path / "state.json") as file:
        state = _read_state(file, *(() if average is None else ("average.safetensors",)))
        saved = state["pruner"]
        if forks:
            _check_dense(state, path)
    for name, saved_sum in state["sha256"].items():
        with reading(path / name) as file:
            if _sha256(file) != saved_sum:
                raise ValueError("its contents are not those that were saved")
    with reading(path / "optimizer.pt") as file:
        optimizer_state = torch.load(file, map_location="cpu", weights_only=True)
    if forks:
        if pruner is not None:
            pruner.skip_dense(state["epoch"])
    elif (saved is None) != (pruner is None):
        raise CheckpointError(f"{path}: one of the checkpoint and the recipe prunes, not both")
    elif pruner is not None:
        with reading(path / "masks.safetensors") as file:
            masks = load_file(file)
        with reading(path / "state.json"):
            _restore_pruner(pruner, {**saved, "masks": masks}, path)
    with reading(path / "model.safetensors") as file:
        load_model(unwrap(model), file)
    if average is not None:
        with reading(path / "average.safetensors") as file:
            load_model(average, file)
    with reading(path / "optimizer.pt"):
        optimizer.load_state_dict(optimizer_state)
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most epochs in a folder of checkpoints."""
    checkpoints = checkpoints_in(folder)
    return checkpoints[-1] if checkpoints else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder of checkpoints, which may not be there, by their epochs."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"epoch-\d{4,}", path.name)]
    return sorted(found, key=checkpoint_epoch)


def checkpoint_epoch(path: Path) -> int:
    """The number of epochs that were done at a checkpoint, by its name."""
    return int(path.name.removeprefix("epoch-"))


def _remove_old(folder: Path, keep: Collection[int]) -> None:
    """Keep the last two checkpoints, and nothing that a kill has left half written or removed."""
    for path in checkpoints_in(folder)[:-KEPT_CHECKPOINTS]:
        if checkpoint_epoch(path) in keep:
            continue
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)  # at once out of sight: a checkpoint is never half there
    for hidden in folder.glob(".epoch-*"):
        shutil.rmtree(hidden, ignore_errors=True)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _own_sum(state: Mapping[str, Any]) -> str:
    """The SHA-256 of what `state.json` holds beside it, whatever the order and the layout."""
    rest = {key: value for key, value in state.items() if key != _OWN_SUM}
    read = json.loads(json.dumps(rest))  # whose keys are strings
    text = json.dumps(read, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read_state(file: Path, *optional: str) -> dict[str, Any]:
    """The contents of a `state.json` as they were saved, of the checkpoint that it lies in.

    Args:
        file: the `state.json`.
        optional: files that the checkpoint has to hold beside the model, the optimizer and,
            if it prunes, the masks.
    """
    state = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(state, dict) and "sha256" in state and _OWN_SUM not in state:
        raise ValueError("it has no checksum of its own: it is of an earlier version")
    if not isinstance(state, dict) or state.get(_OWN_SUM) != _own_sum(state):
        raise ValueError("its contents are not those that were saved")
    sums, epoch = state["sha256"], state["epoch"]
    wanted = {"model.safetensors", "optimizer.pt", *optional}
    wanted |= {"masks.safetensors"} if state["pruner"] is not None else set()
    if not isinstance(sums, dict) or not wanted <= sums.keys() or "extra" not in state:
        raise ValueError(f"it does not tell of {', '.join(sorted(wanted))}")
    named = re.fullmatch(r"epoch-(\d{4,})", file.parent.name)
    if type(epoch) is not int or (named and epoch != int(named[1])):
        raise ValueError(f"it is of {epoch} epochs, and its folder's name says otherwise")
    return state


def _restore_pruner(pruner: Pruner, state: Mapping[str, Any], path: Path) -> None:
    try:
        pruner.load_state_dict(state)
    except ValueError as error:  # of other settings or another model: it says what to do
        raise CheckpointError(f"{path}: {error}") from error


def _check_dense(state: Mapping[str, Any], path: Path) -> None:
    """Whether a run of other pruning may go on from a checkpoint."""
    phase = "dense" if state["pruner"] is None else state["pruner"]["phase"]
    if phase != "dense":
        raise CheckpointError(f"{path} is of the phase {phase}: fork from a dense one")


@contextmanager
def _reading(file: Path, way_out: str) -> Iterator[Path]:
    """Turn what goes wrong with a file of a checkpoint into a sentence that names it."""
    try:
        yield file
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{file} can't be loaded: {reason(error)}; {way_out}") from error
