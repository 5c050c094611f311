"""What a quantized module was made from, kept with it so that a file can say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn

from starfire_prune.utils.errors import QuantizationError
from starfire_prune.utils.modules import (
    copied_module,
    effective_weight,
    prunable_layers,
    weight_key,
)

__all__ = [
    "Method",
    "Origin",
    "is_quantized",
    "model_on_meta",
    "origin_of",
    "pruned_weights",
    "set_origin",
]


Method = Literal["post_training", "training"]
_KEY = "starfire_prune.origin"  # in the module's `meta`, which copies keep


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a quantized module was made from.

    Attributes:
        model: The float model, dense, on the device `meta`: its structure without its weights.
        masks: Masks of the pruned weights by parameter name, bool, True = kept.
        input_shape: Shape of an image.
        images: Number of images that the scales were calibrated on; 0 if they were trained.
        method: Whether they were calibrated after training, or trained.
        versions: Versions of the packages that did it.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    input_shape: tuple[int, ...]
    images: int
    method: Method
    versions: Mapping[str, str]


def origin_of(module: nn.Module) -> Origin:
    """The origin of a quantized module or of a copy of one.

    Raises:
        QuantizationError: For other modules.
    """
    origin = module.meta.get(_KEY) if isinstance(module, fx.GraphModule) else None
    if not isinstance(origin, Origin):
        raise QuantizationError(
            f"{type(module).__name__} is not a quantized model: pass what "
            f"`starfire_prune.quantization.quantize` returns"
        )
    return origin


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized model or a copy of one."""
    return isinstance(module, fx.GraphModule) and _KEY in module.meta


def set_origin(module: fx.GraphModule, origin: Origin) -> fx.GraphModule:
    """Keep the origin with a quantized module, and return the module."""
    module.meta[_KEY] = origin
    return module


def pruned_weights(model: nn.Module) -> dict[str, Tensor]:
    """Masks of the weights that are zero in a dense model's convolutions and linear layers.

    Returns:
        Bool tensors by parameter name, True = kept, of the layers with zeros.
    """
    layers = prunable_layers(model).items()
    masks = {weight_key(name): (effective_weight(layer) != 0).cpu() for name, layer in layers}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def model_on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without its tensors' content."""
    return copied_module(model).to(torch.device("meta"))
