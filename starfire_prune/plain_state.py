"""A pruned model's weights and masks under the names of the dense model, and masks put on again."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starfire_prune.layers import clean_name, layer_weight, prunable_layers, unwrap
from starfire_prune.mask_method import MaskMethod

if TYPE_CHECKING:
    from starfire_prune.engine import Pruner

__all__ = ["apply_masks", "known_masks", "masks_of_zeros", "plain_state_dict"]


class KeptMask(MaskMethod):
    """A mask that is given once and stays, until another method on top tightens it."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """The earlier mask, or all of it."""
        ones = torch.ones_like(t, dtype=torch.bool)
        return ones if default_mask is None else default_mask.bool()

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """Nothing ever goes."""
        return ()


def plain_state_dict(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A pruned model's state under the names of the dense one: `weight`, no `weight_orig`.

    Tensors are copies in contiguous memory on the CPU, and pruned weights are +0.0. So is every
    zero of a convolution or linear layer of which nothing tells what is pruned.

    Args:
        model: in any phase; wrappers are taken off.
        masks: of pruned weights by parameter name, bool, True = kept, where no hook has them.
    """
    model = unwrap(model)
    hooks = _hooked_masks(model)
    known = {**(masks or {}), **hooks}
    hooked = {f"{name}_orig": name for name in hooks}
    hidden = {f"{name}_mask" for name in hooks}
    own = {clean_name(name): value for name, value in model.state_dict().items()}
    layers = set(_prunable_weights(model))
    return {
        name: _plain(value, known.get(name), name in layers)
        for name, value in ((hooked.get(key, key), own[key]) for key in own if key not in hidden)
    }


def known_masks(model: nn.Module, pruner: Pruner | None = None) -> dict[str, Tensor]:
    """The masks of a model's hooks and of its pruner, bool on the CPU, by parameter name.

    Args:
        model: that the pruner prunes, or mirrors.
        pruner: all of whose layers have masks, of nothing but True in the dense phase.
    """
    masks = _hooked_masks(unwrap(model))
    if pruner is not None:
        own, layers = pruner.masks(), prunable_layers(model)
        for name in pruner.layers:
            key = f"{name}.weight" if name else "weight"
            ones = torch.ones(layer_weight(layers[name]).shape, dtype=torch.bool)
            masks[key] = own.get(key, ones).bool().cpu()
    return masks


def masks_of_zeros(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks by which +0.0 is pruned, of the convolutions and linear layers that have any.

    Args:
        model: whose layers these are.
        state: its plain state.
    """
    names = _prunable_weights(unwrap(model))
    masks = {name: state[name] != 0 for name in names if name in state}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Put masks on a model, so that it trains on with the weights that they keep.

    Modifies model in place: each parameter is pruned as by `ck_structured` and the other functions
    of this package, with `weight_orig`, `weight_mask` and one hook of `torch.nn.utils.prune`.
    Whatever the optimizer does, no pruned weight comes back. `prune.remove` makes it permanent,
    `save_pruned` writes it as it is, and a further method only takes more. Build the optimizer
    first, or from the parameters as they then are: they stay the same objects.

    Args:
        model: dense, such as from `load_pruned_model`.
        masks: bool by parameter name (`layer1.0.conv1.weight`), True = kept, as of `load_masks`.

    Returns:
        `model`.

    Raises:
        ValueError: for a name that the model has not, a parameter that is pruned already, and a
            mask of another shape or dtype. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = apply_masks(model, {"0.weight": torch.tensor([[True, False]])})
        >>> list(dict(model.named_parameters()))
        ['0.weight_orig', '0.bias']
    """
    modules = dict(_modules(unwrap(model)))
    owners = {name: modules.get(name.rpartition(".")[0]) for name in masks}
    for name, module in owners.items():
        _check_mask(name, module, masks[name], model)
    merged: dict[tuple[nn.Module, str], Tensor] = {}  # a shared module has several names
    for name, module in owners.items():
        if module is not None:
            key = module, name.rpartition(".")[2]
            merged[key] = masks[name] & merged.get(key, masks[name])
    for (module, parameter), mask in merged.items():
        KeptMask().register(module, parameter, mask)
    return model


def _check_mask(name: str, module: nn.Module | None, mask: Tensor, model: nn.Module) -> None:
    own = {} if module is None else module._parameters
    parameter = own.get(name.rpartition(".")[2])
    if parameter is None:
        if f"{name.rpartition('.')[2]}_orig" in own:
            raise ValueError(f"{name} is pruned already: make that permanent by prune.remove")
        names = [clean_name(key) for key, _ in unwrap(model).named_parameters()]
        near = difflib.get_close_matches(name, names, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"the model has no parameter {name!r}{hint}")
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name}, {mask.dtype} of shape {tuple(mask.shape)}, must be bool of the "
            f"parameter's shape, {tuple(parameter.shape)}"
        )


def _hooked_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of parameters that a hook of `torch.nn.utils.prune` prunes, by plain name."""
    return {
        f"{prefix}.{name}" if prefix else name: mask.bool().contiguous().cpu()
        for prefix, module in _modules(model)
        for name, mask in _masks_of(module)
    }


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, a shared one under each of its names, as a state dict has them."""
    modules = model.named_modules(remove_duplicate=False)
    return ((clean_name(name), module) for name, module in modules)


def _prunable_weights(model: nn.Module) -> list[str]:
    layers = set(prunable_layers(model).values())
    return [
        f"{name}.weight" if name else "weight"
        for name, module in _modules(model)
        if module in layers
    ]


def _masks_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for buffer, mask in module._buffers.items():
        name = buffer.removesuffix("_mask")
        if name != buffer and mask is not None and f"{name}_orig" in module._parameters:
            yield name, mask


def _plain(value: Tensor, mask: Tensor | None, is_weight: bool) -> Tensor:
    # Filled rather than multiplied: all bits of what is kept stay, and -0.0 and NaN don't
    plain = value.detach().clone(memory_format=torch.contiguous_format).cpu()
    if mask is not None:
        plain.masked_fill_(~mask.bool().cpu(), 0.0)
    elif is_weight:
        plain.masked_fill_(plain == 0, 0.0)
    return plain
