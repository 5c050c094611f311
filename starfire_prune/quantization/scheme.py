"""What a quantized model consists of beside its graph: int8 weights, and scales by plain names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from starfire_prune.utils.errors import QuantizationError

__all__ = ["LARGEST_WEIGHT", "Place", "QuantizedInput", "QuantizedWeight", "Scheme"]


LARGEST_WEIGHT = 127
"""int8 weights are in [-127, 127]: without -128 the range is symmetric, and so is each product."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """The weight of a convolution or linear layer, with batch norms folded into it.

    Attributes:
        values: int8 in [-127, 127], of the shape of the layer's weight, (K, …).
        scales: float32 of shape (K,), above 0. A weight is `values * scales` by output channel.
        bias: float32 of shape (K,), or None.

    Raises:
        QuantizationError: For tensors that are not of this kind.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.dim() < 2:
            raise QuantizationError(
                f"its weight must be int8 with two dimensions or more, but is "
                f"{self.values.dtype} of shape {tuple(self.values.shape)}"
            )
        if bool((self.values < -LARGEST_WEIGHT).any()):
            raise QuantizationError(
                "its weight contains -128, but int8 weights are in [-127, 127] here"
            )
        shape = (self.values.shape[0],)
        _check_vector("weight_scale", self.scales, shape)
        if not bool((self.scales > 0).all()):
            raise QuantizationError("its weight_scale must be above 0 in all channels")
        if self.bias is not None:
            _check_vector("bias", self.bias, shape)

    @property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return self.values.numel() - int(torch.count_nonzero(self.values))


@dataclasses.dataclass(frozen=True)
class QuantizedInput:
    """How a tensor is quantized: `round(x / scale) + zero_point`, clamped to [0, largest].

    Attributes:
        scale: Size of a step, a float32 number above 0.
        zero_point: The integer that stands for 0.0, in [0, largest].
        largest: The largest integer: 255, or 127 with a reduced range.

    Raises:
        QuantizationError: For numbers that are not of this kind.
    """

    scale: float
    zero_point: int
    largest: int = 255

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise QuantizationError(
                f"its input_scale (={self.scale}) must be a finite number above 0"
            )
        if self.largest not in (127, 255):
            raise QuantizationError(f"its largest input (={self.largest}) must be 127 or 255")
        if not 0 <= self.zero_point <= self.largest:
            raise QuantizationError(
                f"its input_zero_point (={self.zero_point}) must be in [0, {self.largest}]"
            )


Place = tuple[str, int]
"""The name of a node, and the index of one of its inputs (`starfire_prune.quantization.names`)."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """All that quantization has found out about a model.

    Attributes:
        weights: Quantized weights by the name of the parameter, such as `layer1.0.conv1.weight`.
        inputs: How tensors are quantized, by the place at which they are read. A residual addition
            reads one of its two inputs quantized.
    """

    weights: Mapping[str, QuantizedWeight]
    inputs: Mapping[Place, QuantizedInput]


def _check_vector(name: str, vector: Tensor, shape: tuple[int, ...]) -> None:
    if vector.dtype != torch.float32 or tuple(vector.shape) != shape:
        raise QuantizationError(
            f"its {name} must be float32 of shape {shape}, but is {vector.dtype} of shape "
            f"{tuple(vector.shape)}"
        )
    if not bool(vector.isfinite().all()):
        raise QuantizationError(f"its {name} contains NaN or infinite numbers")
