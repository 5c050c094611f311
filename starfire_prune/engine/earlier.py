"""Models that carry an earlier pruning when a pruner begins: its state was not loaded, perhaps."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from starfire_prune.engine.loading import notify_of_loads
from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight
from starfire_prune.utils.text import first_few

__all__ = ["EarlierPruning"]

_LOGGER = logging.getLogger(__name__)
_LEAST_SHARE = 0.01  # dense weights are hardly ever zero; masks of an era soon prune more


class EarlierPruning:
    """Looks for the zeros of an earlier pruning in the weights that a pruner begins with.

    They are looked for at once, and in what is loaded until `finish`: the first update changes
    them. Trainers that resume load the model by themselves; without the pruner's state it would
    train as a dense one.

    Args:
        layers: The layers that are pruned.
    """

    def __init__(self, layers: Iterable[PrunedLayer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._shares = {name: _pruned_share(layer) for name, layer in self._layers.items()}
        self._hooks = [
            notify_of_loads(layer.module, self._after_load, name)
            for name, layer in self._layers.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": []}

    def _after_load(self, name: str) -> None:
        self._shares[name] = _pruned_share(self._layers[name])

    def dismiss(self) -> None:
        """Forget what was found, and look no further."""
        self._shares.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def finish(self) -> None:
        """Raise an error for what was found, or look no further; fewer layers are only logged.

        Raises:
            PruningError: If half of the layers or more carry an earlier pruning.
        """
        if not self._shares:
            return
        found = {name: share for name, share in self._shares.items() if share}
        text = (
            f"{len(found)} of the {len(self._layers)} layers to prune held zeros of an earlier "
            f"pruning before the first update: "
            f"{first_few([f'{name} ({share:.1%})' for name, share in found.items()], 5)}"
        )
        if found and 2 * len(found) >= len(self._layers):
            raise PruningError(
                f"{text}; to continue that training, load the pruner's state by "
                f"pruner.load_state_dict(state); to prune the model once more, build the pruner by "
                f"Pruner(..., prune_again=True)"
            )
        if found:
            _LOGGER.warning("%s; they are trained as other weights until the era", text)
        self.dismiss()


@torch.no_grad()
def _pruned_share(layer: PrunedLayer) -> float:
    """The share of zeros of a layer's weight if it is at least a percent, else 0.0.

    It is 0.0 as well for layers of zeros only, as networks are initialized by them.
    """
    weight = layer_weight(layer.module).detach()
    if weight.is_meta:
        return 0.0
    share = int((weight == 0).sum()) / weight.numel() if weight.numel() else 0.0
    return share if _LEAST_SHARE <= share < 1 else 0.0
