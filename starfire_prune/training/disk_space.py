"""Estimates of the bytes that a run writes to the disk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starfire_prune.runs.folder import RunError
from starfire_prune.training.setup import Run, create_optimizer
from starfire_prune.utils.modules import layer_weight, unwrap

__all__ = ["checkpoint_bytes", "gigabytes", "mask_bytes", "state_bytes"]


def checkpoint_bytes(run: Run) -> int:
    """The approximate size of a checkpoint: model, average, optimizer state and masks."""
    model = unwrap(run.model)
    copies = 1 if run.average is None else 2
    return int(copies * state_bytes(model) + _optimizer_bytes(run) + mask_bytes(run))


def state_bytes(model: nn.Module) -> int:
    """The size of a model's state dict."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _optimizer_bytes(run: Run) -> float:
    """The size of the optimizer's state, extrapolated from that of a small parameter."""
    probe = nn.Parameter(torch.zeros(16, 16))
    optimizer = create_optimizer(run.recipe.optimizer, [probe])
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer.step()
    except RuntimeError as error:
        raise RunError(
            f"optimizer.name (={run.recipe.optimizer.name}) can't make a step from gradients only: "
            f"{error}"
        ) from error
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    share = sum(value.nbytes for value in state if value.ndim) / probe.nbytes
    return share * sum(weight.nbytes for weight in run.model.parameters() if weight.requires_grad)


def mask_bytes(run: Run) -> int:
    """The size of the masks: one byte per weight of the pruned layers."""
    if run.pruner is None:
        return 0
    return sum(layer_weight(layer.module).numel() for layer in run.pruner.layers.values())


def gigabytes(count: float) -> str:
    """A number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
