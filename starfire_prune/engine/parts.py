"""The names of pruned layers within a part of the pruned model, such as a Lightning module's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from starfire_prune.utils.modules import layer_weight, prunable_layers

__all__ = ["names_within"]


def names_within(
    model: nn.Module,
    copies: Iterable[Mapping[str, nn.Module]],
    shapes: Mapping[str, torch.Size],
) -> dict[str, str]:
    """The names that pruned layers have within a model, by the names that the pruner has for them.

    The model is the pruned one, a mirror, a part of these that holds all pruned layers, a module
    that contains them, or a copy with the pruned model's names.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`.
        copies: The pruned layers of the pruned model and of each mirror, by name.
        shapes: The shapes of their weights by name.

    Raises:
        ValueError: If the model lacks a pruned layer, or has another shape there.

    Example:
        >>> inner = nn.Sequential(nn.Linear(4, 2))
        >>> layers = {"model.0": inner[0]}
        >>> names_within(inner, [layers], {"model.0": inner[0].weight.shape})
        {'model.0': '0'}
    """
    own = prunable_layers(model)
    names = {id(module): name for name, module in own.items()}
    for layers in copies:
        found = {name: names[id(module)] for name, module in layers.items() if id(module) in names}
        if len(found) == len(layers):
            return found
        if found:
            missing = next(name for name in layers if name not in found)
            raise ValueError(
                f"the pruned layer {missing} is not part of the {type(model).__name__} that is "
                f"passed with its pruner: pass the model that the pruner prunes, or a part of it "
                f"that holds all pruned layers"
            )
    for name, shape in shapes.items():
        if name not in own or layer_weight(own[name]).shape != shape:
            raise ValueError(
                f"the {type(model).__name__} that is passed with a pruner has no layer {name} with "
                f"a weight of shape {tuple(shape)}: pass the model that the pruner prunes, or a "
                f"part of it that holds all pruned layers"
            )
    return {name: name for name in shapes}
