"""Checkpoints of a training run, and exported weights.

A checkpoint is a folder of safetensors and JSON files, and of the optimizer's state as torch saves
it, loaded with `weights_only`: nothing here executes what a file contains. It appears whole or not
at all. Random states are not part of it: a run seeds its generators anew each epoch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from starfire_prune.files import replaced_file, replaced_folder
from starfire_prune.layers import prunable_layers, unwrap
from starfire_prune.report import effective_weight

if TYPE_CHECKING:
    from starfire_prune.engine import Pruner

__all__ = [
    "CheckpointError",
    "export_weights",
    "latest_checkpoint",
    "load_checkpoint",
    "plain_state_dict",
    "read_metadata",
    "save_checkpoint",
]

_KEPT_CHECKPOINTS = 2
_METADATA_KEY = "starfire_prune"


class CheckpointError(ValueError):
    """A checkpoint that is missing a part or does not fit."""


def save_checkpoint(
    folder: Path,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/epoch-NNNN` and remove all but the last two checkpoints.

    Args:
        folder: of all checkpoints of the run.
        epoch: number of epochs that are done.
        model: in any phase; wrappers are taken off.
        optimizer: built from it.
        pruner: of the model.
        extra: plain numbers and strings to keep along.

    Raises:
        RuntimeError: from `pruner.check()`: nothing is written then.
        OSError: if the disk is full; the checkpoints that were there stay whole.
    """
    if pruner is not None:
        pruner.check()
    path = folder / f"epoch-{epoch:04d}"
    state: dict[str, Any] = {"epoch": epoch, "extra": dict(extra or {}), "pruner": None}
    with replaced_folder(path) as temporary:
        save_model(unwrap(model), str(temporary / "model.safetensors"))
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        if pruner is not None:
            state["pruner"] = pruner.state_dict()
            masks = state["pruner"].pop("masks")
            save_file(
                {name: mask.contiguous().cpu() for name, mask in masks.items()},
                str(temporary / "masks.safetensors"),
            )
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in _checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        _remove(old)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner | None = None
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; the result holds `epoch` and `extra`.

    Raises:
        CheckpointError: if a file is missing or damaged, or belongs to another model or settings.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (state["pruner"] is None) != (pruner is None):
            raise ValueError("one of the checkpoint and the recipe prunes, the other does not")
        if pruner is not None:
            masks = load_file(str(path / "masks.safetensors"))
            pruner.load_state_dict({**state["pruner"], "masks": masks})
        load_model(unwrap(model), str(path / "model.safetensors"))
        optimizer.load_state_dict(
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        )
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the checkpoint can't be loaded: {error}") from error
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most epochs in a folder of checkpoints."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A pruned model's state under the names of the dense one: `weight`, no `weight_orig`.

    Tensors are copies in contiguous memory on the CPU, and pruned weights are +0.0.
    """
    model = unwrap(model)
    names = {module: name for name, module in prunable_layers(model).items()}
    pruned = {
        f"{names[module]}.weight": effective_weight(module)
        for module in names
        if "weight_orig" in module._parameters
    }
    state = {
        name.removesuffix("_orig") if name.removesuffix("_orig") in pruned else name: value
        for name, value in model.state_dict().items()
        if name.removesuffix("_mask") not in pruned
    }
    weights = {f"{name}.weight" for name in names.values()}
    return {
        name: (pruned.get(name, value) + 0 if name in weights else value.clone()).contiguous().cpu()
        for name, value in state.items()
    }


def export_weights(path: Path, model: nn.Module, pruner: Pruner | None = None) -> None:
    """Write a safetensors file with plain keys, that a fresh timm model loads strictly.

    Its metadata holds, as JSON under `starfire_prune`, the method, amount and era, and for each
    pruned weight the method, the target, the zeros and the size.

    Raises:
        RuntimeError: if a pruned weight is not zero.
    """
    if pruner is not None:
        pruner.check()
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(_metadata(model, pruner))}
    with replaced_file(path) as temporary:
        save_file(plain_state_dict(model), str(temporary), metadata=metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `export_weights` noted in a file's metadata; empty for foreign files."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    content: dict[str, Any] = json.loads(metadata.get(_METADATA_KEY, "{}"))
    return content


def _metadata(model: nn.Module, pruner: Pruner | None) -> dict[str, Any]:
    if pruner is None:
        return {"format_version": 1, "method": None, "weights": {}}
    sparsity = pruner.sparsity()
    return {
        "format_version": 1,
        "method": pruner.pruning.method,
        "amount": pruner.pruning.amount,
        "era": list(pruner.pruning.era),
        "phase": pruner.phase,
        "weights": {
            f"{name}.weight": {
                "method": layer.method,
                "amount": layer.amount,
                "zeros": sparsity[name].zeros,
                "total": sparsity[name].total,
            }
            for name, layer in pruner.layers.items()
        },
    }


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"epoch-\d{4,}", path.name))


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)  # at once out of sight: a checkpoint is never half there
    shutil.rmtree(hidden)
