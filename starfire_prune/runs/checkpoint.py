"""Checkpoints of a training run.

A checkpoint is a folder of safetensors and JSON files, plus the optimizer's state as torch saves
it, loaded with `weights_only`: loading executes nothing that a file contains. Checkpoints are
written atomically and verified by checksums. They hold no random states, because a run seeds its
generators at the start of each epoch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from starfire_prune.serialization.files import is_writer
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
# What json, safetensors, torch and optimizers raise for damaged files and those of other models
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
_Reading = Callable[[Path], AbstractContextManager[Path]]


def save_checkpoint(
    folder: Path,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None = None,
    extra: Mapping[str, Any] | None = None,
    average: nn.Module | None = None,
    keep: Collection[int] = (),
    quantization: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/epoch-NNNN`, and remove all but the last two checkpoints and those in `keep`.

    Call it on every rank: the ranks' masks are compared, and rank 0 writes.

    Args:
        folder: Folder of all checkpoints of the run.
        epoch: Number of epochs that are done.
        model: The model, in any phase of pruning; wrappers are removed.
        optimizer: Optimizer of the model.
        pruner: Pruner of the model.
        extra: Plain numbers and strings to save with the checkpoint.
        average: Moving average of the model's weights, which the pruner mirrors.
        keep: Numbers of epochs whose checkpoints are kept.
        quantization: State of a training with quantization (`QuantizedTraining.state`).

    Raises:
        RuntimeError: From `pruner.check()`; nothing is written then.
        CheckpointError: If writing fails; earlier checkpoints stay intact.
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
        if quantization is not None:
            save_file(dict(quantization), str(temporary / "quantization.safetensors"))
        with (temporary / "optimizer.pt").open("wb") as file:
            torch.save(optimizer.state_dict(), file)
        if pruner is not None:
            state["pruner"] = _write_pruner(pruner, temporary)
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
    """Restore what `save_checkpoint` wrote.

    Args:
        path: Folder of the checkpoint.
        model: Model of the saved architecture.
        optimizer: Optimizer of the model.
        pruner: Pruner of the model.
        average: Moving average of the model's weights, which the pruner mirrors.
        forks: The checkpoint comes from another run's dense phase; that run's pruning is ignored.

    Returns:
        The saved state, with `epoch`, `extra` and `quantization` among its keys; the last is the
        state of a training with quantization, empty if there was none.

    Raises:
        CheckpointError: If a file is missing or damaged, or belongs to another model or settings.
    """
    suggestion = (
        "fork another run, or none"
        if forks
        else f"to continue from the checkpoint before it, delete the folder {path}"
    )
    reading = functools.partial(_reading, suggestion=suggestion)
    state = _verified_state(path, reading, forks, () if average is None else ("average",))
    with reading(path / "optimizer.pt") as file:
        optimizer_state = torch.load(file, map_location="cpu", weights_only=True)
    if not forks:
        _restore_pruner(pruner, state["pruner"], path, reading)
    elif pruner is not None:
        pruner.skip_dense(state["epoch"])
    with reading(path / "model.safetensors") as file:
        load_model(unwrap(model), file)
    if average is not None:
        with reading(path / "average.safetensors") as file:
            load_model(average, file)
    with reading(path / "optimizer.pt"):
        optimizer.load_state_dict(optimizer_state)
    with reading(path / "quantization.safetensors") as file:
        ranges = load_file(file) if file.name in state["sha256"] else {}
    return {**state, "quantization": ranges}


# The checkpoints in a folder


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most epochs in a folder of checkpoints, which need not exist."""
    checkpoints = checkpoints_in(folder)
    return checkpoints[-1] if checkpoints else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder of checkpoints, which need not exist, in order of epochs."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"epoch-\d{4,}", path.name)]
    return sorted(found, key=checkpoint_epoch)


def checkpoint_epoch(path: Path) -> int:
    """The number of epochs that were done at a checkpoint, read from its name."""
    return int(path.name.removeprefix("epoch-"))


