"""Reads int8 weights and scales from the graph of a quantized model."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from starfire_prune.quantization.names import inputs_of, node_names, weight_name
from starfire_prune.quantization.scheme import Place, QuantizedInput, QuantizedWeight, Scheme
from starfire_prune.utils.errors import QuantizationError
from starfire_prune.utils.quantized_ops import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE_CHANNELS

__all__ = ["read_scheme"]


def read_scheme(module: fx.GraphModule) -> Scheme:
    """The scheme of a quantized model, whose weights are int8 or quantized in its graph.

    Args:
        module: The result of `quantize`, or of torchao's `convert_pt2e`.

    Raises:
        QuantizationError: If scales or weights are not such as this package uses; it names the
            layer.
    """
    weights: dict[str, QuantizedWeight] = {}
    inputs: dict[Place, QuantizedInput] = {}
    for name, node in node_names(module.graph).items():
        try:
            weight = _weight_of(module, node)
            found = _inputs_of(node)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
        if weight is not None:
            weights[str(weight_name(node))] = weight
        inputs.update({(name, index): each for index, each in found.items()})
    _check_weights_are_read_once(module)
    return Scheme(weights, inputs)


def _weight_of(module: fx.GraphModule, node: fx.Node) -> QuantizedWeight | None:
    if weight_name(node) is None:
        return None
    dequantized: Any = node.args[1]
    if dequantized.target is not DEQUANTIZE_CHANNELS:
        return None
    source, scales, zero_points, axis = dequantized.args[:4]
    if axis != 0:
        raise QuantizationError(f"its weight is quantized along axis {axis}, not by output channel")
    if zero_points is not None and bool(_tensor(module, zero_points).any()):
        raise QuantizationError("its weight has zero points other than 0")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return QuantizedWeight(
        _values(module, source),
        _tensor(module, scales).to(torch.float32),
        None if bias is None else _tensor(module, bias),
    )


def _values(module: fx.GraphModule, source: fx.Node) -> Tensor:
    operation: Any = source.target
    if operation is not QUANTIZE_CHANNELS:
        return _tensor(module, source)
    own = (_tensor(module, read) if isinstance(read, fx.Node) else read for read in source.args)
    return operation(*own)  # type: ignore[no-any-return]


def _inputs_of(node: fx.Node) -> dict[int, QuantizedInput]:
    return {
        index: _quantized_input(read)
        for index, read in enumerate(inputs_of(node))
        if read.target is DEQUANTIZE
    }


def _quantized_input(node: fx.Node) -> QuantizedInput:
    arguments: Any = node.args
    scale, zero_point, smallest, largest, dtype = arguments[1:6]
    if smallest != 0 or dtype != torch.uint8:
        raise QuantizationError(f"its input is quantized to {dtype} from {smallest}, not to uint8")
    return QuantizedInput(float(scale), int(zero_point), int(largest))


def _tensor(module: fx.GraphModule, node: Any) -> Tensor:
    if node.op != "get_attr":
        raise QuantizationError(f"{node.name} is computed, not a tensor of the model")
    tensor: Tensor = operator.attrgetter(node.target)(module)
    return tensor.detach()


def _check_weights_are_read_once(module: fx.GraphModule) -> None:
    layers = (weight_name(node) for node in module.graph.nodes)
    for name, count in Counter(name for name in layers if name is not None).items():
        if count > 1:
            raise QuantizationError(
                f"{name} is the weight of {count} calls of a layer; only layers that a forward "
                f"pass calls once can be quantized"
            )
