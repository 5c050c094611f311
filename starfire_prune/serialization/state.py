"""A model's state in plain form: weights and masks of a pruned model, and tied weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starfire_prune.serialization.codec import bits_of
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import (
    clean_name,
    effective_weight,
    named_modules_with_duplicates,
    prunable_layers,
    unwrap,
    weight_key,
)
from starfire_prune.utils.text import first_few

if TYPE_CHECKING:
    from starfire_prune.engine.pruner import Pruner

__all__ = ["check_tied", "describe_mismatch", "known_masks", "masks_of_zeros", "plain_state_dict"]


def plain_state_dict(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A pruned model's state under the names of the dense model: `weight` for `weight_orig`.

    The tensors are contiguous copies on the CPU, in which pruned weights are +0.0. Without a mask
    all zeros of a convolution or linear layer count as pruned.

    Args:
        model: A model in any phase; wrappers are removed.
        masks: Masks of pruned weights by parameter name, bool, True = kept, in addition to those of
            hooks.
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
        model: The model that the pruner prunes, or mirrors, or a part of it with all its layers.
        pruner: The pruner; all its layers get masks, which are all True in the dense phase.

    Raises:
        PruningError: If the model's weights are not zero where the pruner prunes.
    """
    masks = _hooked_masks(unwrap(model))
    if pruner is not None:
        own = pruner.masks()
        for name, within in pruner.names_in(model).items():
            ones = torch.ones(pruner.layers[name].shape, dtype=torch.bool)
            masks[weight_key(within)] = own.get(weight_key(name), ones).bool().cpu()
        _check_pruned(model, masks)
    return masks


def _check_pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise PruningError if a model computes with weights that the masks would remove."""
    for name, module in prunable_layers(model).items():
        mask = masks.get(weight_key(name))
        alive = 0 if mask is None else int((effective_weight(module).cpu()[~mask] != 0).sum())
        if alive:
            raise PruningError(
                f"layer {name}: {alive} weights of the model that is passed are not zero where its "
                f"pruner's mask prunes: pass the model that the pruner prunes, or let a copy "
                f"follow it from the start, by pruner.mirror(copy)"
            )


def masks_of_zeros(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks in which every +0.0 is pruned, of the convolutions and linear layers with zeros.

    Args:
        model: The model.
        state: Its plain state.
    """
    names = _prunable_weights(unwrap(model))
    masks = {name: state[name] != 0 for name in names if name in state}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def check_tied(targets: Mapping[str, Tensor], content: Callable[[str], Tensor]) -> None:
    """Check that tensors that share memory, such as tied weights, can hold what they are to hold.

    Args:
        targets: A model's tensors by name; they are not changed.
        content: Returns what the tensor of that name is to hold, in its shape; it is called only
            for tensors that share their memory.

    Raises:
        ValueError: If writing one tensor would overwrite the content of another; it names both.
    """
    sharing = defaultdict(list)
    for name, target in targets.items():
        if target.numel():
            sharing[target.device, target.untyped_storage().data_ptr()].append(name)
    for names in (names for names in sharing.values() if len(names) > 1):
        twins = copy.deepcopy([targets[name].detach() for name in names])  # they share memory, too
        contents = [content(name).to(twin) for name, twin in zip(names, twins, strict=True)]
        for twin, wanted in zip(twins, contents, strict=True):
            twin.copy_(wanted)
        for name, twin, wanted in zip(names, twins, contents, strict=True):
            if not torch.equal(bits_of(twin.contiguous()), bits_of(wanted.contiguous())):
                raise ValueError(
                    f"tensors {name!r} and {names[-1]!r} share memory in the model but differ, for "
                    f"example because only one of them was pruned; load them into a model that "
                    f"does not share them"
                )


def describe_mismatch(
    own: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]
) -> str | None:
    """How the tensors of a file differ from a model's, as the predicate of a sentence.

    Args:
        own: Shapes of the model's tensors by name.
        held: Shapes of the file's tensors by name.

    Returns:
        The text, or None if names and shapes are the same.

    Example:
        >>> describe_mismatch({"a": (2,), "b": (1,)}, {"a": (3,)})
        'lacks b and has other shapes: a (3,) instead of (2,)'
    """
    shared = [name for name in own if name in held]
    parts = {
        "lacks": [name for name in own if name not in held],
        "also holds": [repr(name) for name in held if name not in own],
        "has other shapes:": [
            f"{name} {held[name]} instead of {own[name]}"
            for name in shared
            if held[name] != own[name]
        ],
    }
    return (
        " and ".join(f"{what} {first_few(names)}" for what, names in parts.items() if names) or None
    )


def _hooked_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of all parameters pruned by `torch.nn.utils.prune`, by plain name."""
    return {
        weight_key(prefix, name): mask.bool().contiguous().cpu()
        for prefix, module in named_modules_with_duplicates(model)
        for name, mask in _masks_of(module)
    }


def _prunable_weights(model: nn.Module) -> list[str]:
    layers = set(prunable_layers(model).values())
    return [
        weight_key(name)
        for name, module in named_modules_with_duplicates(model)
        if module in layers
    ]


def _masks_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for buffer, mask in module._buffers.items():
        name = buffer.removesuffix("_mask")
        if name != buffer and mask is not None and f"{name}_orig" in module._parameters:
            yield name, mask


def _plain(value: Tensor, mask: Tensor | None, is_weight: bool) -> Tensor:
    # Filled, not multiplied: kept weights keep all bits, and pruned -0.0 and NaN become +0.0
    plain = value.detach().clone(memory_format=torch.contiguous_format).cpu()
    if mask is not None:
        plain.masked_fill_(~mask.bool().cpu(), 0.0)
    elif is_weight:
        plain.masked_fill_(plain == 0, 0.0)
    return plain
