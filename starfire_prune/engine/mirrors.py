"""Mirrors: copies of a model, such as weight averages, that follow its pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from starfire_prune.engine.plain_keys import add_plain_keys, remove_plain_keys
from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.engine.state import Phase
from starfire_prune.methods.base import find_hook, make_permanent
from starfire_prune.utils.modules import layer_weight, prunable_layers, weight_key

__all__ = ["mirror_of", "sync_mirror"]


def mirror_of(
    model: nn.Module, layers: Mapping[str, PrunedLayer], known: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """The layers of a copy that correspond to pruned layers, by name.

    Args:
        model: The copy, also wrapped by DDP or `torch.compile`.
        layers: The pruned layers by name.
        known: The modules that are pruned or mirrored already.

    Raises:
        ValueError: If the copy lacks a pruned layer or has another shape there, and if it is the
            pruned model itself or mirrored already.
    """
    modules = prunable_layers(model)
    for name, layer in layers.items():
        if name not in modules or layer_weight(modules[name]).shape != layer.shape:
            raise ValueError(
                f"the mirrored model has no layer {name} with a weight of shape "
                f"{tuple(layer.shape)}"
            )
    mirror = {name: modules[name] for name in layers}
    if set(map(id, mirror.values())).intersection(map(id, known)):
        raise ValueError(
            "the model is the pruned one itself, or mirrored already: mirror a copy, once"
        )
    return mirror


@torch.no_grad()
def sync_mirror(
    mirror: Mapping[str, nn.Module],
    layers: Mapping[str, PrunedLayer],
    masks: Mapping[str, Tensor],
    phase: Phase,
) -> None:
    """Bring a mirror's layers to the hooks and masks that the model's layers have in the era or
    after it.

    Args:
        mirror: The mirror's layers by name.
        layers: The layers to bring up to date, by name.
        masks: The model's masks by parameter name.
        phase: The present phase, not `"dense"`.
    """
    for name, layer in layers.items():
        module, mask = mirror[name], masks[weight_key(name)]
        weight, hook = layer_weight(module), find_hook(module, "weight")[1]
        if phase == "fixed":
            if hook is not None:
                make_permanent(module, "weight")
                remove_plain_keys(module)
            weight.mul_(mask.to(weight.device))
        elif hook is None:
            layer.method_at(0.0).register(module, "weight", mask.to(weight.device))
            add_plain_keys(module)
        else:
            module.get_buffer("weight_mask").copy_(mask)
