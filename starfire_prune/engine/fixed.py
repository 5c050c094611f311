"""The fixed phase: masks are frozen, and training is as if pruned weights did not exist."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from starfire_prune.engine.gradients import mask_gradient
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight

__all__ = ["FixedMasks", "check_zeros"]


class FixedMasks:
    """Keeps the pruned weights of some layers exactly zero, whatever the optimizer does.

    Their weights are zeroed at once and after each update, their gradients are masked before
    anything else reads them, and their optimizer state is zeroed.

    Args:
        modules: The pruned layers by name, without pruning hooks.
        masks: The mask of each layer's weight by the layer's name, bool, True = kept.
        optimizer: The optimizer whose state of pruned weights is zeroed, if there is one.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        masks: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.masks = dict(masks)
        self._modules = dict(modules)
        self._hooks = []
        self.mask_weights()
        for name, module in modules.items():
            weight = layer_weight(module)
            if optimizer is not None:
                _mask_optimizer_state(optimizer, weight, masks[name])
            self._hooks.append(mask_gradient(weight, masks[name]))

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the pruned weights to zero, all of them in one operation."""
        weights: list[Tensor] = [layer_weight(module) for module in self._modules.values()]
        torch._foreach_mul_(weights, [self.masks[name] for name in self._modules])

    def remove(self) -> None:
        """Remove the hooks on the gradients; the weights that were pruned stay zero."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def check_zeros(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Raise PruningError, with the layer and the count, if a pruned weight is not zero."""
    for name, module in modules.items():
        weight = layer_weight(module).detach()
        alive = int(((weight != 0) & ~masks[name].to(weight.device)).sum())
        if alive:
            raise PruningError(
                f"layer {name}: {alive} pruned weights are not zero; "
                f"step() must follow each optimizer step, and nothing else may write to them"
            )


@torch.no_grad()
def _mask_optimizer_state(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, mask: Tensor
) -> None:
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.mul_(mask)
