"""The compiler's intermediate representation (IR): operations on values, already fused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Window
from starfire_prune.sparse.program_format import Activation

__all__ = [
    "ChannelNorm",
    "Convolution",
    "Copy",
    "Dequantize",
    "Flatten",
    "Layer",
    "Linear",
    "Mean",
    "Norm",
    "Op",
    "Pooling",
    "Quantization",
    "Quantize",
    "Response",
    "Upsampling",
    "Value",
]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How bytes stand for real numbers: `(byte - zero_point) * scale`.

    Attributes:
        scale: The step, positive.
        zero_point: The byte that stands for zero.
        low: The smallest byte.
        high: The largest byte.
    """

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255

    @property
    def fill(self) -> int:
        """The bits of a lane of four zeros."""
        return self.zero_point * 0x01010101


@dataclasses.dataclass(eq=False)
class Value:
    """An intermediate result: `channels` of `height` x `width` for each image of the batch.

    Attributes:
        channels: Number of channels.
        height: Height in pixels.
        width: Width in pixels.
        quantization: The quantization, of a value that is stored in bytes; None if it is in floats.
        whole: The value as a part of which it is stored; None if it is stored on its own.
        first: Its first channel in the whole.
    """

    channels: int
    height: int = 1
    width: int = 1
    quantization: Quantization | None = None
    whole: Value | None = None
    first: int = 0

    @property
    def bytes_as(self) -> Quantization:
        """The quantization of a value that is stored in bytes.

        Raises:
            ValueError: If it is stored in floats.
        """
        if self.quantization is None:
            raise ValueError(f"{self} is not quantized")
        return self.quantization

    @property
    def root(self) -> Value:
        """The value in whose memory it is stored: itself, unless it is a part."""
        return self if self.whole is None else self.whole.root

    @property
    def first_in_root(self) -> int:
        """Its first channel in the root."""
        return 0 if self.whole is None else self.first + self.whole.first_in_root

    @property
    def stored_channels(self) -> int:
        """Number of channels in memory: bytes of four neighbouring channels share a lane."""
        return self.channels if self.quantization is None else -(-self.channels // 4)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclasses.dataclass(eq=False)
class Op:
    """An operation that computes `output` from `source`.

    Attributes:
        source: The value it reads.
        output: The value it computes.
        residual: A value that is added to the result, of the output's shape.
        low: Lower bound that the result is clamped to.
        high: Upper bound, likewise.
        activation: What is computed of the clamped result in the end.
    """

    source: Value
    output: Value
    residual: Value | None = None
    low: float = -math.inf
    high: float = math.inf
    activation: Activation = Activation.NO_ACTIVATION

    @property
    def operands(self) -> list[Value]:
        """The values that it reads beside its source."""
        return [] if self.residual is None else [self.residual]

    @property
    def is_finished(self) -> bool:
        """Whether there are bounds or an activation, after which nothing can be fused."""
        is_clamped = (self.low, self.high) != (-math.inf, math.inf)
        return is_clamped or self.activation != Activation.NO_ACTIVATION


@dataclasses.dataclass(eq=False)
class Layer(Op):
    """A layer with a weight `(K, C / groups, R, S)` or `(K, C)` and a bias `(K,)`, in float64.

    Attributes:
        weight: The weight, in float64 or in int8.
        bias: The bias, in float64.
        weight_scale: The scales of a weight in int8, `(K,)`, if the layer multiplies integers: its
            source is quantized. Otherwise None.
    """

    weight: NDArray[Any] = dataclasses.field(kw_only=True)
    bias: NDArray[Any] = dataclasses.field(kw_only=True)
    weight_scale: NDArray[Any] | None = dataclasses.field(kw_only=True, default=None)

    def rescale(self, scale: NDArray[Any], shift: NDArray[Any]) -> None:
        """Multiply its output channels by `scale` and add `shift`, both `(K,)`."""
        if self.weight_scale is None:
            self.weight = self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        else:
            self.weight_scale = self.weight_scale * scale
        self.bias = self.bias * scale + shift


@dataclasses.dataclass(eq=False)
class Convolution(Layer):
    """A convolution; a 1x1 one has stride 1, since a `Copy` before it drops the other pixels."""

    groups: int = dataclasses.field(kw_only=True)
    window: Window = dataclasses.field(kw_only=True)

    @property
    def is_pointwise(self) -> bool:
        """Whether it multiplies each pixel by a matrix."""
        return self.window.is_pointwise and self.groups == 1

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, on images of one pixel."""
        return self.is_pointwise and self.output.size == (1, 1) and self.residual is None

    @property
    def can_store_bytes(self) -> bool:
        """Whether its result, in floats yet, can be stored in bytes.

        It has to multiply integers, and to add nothing but bytes.
        """
        adds_floats = self.residual is not None and self.residual.quantization is None
        is_open = self.weight_scale is not None and self.output.quantization is None
        return is_open and not self.is_linear and not adds_floats


class Linear(Layer):
    """A linear layer."""


@dataclasses.dataclass(eq=False)
class Pooling(Op):
    """The maximum of a window (`scale` is None), or its sum times `scale`."""

    window: Window = dataclasses.field(kw_only=True)
    fill: float = dataclasses.field(kw_only=True)
    scale: float | None = dataclasses.field(kw_only=True)


class Upsampling(Op):
    """Each pixel repeated: an output has a multiple of the source's rows and columns."""


class Mean(Op):
    """The mean of each channel."""


class Norm(Op):
    """The Euclidean norm of each channel."""


@dataclasses.dataclass(eq=False)
class Response(Op):
    """Numbers for each channel, divided by their mean plus `epsilon`."""

    epsilon: float = dataclasses.field(kw_only=True)


@dataclasses.dataclass(eq=False)
class ChannelNorm(Op):
    """A layer norm over the channels of each pixel.

    Attributes:
        scale: Factor of each normalized channel, `(C,)`.
        shift: Summand of each channel, `(C,)`.
        epsilon: Summand of the variance.
    """

    scale: NDArray[Any] = dataclasses.field(kw_only=True)
    shift: NDArray[Any] = dataclasses.field(kw_only=True)
    epsilon: float = dataclasses.field(kw_only=True)


class Quantize(Op):
    """The bytes that stand for a value, in its output's quantization."""


class Dequantize(Op):
    """The floats that a quantized value stands for."""


class Flatten(Op):
    """The channels, rows and columns as channels of one pixel."""


@dataclasses.dataclass(eq=False)
class Copy(Op):
    """Every `stride`-th pixel, times `factor` and `scale`, plus `shift`.

    Attributes:
        factor: A value that the source is multiplied by, of the output's shape, or of one pixel, or
            None.
        stride: Vertical and horizontal stride.
        scale: Factor of each channel, `(C,)`, or None.
        shift: Summand of each channel, `(C,)`; None if `scale` is None.
        first: First channel of the output to write, if that has more channels than the source.
    """

    factor: Value | None = None
    stride: tuple[int, int] = (1, 1)
    scale: NDArray[Any] | None = None
    shift: NDArray[Any] | None = None
    first: int = 0

    @property
    def operands(self) -> list[Value]:
        """The values that it reads beside its source."""
        return [*super().operands, *([] if self.factor is None else [self.factor])]

    def rescale(self, scale: NDArray[Any], shift: NDArray[Any]) -> None:
        """Multiply its channels by `scale` and add `shift`, both `(C,)`."""
        ones, zeros = np.ones(len(scale)), np.zeros(len(scale))
        self.shift = (zeros if self.shift is None else self.shift) * scale + shift
        self.scale = (ones if self.scale is None else self.scale) * scale
