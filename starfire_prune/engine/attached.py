"""Whether a pruner's layers are still those of the model that is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from starfire_prune.engine.obstacles import sharing_modules
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight, prunable_layers, weight_versions

__all__ = ["Attached"]

_LOGGER = logging.getLogger(__name__)


class Attached:
    """Looks for layers that were replaced, shared or left untrained after a pruner was built.

    Args:
        model: The model without wrappers.
        modules: The pruned layers by name.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._model, self._modules = model, dict(modules)
        self._versions: list[int] | None = None  # torch's counts of changes, as the era began

    def check(self) -> None:
        """Raise PruningError, with its name, for a layer that is replaced, or shares its weight."""
        present, users = prunable_layers(self._model), sharing_modules(self._model)
        for name, module in self._modules.items():
            if present.get(name) is not module:
                raise PruningError(
                    f"layer {name} of the model was replaced after the pruner was built, so that "
                    f"it is not pruned: build the pruner again, after the last replacement"
                )
            others = [other for other in users.get(id(layer_weight(module)), []) if other != name]
            if others:
                raise PruningError(
                    f"layer {name} has shared its weight with {', '.join(others)} since the pruner "
                    f"was built, where its mask does not hold: leave it out by `exclude`"
                )

    def begin_era(self) -> None:
        """Check the layers and note the weights at the era's first update, or after a resume."""
        if self._versions is None:
            self.check()
            self._versions = weight_versions(self._modules.values())

    def end_era(self, updates: int) -> None:
        """Check the layers, and warn if no weight has changed, as when a copy was trained.

        Args:
            updates: Number of updates of the era.
        """
        self.check()
        if updates > 1 and self._versions == weight_versions(self._modules.values()):
            _LOGGER.warning(
                "no weight of the pruned layers has changed within the era: if a copy of the model "
                "was trained (by deepcopy or pickle), it is not pruned; copy its pruner with it"
            )
