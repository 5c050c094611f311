"""Helpers for modules: wrappers, names and weights of their layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = [
    "classifier_keys",
    "clean_name",
    "effective_weight",
    "is_depthwise",
    "layer_weight",
    "model_bytes",
    "named_modules_with_duplicates",
    "prunable_layers",
    "unwrap",
    "weight_key",
]


def model_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, including those that are not saved."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All convolutions, except transposed ones, and linear layers by their clean names."""
    return {
        clean_name(name): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and not isinstance(module, _ConvTransposeNd)
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and `torch.compile` wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def layer_weight(module: nn.Module) -> nn.Parameter:
    """The parameter of a layer's weight, which is named `weight_orig` while it is pruned."""
    parameters = module._parameters
    weight = parameters.get("weight")
    if "weight_mask" in module._buffers:  # spectral_norm, too, has a `weight_orig`
        weight = parameters.get("weight_orig", weight)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no parameter `weight` to prune")
    return weight


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter as a forward pass uses it, detached: masked if a hook prunes it, and never stale.

    It may also be computed, for example by `weight_norm`.
    """
    mask = module._buffers.get(f"{name}_mask")
    if mask is None:
        return cast(Tensor, getattr(module, name)).detach()
    return cast(Tensor, module._parameters[f"{name}_orig"]).detach() * mask


def clean_name(name: str) -> str:
    """A module's name without the parts that `torch.compile` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution with one input channel per group."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """The state dict keys of a timm model's classifier layers; none for other models."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return tuple(key for key in model.state_dict() if key.startswith(prefixes))


def named_modules_with_duplicates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their clean names; a shared module appears under each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return ((clean_name(name), module) for name, module in modules)


def weight_key(name: str, parameter: str = "weight") -> str:
    """The name of a module's parameter in the model's state; the module may be the model itself.

    Example:
        >>> weight_key("layer1.0"), weight_key("")
        ('layer1.0.weight', 'weight')
    """
    return f"{name}.{parameter}" if name else parameter
