"""The fixed phase: masks are frozen, and training is as if pruned weights did not exist."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from starfire_prune.engine.gradients import mask_gradient
from starfire_prune.engine.loading import notify_of_loads
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight, weight_versions

__all__ = ["FixedMasks", "check_zeros"]

_LOGGER = logging.getLogger(__name__)


class FixedMasks:
    """Keeps the pruned weights of some layers exactly zero between the updates of an optimizer.

    Their weights are zeroed at once and after each update, their gradients are masked before
    anything else reads them, and their optimizer state is zeroed. Copies, also those of pickle,
    mask the weights and gradients of the modules that are copied with them.

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
        self.masks = {name: mask.bool().clone() for name, mask in masks.items()}
        self._modules = dict(modules)
        self._hooks: dict[str, RemovableHandle] = {}
        self._load_hooks: list[RemovableHandle] = []
        self._seen: dict[str, tuple[int, int]] = {}  # the parameters whose gradients are masked
        self._has_gradient = False  # whether one has reached a layer since the last step
        for name, module in modules.items():
            self._hold(name)
            self._load_hooks.append(notify_of_loads(module, self._after_load, name))
        self._versions = weight_versions(
            self._modules.values()
        )  # torch's counts of changes, after a step
        self.set_optimizer(optimizer)

    def set_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero the state of pruned weights in an optimizer, and in each state that it loads."""
        self._optimizer = optimizer
        self._masked_state: object = None  # the state whose pruned weights are zeroed
        self._mask_new_state()

    def _mask_new_state(self) -> None:
        """Zero the optimizer's state of pruned weights unless it is the one that was zeroed."""
        optimizer = self._optimizer
        if optimizer is None or optimizer.state is self._masked_state:
            return
        for name, module in self._modules.items():
            _mask_optimizer_state(optimizer, layer_weight(module), self.masks[name])
        self._masked_state = optimizer.state  # load_state_dict replaces it

    @torch.no_grad()
    def _hold(self, name: str) -> None:
        """Zero a layer's pruned weights, and mask its gradients from now on."""
        weight, mask = layer_weight(self._modules[name]), self.masks[name]
        if mask.device != weight.device:
            mask = self.masks[name] = mask.to(weight.device)
        weight.mul_(mask)
        if name in self._hooks:
            self._hooks[name].remove()
        self._hooks[name] = mask_gradient(weight, mask, self._note_gradient)
        self._seen[name] = _identity(weight)

    def _after_load(self, name: str) -> None:
        """Prune what was loaded; `assign=True` has brought a new parameter."""
        alive = _alive(self._modules[name], self.masks[name])
        if alive:
            _LOGGER.warning(
                "layer %s: %d of the loaded weights were not zero where the frozen mask prunes; "
                "they are zero now. The checkpoint is of another phase or of another run",
                name,
                alive,
            )
        self._hold(name)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the pruned weights to zero, all of them in one operation.

        Raises:
            PruningError: If a parameter has been replaced by one whose gradients are not masked, or
                if neither a gradient nor an optimizer has reached the weights since the last call.
        """
        weights: list[Tensor] = [layer_weight(module) for module in self._modules.values()]
        for name, weight in zip(self._modules, weights, strict=True):
            if self._seen[name] != _identity(weight):
                self._check_replaced(name, weight)
        if not self._has_gradient and self._versions == weight_versions(self._modules.values()):
            raise PruningError(
                "no pruned layer has received a gradient or a new weight since the last step(): "
                "if the model was copied (by deepcopy or pickle), copy its pruner with it; if its "
                "pruned layers were not trained, call step(updated=False)"
            )
        torch._foreach_mul_(weights, [self.masks[name] for name in self._modules])
        self._versions = weight_versions(self._modules.values())
        self._has_gradient = False
        self._mask_new_state()

    def _note_gradient(self) -> None:
        self._has_gradient = True

    def _check_replaced(self, name: str, weight: Tensor) -> None:
        """Raise PruningError unless the gradients of a parameter that changed are still masked."""
        mask = self.masks[name]
        with torch.enable_grad():
            required, weight.requires_grad = weight.requires_grad, True
            (gradient,) = torch.autograd.grad(weight.sum(), weight)
            weight.requires_grad = required
        if bool(gradient[~mask.to(weight.device)].any()):
            raise PruningError(
                f"the parameter of layer {name} was replaced (by a conversion such as "
                f"`model.double()`, or by hand), so that its last gradient was not masked: after "
                f"replacing parameters, call pruner.load_state_dict(pruner.state_dict()) and give "
                f"the optimizer the new ones"
            )
        self.masks[name] = mask.to(weight.device)
        self._seen[name] = _identity(weight)

    def remove(self) -> None:
        """Remove the hooks on the gradients; the weights that were pruned stay zero."""
        for hook in [*self._hooks.values(), *self._load_hooks]:
            hook.remove()
        self._hooks.clear()
        self._load_hooks.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"masks": self.masks, "_modules": self._modules}  # copies need hooks of their own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_modules"], state["masks"], None)  # type: ignore[misc]


def _identity(weight: Tensor) -> tuple[int, int]:
    """What differs after a parameter was replaced or moved to other memory."""
    return id(weight), weight.data_ptr()


def check_zeros(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Raise PruningError, with the layer and the count, if a pruned weight is not zero."""
    for name, module in modules.items():
        alive = _alive(module, masks[name])
        if alive:
            raise PruningError(
                f"layer {name}: {alive} pruned weights are not zero; "
                f"step() must follow each optimizer step, and nothing else may write to them"
            )


def _alive(module: nn.Module, mask: Tensor) -> int:
    """The number of pruned weights that are not zero."""
    weight = layer_weight(module).detach()
    return int(((weight != 0) & ~mask.to(weight.device)).sum())


@torch.no_grad()
def _mask_optimizer_state(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, mask: Tensor
) -> None:
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.mul_(mask)
