"""Whether a pruner's layers are still those of the model that is trained."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping

import torch
from torch import nn

from starfire_prune.engine.obstacles import sharing_modules
from starfire_prune.engine.progress import Progress
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight, prunable_layers, weight_versions

__all__ = ["Attached"]

_LOGGER = logging.getLogger(__name__)
_ATTACHED: weakref.WeakSet[Attached] = weakref.WeakSet()  # those of all pruners


class Attached:
    """Looks for layers that were replaced, shared or left untrained after a pruner was built.

    Args:
        model: The model without wrappers.
        modules: The pruned layers by name.
        progress: Where their pruning stands.

    Raises:
        PruningError: If another pruner of one of the layers has not finished.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], progress: Progress
    ) -> None:
        _refuse_second(modules)
        self._model, self._modules, self._progress = model, dict(modules), progress
        _ATTACHED.add(self)
        self._versions: list[int] | None = None  # torch's counts of changes, as the era began

    @property
    def modules(self) -> list[nn.Module]:
        """The pruned layers."""
        return list(self._modules.values())

    @property
    def is_unfinished(self) -> bool:
        """Whether the pruning of the layers goes on."""
        return not self._progress.is_detached and self._progress.state.phase != "fixed"

    def check_update(self) -> None:
        """Raise PruningError if an update can't change the weights of the layers.

        That is in inference mode, and if a weight is not a parameter of its layer any more.
        """
        if torch.is_inference_mode_enabled():
            raise PruningError(
                "step() changes weights, which torch.inference_mode() would leave unfit for "
                "training: call it outside, after optimizer.step()"
            )
        self._check_parameters()

    def _check_parameters(self) -> None:
        for name, module in self._modules.items():
            if "weight" not in module._parameters and "weight_mask" not in module._buffers:
                raise PruningError(
                    f"layer {name} has no parameter `weight` any more: it is computed since a "
                    f"parametrization such as weight_norm was added, and no mask holds in it. Add "
                    f"it before the pruner is built, and leave {name} out by `exclude`"
                )

    def check(self) -> None:
        """Raise PruningError, with its name, for a layer that is replaced, or shares its weight."""
        self._check_parameters()
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


def _refuse_second(modules: Mapping[str, nn.Module]) -> None:
    """Raise PruningError if a pruner that has not finished prunes one of the modules, too."""
    for other in _ATTACHED:
        if not other.is_unfinished:
            continue
        pruned = set(map(id, other.modules))
        name = next((name for name, module in modules.items() if id(module) in pruned), None)
        if name is not None:
            raise PruningError(
                f"layer {name} is pruned by another Pruner, which has not finished: use that one, "
                f"or call its remove() before building another"
            )
