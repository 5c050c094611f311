"""Estimates of what a run writes to the disk, in bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starfire_prune.runs.folder import RunError
from starfire_prune.training.setup import Run, create_optimizer
from starfire_prune.utils.modules import layer_weight, unwrap

__all__ = ["GIGABYTE", "checkpoint_bytes", "gigabytes", "mask_bytes", "state_bytes"]

GIGABYTE = 1e9


def checkpoint_bytes(run: Run) -> int:
    """About how large a checkpoint of the run is: model, average, optimizer state and masks."""
    model = unwrap(run.model)
    copies = 1 if run.average is None else 2
    return int(copies * state_bytes(model) + _optimizer_bytes(run) + mask_bytes(run))


def state_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _optimizer_bytes(run: Run) -> float:
    """The state that the optimizer will have, as it has it for a small parameter."""
    probe = nn.Parameter(torch.zeros(16, 16))
    optimizer = create_optimizer(run.recipe.optimizer, [probe])
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer.step()
    except RuntimeError as error:
        raise RunError(
            f"optimizer.name (={run.recipe.optimizer.name}) can't take a step by gradients alone: "
            f"{error}"
        ) from error
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    share = sum(value.nbytes for value in state if value.ndim) / probe.nbytes
    return share * sum(weight.nbytes for weight in run.model.parameters() if weight.requires_grad)


def mask_bytes(run: Run) -> int:
    """A byte a weight of the pruned layers."""
    if run.pruner is None:
        return 0
    return sum(layer_weight(layer.module).numel() for layer in run.pruner.layers.values())


def gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.2f} GB" if count >= GIGABYTE / 10 else f"{count / 1e6:.1f} MB"
