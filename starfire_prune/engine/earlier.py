"""A notice for models that carry a finished pruning when a pruner is built for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.utils.modules import layer_weight
from starfire_prune.utils.text import first_few

__all__ = ["earlier_pruning", "log_earlier_pruning"]

_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def earlier_pruning(layers: Iterable[PrunedLayer]) -> dict[str, float]:
    """The layers whose zeros are already those of a finished pruning, with their shares of zeros.

    These are the layers in which the layer's method at its target would prune nothing, because at
    least so many of its units, such as kernels, only hold zeros. Layers of zeros only are left out,
    as networks are initialized by them.
    """
    found = {}
    for layer in layers:
        weight = layer_weight(layer.module).detach()
        if weight.is_meta:
            continue
        kept = weight != 0
        zeros = kept.numel() - int(kept.sum())
        if not 0 < zeros < kept.numel() or not bool(weight.isfinite().all()):
            continue
        mask = layer.method_at(1.0).compute_mask(weight, default_mask=kept)
        if torch.equal(mask.bool() & kept, kept):
            found[layer.name] = zeros / kept.numel()
    return found


def log_earlier_pruning(layers: Iterable[PrunedLayer]) -> None:
    """Log a warning if layers carry a finished pruning before the first update."""
    layers = list(layers)
    found = earlier_pruning(layers)
    if not found:
        return
    _LOGGER.warning(
        "%d of the %d layers to prune hold the zeros of a finished pruning: %s. To continue its "
        "training, load the pruner's state by load_state_dict; without it these zeros are trained "
        "as other weights until the era. If only its dense epochs are to be left out, call "
        "skip_dense(epochs). If it is to be pruned again, ignore this",
        len(found),
        len(layers),
        first_few([f"{name} ({share:.1%})" for name, share in found.items()], 5),
    )
