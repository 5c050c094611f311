"""The optimizer of a pruner: its state of pruned weights is zero in the fixed phase."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from starfire_prune.engine.fixed import FixedMasks
from starfire_prune.utils.modules import layer_weight
from starfire_prune.utils.text import first_few

__all__ = ["WithOptimizer", "check_optimizer"]

_LOGGER = logging.getLogger(__name__)


class WithOptimizer:
    """The part of a `Pruner` that holds the optimizer."""

    _optimizer: torch.optim.Optimizer | None
    _fixed: FixedMasks | None

    def _modules(self) -> dict[str, nn.Module]:
        raise NotImplementedError

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose state of pruned weights is zeroed; None if there is none.

        Set it in any phase, if it is built after the pruner or exchanged during training:
        `pruner.optimizer = optimizer`. In the fixed phase its state is zeroed at once, and again at
        the next `step()` if another state is loaded.

        Raises:
            TypeError, ValueError: If it is not an optimizer, or holds none of the pruned weights.
        """
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        check_optimizer(optimizer, self._modules())
        self._optimizer = optimizer
        if self._fixed is not None:
            self._fixed.set_optimizer(optimizer)


def check_optimizer(
    optimizer: torch.optim.Optimizer | None, layers: Mapping[str, nn.Module]
) -> None:
    """Raise an error unless an optimizer, if there is one, holds weights of the pruned layers.

    Raises:
        TypeError, ValueError: If it is not an optimizer, or holds none of them.
    """
    if optimizer is None:
        return
    kind = type(optimizer).__name__
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or not hasattr(optimizer, "state"):
        raise TypeError(f"`optimizer` (a {kind}) must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "`optimizer` (a LBFGS) moves pruned weights between the forward passes of one step, "
            "where no mask holds: train with an optimizer of first order"
        )
    held = {id(parameter) for group in groups for parameter in group["params"]}
    weights = {name: layer_weight(module) for name, module in layers.items()}
    missing = [name for name, weight in weights.items() if id(weight) not in held]
    if len(missing) == len(layers):
        raise ValueError(
            f"`optimizer` (a {kind}) holds no weight of the pruned layers, such as that of "
            f"{next(iter(layers))}: build it from the parameters of the model that is pruned"
        )
    trained = [name for name in missing if weights[name].requires_grad]
    if trained:
        _LOGGER.warning(
            "`optimizer` (a %s) holds the weights of %d of the %d pruned layers, not that of %s: "
            "state that another optimizer keeps of them is not zeroed",
            kind,
            len(layers) - len(missing),
            len(layers),
            first_few(trained),
        )
