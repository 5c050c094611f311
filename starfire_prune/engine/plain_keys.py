"""Plain names in the state dicts of a model that a pruner prunes.

Within the era a pruned layer holds `weight_orig` and `weight_mask`, as `torch.nn.utils.prune` names
them. Its state dict has `weight` in their place, so that a checkpoint of any phase loads into the
model in any other phase; the masks are part of the pruner's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["add_plain_keys", "remove_plain_keys"]


def add_plain_keys(module: nn.Module) -> None:
    """Give the state dict of a module with a pruning hook the names of the unpruned module.

    Copies of the module have plain names, too.
    """
    if not _keys_of(module._state_dict_hooks, _rename_saved):
        module.register_state_dict_post_hook(_rename_saved)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_rename_loaded)  # type: ignore[no-untyped-call]


def remove_plain_keys(module: nn.Module) -> None:
    """Undo `add_plain_keys`, so that later hooks of `torch.nn.utils.prune` have torch's names."""
    for key in _keys_of(module._state_dict_hooks, _rename_saved):
        del module._state_dict_hooks[key]
    for key in _keys_of(module._load_state_dict_pre_hooks, _rename_loaded):
        del module._load_state_dict_pre_hooks[key]


def _keys_of(hooks: dict[int, Any], function: Callable[..., None]) -> list[int]:
    return [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is function]


@torch.no_grad()
def _rename_saved(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Name `weight_orig` `weight` in the same place, and leave out the mask.

    The tensor is the live one, as for every parameter: moving averages write into it. Its pruned
    values, which a forward pass doesn't read, are zeroed, so that a dense model computes the same.
    """
    weight, mask = module._parameters.get("weight_orig"), module._buffers.get("weight_mask")
    if weight is None or mask is None:
        return
    weight.mul_(mask)
    items = list(state.items())
    state.clear()
    for key, value in items:
        if key == f"{prefix}weight_orig":
            state[f"{prefix}weight"] = value
        elif key != f"{prefix}weight_mask":
            state[key] = value


def _rename_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load `weight` as `weight_orig`; the module's mask is kept."""
    if module._parameters.get("weight_orig") is not None and f"{prefix}weight" in state:
        state[f"{prefix}weight_orig"] = state.pop(f"{prefix}weight")
        state.setdefault(f"{prefix}weight_mask", module._buffers["weight_mask"])