def _remove_old(folder: Path, keep: Collection[int]) -> None:
    """Remove all checkpoints but the last two and those in `keep`, and what a kill left behind."""
    for path in checkpoints_in(folder)[:-KEPT_CHECKPOINTS]:
        if checkpoint_epoch(path) in keep:
            continue
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)  # atomic: no checkpoint is ever visible in part
    for hidden in folder.glob(".epoch-*"):
        shutil.rmtree(hidden, ignore_errors=True)


# state.json and its checksums


def _verified_state(
    path: Path, reading: _Reading, forks: bool, weights: Sequence[str]
) -> dict[str, Any]:
    """Read a checkpoint's `state.json` and verify the checksums of all files.

    Args:
        path: Folder of the checkpoint.
        reading: Turns errors of a file into a CheckpointError.
        forks: Require a checkpoint of the dense phase.
        weights: Names of weights that the checkpoint must hold in addition to the model's.
    """
    with reading(path / "state.json") as file:
        state = _read_state(file, weights)
        if forks:
            _check_dense(state, path)
    for name, saved_sum in state["sha256"].items():
        with reading(path / name) as file:
            if _sha256(file) != saved_sum:
                raise ValueError("its contents are not those that were saved")
    return state


def _read_state(file: Path, weights: Sequence[str]) -> dict[str, Any]:
    """Read a `state.json` and check that it is complete and belongs to its folder."""
    state = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(state, dict) and "sha256" in state and _OWN_SUM not in state:
        raise ValueError("it has no checksum for itself: an earlier version wrote it")
    if not isinstance(state, dict) or state.get(_OWN_SUM) != _own_sum(state):
        raise ValueError("its contents are not those that were saved")
    sums, epoch = state["sha256"], state["epoch"]
    wanted = {"optimizer.pt", *(f"{name}.safetensors" for name in ("model", *weights))}
    wanted |= {"masks.safetensors"} if state["pruner"] is not None else set()
    if not isinstance(sums, dict) or not wanted <= sums.keys() or "extra" not in state:
        raise ValueError(f"it does not list {', '.join(sorted(wanted))}")
    named = re.fullmatch(r"epoch-(\d{4,})", file.parent.name)
    if type(epoch) is not int or (named and epoch != int(named[1])):
        raise ValueError(f"it belongs to epoch {epoch}, unlike its folder's name")
    return state


def _check_dense(state: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless a run with other pruning may continue from a checkpoint."""
    phase = "dense" if state["pruner"] is None else state["pruner"]["phase"]
    if phase != "dense":
        raise CheckpointError(f"{path} belongs to the phase {phase}: fork from a dense one")


def _own_sum(state: Mapping[str, Any]) -> str:
    """The SHA-256 of a state without this sum, independent of the order and layout of its JSON."""
    rest = {key: value for key, value in state.items() if key != _OWN_SUM}
    read = json.loads(json.dumps(rest))  # JSON turns all keys into strings
    text = json.dumps(read, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# The pruner


def _write_pruner(pruner: Pruner, folder: Path) -> dict[str, Any]:
    """Write a pruner's masks into the folder, and return the rest of its state."""
    state = pruner.state_dict()
    masks = state.pop("masks")
    save_file(
        {name: mask.contiguous().cpu() for name, mask in masks.items()},
        str(folder / "masks.safetensors"),
    )
    return state


def _restore_pruner(
    pruner: Pruner | None, saved: Mapping[str, Any] | None, path: Path, reading: _Reading
) -> None:
    if (saved is None) != (pruner is None):
        raise CheckpointError(f"{path}: only one of the checkpoint and the recipe prunes")
    if pruner is None or saved is None:
        return
    with reading(path / "masks.safetensors") as file:
        masks = load_file(file)
    with reading(path / "state.json"):
        try:
            pruner.load_state_dict({**saved, "masks": masks})
        except ValueError as error:  # for other settings or another model; it says what to do
            raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def _reading(file: Path, suggestion: str) -> Iterator[Path]:
    """Turn errors while reading a file of a checkpoint into a CheckpointError that names it."""
    try:
        yield file
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{file} can't be loaded: {reason(error)}; {suggestion}") from error
