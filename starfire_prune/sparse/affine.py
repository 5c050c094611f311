"""Sums and products with constants for each channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from starfire_prune.sparse.nodes import Constants, is_image, shape_of

__all__ = ["Affine", "affine_of"]


aten = torch.ops.aten


class Affine(NamedTuple):
    """An operation on one value: `source * scale + shift`, with constants for each channel.

    Attributes:
        source: The node that computes the value.
        scale: Factor of each channel, `(C,)` in float64.
        shift: Summand of each channel, `(C,)` in float64.
    """

    source: fx.Node
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


def affine_of(node: fx.Node, constants: Constants) -> Affine | None:
    """The operation on one value that a sum or a product with constants is; None if it is not."""
    operands = list(node.args)
    sources = [each for each in operands if isinstance(each, fx.Node) and each not in constants]
    if node.kwargs or len(sources) != 1 or shape_of(sources[0]) != shape_of(node):
        return None
    source = sources[0]
    values: list[Any] = [
        None if each is source else _per_channel(each, node, constants) for each in operands
    ]
    if not is_image(source) or sum(value is None for value in values) != 1:
        return None
    at, ones = operands.index(source), np.ones(shape_of(node)[1])
    if node.target is aten.addcmul.default:
        return None if at == 0 else Affine(source, ones * values[3 - at], ones * values[0])
    if len(values) != 2:
        return None
    other = values[1 - at]
    if node.target is aten.mul.Tensor:
        return Affine(source, ones * other, 0 * ones)
    if node.target is aten.div.Tensor and at == 0 and np.all(other != 0):
        return Affine(source, ones / other, 0 * ones)
    if node.target is aten.add.Tensor:
        return Affine(source, ones, ones * other)
    if node.target in (aten.sub.Tensor, aten.rsub.Scalar):
        sign = 1 if (node.target is aten.sub.Tensor) == (at == 0) else -1
        return Affine(source, ones * sign, -sign * ones * other)
    return None


def _per_channel(value: Any, node: fx.Node, constants: Constants) -> Any:
    """A constant operand as a number for each channel, or for all of them; None if it isn't one."""
    if isinstance(value, (int, float)):
        return np.float64(value)
    constant = constants.get(value) if isinstance(value, fx.Node) else None
    if not isinstance(constant, Tensor) or constant.dtype != torch.float32:
        return None
    dims, channels = len(shape_of(node)), shape_of(node)[1]
    shape = (*[1] * (dims - constant.ndim), *constant.shape)
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1) or len(shape) != dims:
        return None
    values = constant.detach().to(torch.float64).numpy().reshape(-1)
    return values if len(values) in (1, channels) else None
