"""Quantized values in an exported graph: the operations that torch's quantization leaves in it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from starfire_prune.sparse.ir import Quantization

__all__ = [
    "Constant",
    "QuantizedWeight",
    "constants_of",
    "is_dequantize",
    "is_quantize",
    "quantization_of",
]


aten = torch.ops.aten
_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten.alias.default),
)
_LIBRARY = "quantized_decomposed"
_QUANTIZE = f"{_LIBRARY}.quantize_per_tensor.default"
_DEQUANTIZE = f"{_LIBRARY}.dequantize_per_tensor.default"
_DEQUANTIZE_WEIGHT = f"{_LIBRARY}.dequantize_per_channel.default"


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight in int8, symmetric around zero.

    Attributes:
        values: The integers, `(K, ...)` in int8.
        scales: The scale of each output channel, `(K,)`.
    """

    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """The weight in floats, in float64."""
        scales = self.scales.to(torch.float64)
        return self.values.to(torch.float64) * scales.reshape(-1, *[1] * (self.values.ndim - 1))


Constant = Tensor | QuantizedWeight


def is_quantize(node: Any) -> bool:
    """Whether a node turns floats into unsigned bytes with one scale."""
    return _has_name(node, _QUANTIZE) and node.args[5] == torch.uint8


def is_dequantize(node: Any) -> bool:
    """Whether a node turns unsigned bytes with one scale into floats."""
    return _has_name(node, _DEQUANTIZE) and node.args[5] == torch.uint8


def _has_name(node: Any, name: str) -> bool:
    # By name: the operations are registered only once something quantizes
    return isinstance(node, fx.Node) and node.op == "call_function" and str(node.target) == name


def quantization_of(node: fx.Node) -> Quantization:
    """The quantization of a quantizing or dequantizing node."""
    scale, zero_point, low, high = node.args[1:5]
    return Quantization(float(scale), int(zero_point), int(low), int(high))  # type: ignore[arg-type]


def constants_of(graph: fx.GraphModule) -> dict[fx.Node, Constant]:
    """The tensors that a graph's nodes refer to, their views, and what quantization computes."""
    found: dict[fx.Node, Constant] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                found[node] = value
        elif str(node.target).startswith(_LIBRARY) or node.target in _VIEWS:
            tensors = {source: found.get(source) for source in node.all_input_nodes}
            if tensors and all(isinstance(value, Tensor) for value in tensors.values()):
                found[node] = _computed(node, tensors)
    return found


def _computed(node: fx.Node, tensors: Mapping[fx.Node, Any]) -> Constant:
    """The value of an operation on constants."""
    arguments: Any = fx.map_arg(node.args, tensors.__getitem__)
    if _has_name(node, _DEQUANTIZE_WEIGHT):
        values, scales, zero_points, axis = arguments[:4]
        symmetric = zero_points is None or not zero_points.any()
        if values.dtype == torch.int8 and symmetric and axis == 0:
            return QuantizedWeight(values.detach(), scales.detach())
    result: Tensor = node.target(*arguments)  # type: ignore[operator]
    return result.detach()
