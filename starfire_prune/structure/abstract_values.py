"""Abstract values: what is known about an intermediate tensor for every input of the model.

The analysis is an abstract interpretation (constant propagation). An abstract value is a float64
tensor on the CPU with as many dimensions as the intermediate tensor, and of size 1 along those in
which it does not change. An element is a number where the tensor has that constant value, and NaN
where it varies, so that most operations compute their own abstract output.
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "VARYING",
    "abstract",
    "channel_values",
    "if_uniform",
    "merged_places",
    "shape_of",
    "varying",
    "without_repeats",
]


VARYING = math.nan


def abstract(value: Any) -> Any:
    """A parameter or buffer as an abstract value; anything other than a tensor is unchanged."""
    return value.detach().to("cpu", torch.float64) if isinstance(value, Tensor) else value


def varying(dims: int) -> Tensor:
    """The abstract value of a tensor that varies everywhere."""
    return torch.full([1] * dims, VARYING, dtype=torch.float64)


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape that a node's tensor had when the model was exported."""
    return tuple(value.meta["val"].shape)


def channel_values(value: Tensor, dim: int, channels: int) -> Tensor:
    """The constant of each channel along `dim`, of shape `(channels,)`; NaN where it varies."""
    rows = value.movedim(dim, 0).flatten(1)
    return if_uniform(rows)[:, 0].expand(channels)


def if_uniform(rows: Tensor) -> Tensor:
    """The element of the last dimension if all are equal, NaN otherwise; the dimension is kept."""
    first = rows[..., :1]
    if rows.shape[-1] == 1:
        return first
    return first.masked_fill(~(rows == first).all(-1, keepdim=True), VARYING)


def without_repeats(value: Tensor) -> Tensor:
    """The abstract value with size 1 along each dimension in which it does not change."""
    for dim in range(value.ndim):
        first = value.narrow(dim, 0, 1)
        if value.shape[dim] > 1 and torch.equal(
            value.nan_to_num(nan=math.inf), first.nan_to_num(nan=math.inf).expand_as(value)
        ):
            value = first
    return value


def merged_places(x: Tensor, spatial: int) -> Tensor:
    """The abstract value with its last `spatial` dimensions of size 1, varying if not uniform."""
    shape = (*x.shape[: x.ndim - spatial], *[1] * spatial)
    return if_uniform(x.flatten(x.ndim - spatial)).view(shape)
