"""The steps of an inference: what the graph's operations become once they are joined."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Window

__all__ = ["Convolution", "Copy", "Flatten", "Linear", "Mean", "Pooling", "Step", "Value"]


@dataclasses.dataclass(eq=False)
class Value:
    """An intermediate: `channels` of `height` x `width` for each image of the batch."""

    channels: int
    height: int = 1
    width: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclasses.dataclass(eq=False)
class Step:
    """Something that makes `output` of `source`.

    Attributes:
        source: what it reads.
        output: what it makes.
        residual: what is added to it, of the output's shape.
        low: what it is clamped to, in the end.
        high: likewise.
    """

    source: Value
    output: Value
    residual: Value | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_clamped(self) -> bool:
        """Whether there are bounds, after which nothing can be joined."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclasses.dataclass(eq=False)
class Layer(Step):
    """A layer with a weight `(K, C / groups, R, S)` or `(K, C)` and a bias `(K,)`, in float64."""

    weight: NDArray[Any] = dataclasses.field(kw_only=True)
    bias: NDArray[Any] = dataclasses.field(kw_only=True)

    def rescale(self, scale: NDArray[Any], shift: NDArray[Any]) -> None:
        """Make its output channels `scale` times what they were, and `shift` more."""
        self.weight = self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        self.bias = self.bias * scale + shift


@dataclasses.dataclass(eq=False)
class Convolution(Layer):
    """A convolution; a 1x1 one has no stride, since a `Copy` before it leaves pixels out."""

    groups: int = dataclasses.field(kw_only=True)
    window: Window = dataclasses.field(kw_only=True)

    @property
    def is_point(self) -> bool:
        """Whether it is a product of a matrix with each pixel."""
        return self.window.is_point and self.groups == 1

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, on images of one pixel."""
        return self.is_point and self.output.size == (1, 1) and self.residual is None


class Linear(Layer):
    """A linear layer."""


@dataclasses.dataclass(eq=False)
class Pooling(Step):
    """The largest of a window (`scale` None) or its sum times a scale."""

    window: Window = dataclasses.field(kw_only=True)
    fill: float = dataclasses.field(kw_only=True)
    scale: float | None = dataclasses.field(kw_only=True)


class Mean(Step):
    """The mean of each channel."""


class Flatten(Step):
    """The channels, rows and columns as channels of one pixel."""


@dataclasses.dataclass(eq=False)
class Copy(Step):
    """Every `stride`-th pixel, times a scale, plus a shift, as channels `first` on of the output.

    Attributes:
        stride: vertical and horizontal.
        scale: of each channel, `(C,)`, or None.
        shift: of each channel, `(C,)`; None where `scale` is.
        first: channel of the output, where it has more than are copied.
    """

    stride: tuple[int, int] = (1, 1)
    scale: NDArray[Any] | None = None
    shift: NDArray[Any] | None = None
    first: int = 0

    def rescale(self, scale: NDArray[Any], shift: NDArray[Any]) -> None:
        """Make its channels `scale` times what they were, and `shift` more."""
        ones, zeros = np.ones(len(scale)), np.zeros(len(scale))
        self.shift = (zeros if self.shift is None else self.shift) * scale + shift
        self.scale = (ones if self.scale is None else self.scale) * scale
