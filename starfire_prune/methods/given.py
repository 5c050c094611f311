"""Masks that are given instead of computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from starfire_prune.methods.base import MaskMethod
from starfire_prune.utils.modules import clean_name, named_modules_with_duplicates, unwrap
from starfire_prune.utils.text import did_you_mean

__all__ = ["apply_masks"]


@dataclasses.dataclass(eq=False)
class KeptMask(MaskMethod):
    """A mask that is given once and kept until another method on top tightens it."""

    amount: float = 0.0

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """The earlier mask, or all of it."""
        ones = torch.ones_like(t, dtype=torch.bool)
        return ones if default_mask is None else default_mask.bool()

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """No unit is ever pruned."""
        return ()


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Prune a model by given masks, so that it can train on with the weights that they keep.

    Modifies model in place: each parameter is pruned as by `ck_structured` and the other functions
    of this package, with `weight_orig`, `weight_mask` and one hook of `torch.nn.utils.prune`.
    Pruned weights stay pruned under any optimizer. `prune.remove` makes the pruning permanent,
    `save_pruned` writes the model as it is, and a further method only prunes more. The parameters
    remain the same objects, so the optimizer may be built before or afterwards.

    Args:
        model: Dense model, such as from `load_pruned_model`.
        masks: Bool masks by parameter name (`layer1.0.conv1.weight`), True = kept, such as from
            `load_masks`.

    Returns:
        `model`.

    Raises:
        ValueError: For a name that the model doesn't have, a parameter that is pruned already, and
            a mask of another shape or dtype. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = apply_masks(model, {"0.weight": torch.tensor([[True, False]])})
        >>> list(dict(model.named_parameters()))
        ['0.weight_orig', '0.bias']
    """
    modules = dict(named_modules_with_duplicates(unwrap(model)))
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
        raise ValueError(f"the model has no parameter {name!r}{did_you_mean(name, names)}")
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name}, {mask.dtype} of shape {tuple(mask.shape)}, must be bool of the "
            f"parameter's shape, {tuple(parameter.shape)}"
        )
