"""Whether a pruner's saved state is of the same settings and model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from starfire_prune.engine.settings import Pruning

__all__ = ["STATE_VERSION", "check_state"]


STATE_VERSION = 2


def check_state(
    state: Mapping[str, Any],
    pruning: Pruning,
    updates_per_epoch: int,
    shapes: Mapping[str, torch.Size],
) -> None:
    """Refuse a state that a pruner can't go on from.

    Args:
        state: as `Pruner.state_dict` gives it.
        pruning: the pruner's settings.
        updates_per_epoch: of the pruner.
        shapes: of the weights that it prunes, by parameter name.

    Raises:
        ValueError: if the state is of other settings, another model or another version.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the pruner's state has version {state.get('version')!r}, this package reads "
            f"{STATE_VERSION}"
        )
    saved, own = state["pruning"], pruning.model_dump(mode="json")
    differing = [key for key in own if saved.get(key) != own[key]]
    if state["updates_per_epoch"] != updates_per_epoch:
        differing.append("updates_per_epoch")
    if differing:
        raise ValueError(
            f"the pruner's state was saved under other settings of {', '.join(differing)}: "
            f"resume with the recipe, data and batch size of the run that saved it"
        )
    if state["phase"] != "dense":
        _check_masks(state["masks"], shapes)


def _check_masks(masks: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    for key, shape in shapes.items():
        mask = masks.get(key)
        if mask is None or mask.shape != shape:
            raise ValueError(
                f"the pruner's state has no mask of shape {tuple(shape)} for layer "
                f"{key.removesuffix('weight').removesuffix('.')}: it is of another model"
            )
    unknown = sorted(set(masks) - set(shapes))
    if unknown:
        raise ValueError(
            f"the pruner's state has a mask for {unknown[0]}, which this pruner does not "
            f"prune: it is of another model"
        )
