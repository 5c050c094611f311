"""Names of the nodes of exported graphs that depend on the model only, not on torch's version.

A layer has its module's name, and any other operation the name of the module that calls it with
its own: `layer1.0.conv1`, `layer1.0.act1.relu`, `layer1.0.add`. Further calls end in `#1`, `#2`.
The output is `return`, which is no module's name. Operations that quantize have no names, so a
quantized graph has the names of its float graph, without batch norms that are folded.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from starfire_prune.structure.ops import CONVOLUTIONS, LINEAR
from starfire_prune.utils.quantized_ops import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    QUANTIZE,
    QUANTIZE_CHANNELS,
)

__all__ = [
    "LAYERS",
    "bias_name",
    "inputs_of",
    "is_batch_norm",
    "node_names",
    "scale_name",
    "weight_name",
    "zero_point_name",
]


LAYERS = (*CONVOLUTIONS, LINEAR)
_UNNAMED = (QUANTIZE, DEQUANTIZE, QUANTIZE_CHANNELS, DEQUANTIZE_CHANNELS)
_BATCH_NORMS = ("aten::batch_norm", "aten::_native_batch_norm_legit_no_training")


def node_names(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes that compute and the output, by their names."""
    names: dict[str, fx.Node] = {}
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "output":
            names["return"] = node
        elif node.op == "call_function" and node.target not in _UNNAMED:
            name = _name_of(node)
            counts[name] += 1
            names[name if counts[name] == 1 else f"{name}#{counts[name] - 1}"] = node
    return names


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, with duplicates, without the model's parameters."""
    found: list[fx.Node] = []

    def note(read: fx.Node) -> fx.Node:
        found.append(read)
        return read

    fx.map_arg((node.args, node.kwargs), note)
    return [read for read in found if read.op != "get_attr" and not _is_weight(read)]


def weight_name(node: fx.Node) -> str | None:
    """The name of the weight that a layer reads, also if it is quantized; None for other nodes."""
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    source: Any = node.args[1]
    while source.op == "call_function" and source.target in (
        QUANTIZE_CHANNELS,
        DEQUANTIZE_CHANNELS,
    ):
        source = source.args[0]
    return str(source.target) if source.op == "get_attr" else None


def scale_name(weight: str) -> str:
    """The name of the scales of a weight, such as `layer1.0.conv1.weight_scale`."""
    return f"{weight}_scale"


def zero_point_name(weight: str) -> str:
    """The name of the zero points of a weight, such as `layer1.0.conv1.weight_zero_point`."""
    return f"{weight}_zero_point"


def bias_name(weight: str) -> str:
    """The name of the bias that belongs to a weight, such as `layer1.0.conv1.bias`."""
    return f"{weight.removesuffix('weight')}bias" if weight.endswith("weight") else f"{weight}_bias"


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm in eval mode."""
    return _operation(node) in _BATCH_NORMS


def _name_of(node: fx.Node) -> str:
    weight = weight_name(node)
    if weight is not None and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    operation = _operation(node).rpartition("::")[2].rstrip("_")
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values()))), "")
    return f"{path}.{operation}" if path else operation


def _operation(node: fx.Node) -> str:
    """The name of a node's operation, such as `aten::relu_`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(getattr(target, "__name__", target))


def _is_weight(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (QUANTIZE_CHANNELS, DEQUANTIZE_CHANNELS)
