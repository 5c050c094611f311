"""Helpers for modules: wrappers, names and weights of their layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

__all__ = [
    "classifier_keys",
    "clean_name",
    "copied_module",
    "counted_weights",
    "effective_weight",
    "is_depthwise",
    "layer_weight",
    "model_bytes",
    "named_modules_with_duplicates",
    "other_weights",
    "prunable_layers",
    "unwrap",
    "weight_key",
    "weight_versions",
]

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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


def counted_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights of all convolutions, also transposed ones, and of all linear maps.

    The projections of the input of `nn.MultiheadAttention` are linear maps, too.

    Yields:
        The weight's clean name (for a layer's `weight` that of the layer), the module that holds
        it, and its name there.
    """
    for name, module in unwrap(model).named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            yield clean_name(name), module, "weight"
        elif isinstance(module, nn.MultiheadAttention):
            for key in _PROJECTIONS:
                if isinstance(getattr(module, key, None), Tensor):
                    yield weight_key(clean_name(name), key), module, key


def other_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """The weight matrices that `counted_weights` doesn't have, such as embeddings.

    Yields:
        The clean name of each parameter with two dimensions or more that are larger than 1, the
        module that holds it, and its number of weights.
    """
    seen = {
        id(parameter)
        for _, module, key in counted_weights(model)
        for parameter in _parameters_of(module, key)
    }
    for prefix, module in unwrap(model).named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, UninitializedParameter):
                continue
            if id(parameter) in seen or sum(size > 1 for size in parameter.shape) < 2:
                continue
            seen.add(id(parameter))
            plain = key.removesuffix("_orig")
            name = plain if f"{plain}_mask" in module._buffers else key
            yield weight_key(clean_name(prefix), name), module, parameter.numel()


def _parameters_of(module: nn.Module, key: str) -> Iterator[nn.Parameter | None]:
    """The parameters from which a module has the weight `key`, also if it is computed."""
    for name, parameter in module._parameters.items():
        if name == key or name.startswith(f"{key}_"):  # weight_orig, weight_g, weight_v
            yield parameter
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and key in parametrizations:
        yield from parametrizations[key].parameters()


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


def weight_versions(modules: Iterable[nn.Module]) -> list[int]:
    """How often the weight of each layer has been changed in place, as torch counts."""
    return [layer_weight(module)._version for module in modules]


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


def copied_module(module: ModuleT) -> ModuleT:
    """A deep copy, also of modules that hold computed tensors, which `copy.deepcopy` refuses.

    Such are the masked weights of torch's own pruning, and the caches of some attention layers.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        for value in vars(part).values():
            held = value.values() if isinstance(value, dict) else (value,)
            for tensor in held:
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo)


def weight_key(name: str, parameter: str = "weight") -> str:
    """The name of a module's parameter in the model's state; the module may be the model itself.

    Example:
        >>> weight_key("layer1.0"), weight_key("")
        ('layer1.0.weight', 'weight')
    """
    return f"{name}.{parameter}" if name else parameter
