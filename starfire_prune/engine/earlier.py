"""Models that carry a finished pruning when a pruner begins: its state was not loaded, perhaps."""

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


class EarlierPruning:
    """Looks for the zeros of a finished pruning in the weights that a pruner begins with.

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
            PruningError: If half of the layers or more carry a finished pruning.
        """
        if not self._shares:
            return
        found = {name: share for name, share in self._shares.items() if share}
        text = (
            f"{len(found)} of the {len(self._layers)} layers to prune held the zeros of a finished "
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
    """The share of zeros of a layer that its method at its target would not prune any further.

    It is 0.0 for other layers, and for layers of zeros only, as networks are initialized by them.
    """
    weight = layer_weight(layer.module).detach()
    if weight.is_meta:
        return 0.0
    kept = weight != 0
    zeros = kept.numel() - int(kept.sum())
    if not 0 < zeros < kept.numel() or not bool(weight.isfinite().all()):
        return 0.0
    mask = layer.method_at(1.0).compute_mask(weight, default_mask=kept)
    return zeros / kept.numel() if torch.equal(mask.bool() & kept, kept) else 0.0
