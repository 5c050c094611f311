"""Templates: what is known of an intermediate tensor, whatever the input of the model.

A template is float64, on the CPU, with as many dimensions as the intermediate, and of size 1 along
those in which it does not change. It holds a number where the intermediate has that constant value,
and NaN where it varies, so that most operations carry it on by themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "VARYING",
    "as_template",
    "channel_values",
    "if_uniform",
    "reduced",
    "shape_of",
    "varying",
    "windowed",
]


VARYING = math.nan


def as_template(value: Any) -> Any:
    """A parameter or buffer as a template; anything but a tensor as it is."""
    return value.detach().to("cpu", torch.float64) if isinstance(value, Tensor) else value


def varying(dims: int) -> Tensor:
    """The template of a tensor that varies in all places."""
    return torch.full([1] * dims, VARYING, dtype=torch.float64)


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape that a node's tensor had when the model was exported."""
    return tuple(value.meta["val"].shape)


def channel_values(template: Tensor, dim: int, channels: int) -> Tensor:
    """The constant of each channel along `dim`, shape `(channels,)`; NaN where it varies."""
    rows = template.movedim(dim, 0).flatten(1)
    return if_uniform(rows)[:, 0].expand(channels)


def if_uniform(rows: Tensor) -> Tensor:
    """The first of the last dimension where all of it is the same, NaN otherwise; keeps the dim."""
    first = rows[..., :1]
    if rows.shape[-1] == 1:
        return first
    return first.masked_fill(~(rows == first).all(-1, keepdim=True), VARYING)


def reduced(template: Tensor) -> Tensor:
    """The template with size 1 along each dimension in which it does not change."""
    for dim in range(template.ndim):
        first = template.narrow(dim, 0, 1)
        if template.shape[dim] > 1 and torch.equal(
            template.nan_to_num(nan=math.inf), first.nan_to_num(nan=math.inf).expand_as(template)
        ):
            template = first
    return template


def windowed(x: Tensor, spatial: int) -> Tensor:
    """The template with its last `spatial` dimensions reduced, varying where they change."""
    shape = (*x.shape[: x.ndim - spatial], *[1] * spatial)
    return if_uniform(x.flatten(x.ndim - spatial)).view(shape)
