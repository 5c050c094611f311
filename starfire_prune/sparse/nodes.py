"""Nodes of exported graphs: their shapes, arguments and users."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from starfire_prune.sparse.quantized import Constant

__all__ = ["ALIASES", "SAME", "Constants", "argument_of", "count_users", "is_image", "shape_of"]


aten = torch.ops.aten
SAME = (aten.clone.default, aten.alias.default)
ALIASES = (operator.getitem, aten.view.default, *SAME)  # their value is the source's
Constants = Mapping[fx.Node, Constant]


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor; empty if its value isn't a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def argument_of(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of a node's operation, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_image(node: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether it is a batch of images or vectors of a dtype on the CPU."""
    shape = shape_of(node)
    if len(shape) not in (2, 4) or 0 in shape:
        return False
    value: Tensor = node.meta["val"]
    return value.dtype == dtype and value.device.type == "cpu"


def count_users(node: fx.Node) -> int:
    """The number of operations that read a node's value, directly or through an alias."""
    while node.target in ALIASES:
        node = node.args[0]  # type: ignore[assignment]
    return _count_users_below(node)


def _count_users_below(node: fx.Node) -> int:
    return sum(_count_users_below(user) if user.target in ALIASES else 1 for user in node.users)
