"""Builds a quantized model from the graph of its float model and a scheme."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from starfire_prune.quantization.names import (
    bias_name,
    inputs_of,
    is_batch_norm,
    node_names,
    scale_name,
    weight_name,
    zero_point_name,
)
from starfire_prune.quantization.scheme import (
    LARGEST_WEIGHT,
    QuantizedInput,
    QuantizedWeight,
    Scheme,
)
from starfire_prune.utils.errors import QuantizationError
from starfire_prune.utils.quantized_ops import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from starfire_prune.utils.text import listed

__all__ = ["assemble"]


def assemble(module: fx.GraphModule, scheme: Scheme) -> fx.GraphModule:
    """A quantized model: the graph of a float model with a scheme's weights and quantization.

    Args:
        module: The graph of the dense model in eval mode, from `exported_module`. Its tensors that
            the scheme replaces are not read, and it is not changed.
        scheme: The scheme.

    Returns:
        A module whose state has the plain names `layer1.0.conv1.weight` (int8), `.weight_scale`,
        `.weight_zero_point` (zeros) and `.bias`. Its layers read
        `quantized_decomposed.dequantize_per_channel` of these.

    Raises:
        QuantizationError: If the scheme is one of another model.
    """
    module = copy.deepcopy(module)
    names = node_names(module.graph)
    _check_names(names, scheme)
    for node in names.values():
        weight = scheme.weights.get(weight_name(node) or "")
        if weight is not None:
            _fold_batch_norm(module, node)
            _set_weight(module, node, weight)
    for name, node in names.items():
        if node.op == "output" or node.users:  # not a folded batch norm
            _quantize_inputs(name, node, scheme)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return fx.GraphModule(module, module.graph)  # copies only what the graph still refers to


def _check_names(names: dict[str, fx.Node], scheme: Scheme) -> None:
    own = {weight_name(node): node for node in names.values()}
    unknown = [name for name in scheme.weights if name not in own]
    if unknown:
        raise QuantizationError(f"the model has no layers with the weights {listed(unknown)}")
    lost = [f"{name}[{index}]" for name, index in scheme.inputs if not _has(names, name, index)]
    if lost:
        raise QuantizationError(f"the model's graph has no inputs {listed(lost)}")


def _has(names: dict[str, fx.Node], name: str, index: int) -> bool:
    return name in names and 0 <= index < len(inputs_of(names[name]))


def _fold_batch_norm(module: fx.GraphModule, layer: fx.Node) -> None:
    """Leave out the batch norm after a layer, which is part of its int8 weight."""
    users = list(layer.users)
    if len(users) == 1 and is_batch_norm(users[0]) and users[0].args[0] is layer:
        users[0].replace_all_uses_with(layer)
        module.graph.erase_node(users[0])


def _set_weight(module: fx.GraphModule, layer: fx.Node, weight: QuantizedWeight) -> None:
    source: Any = layer.args[1]
    target = str(source.target)
    own: Tensor = operator.attrgetter(target)(module)
    if own.shape != weight.values.shape:
        raise QuantizationError(
            f"{target} has the shape {tuple(weight.values.shape)}, but {tuple(own.shape)} in the "
            f"model"
        )
    zeros = torch.zeros(weight.values.shape[0], dtype=torch.int64)
    with module.graph.inserting_before(layer):
        values = _add_tensor(module, target, weight.values)
        scales = _add_tensor(module, scale_name(target), weight.scales)
        zero_points = _add_tensor(module, zero_point_name(target), zeros)
        bias = None
        if weight.bias is not None:
            bias = _add_tensor(module, bias_name(target), weight.bias)
        read = module.graph.call_function(
            DEQUANTIZE_CHANNELS,
            (values, scales, zero_points, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT, torch.int8),
        )
    arguments = list(layer.args)
    arguments[1:3] = [read, bias]
    layer.args = tuple(arguments)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}


def _add_tensor(module: fx.GraphModule, target: str, tensor: Tensor) -> fx.Node:
    path, _, name = target.rpartition(".")
    holder = module.get_submodule(path)
    for registry in (holder._parameters, holder._buffers):
        registry.pop(name, None)
    holder.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
    return module.graph.get_attr(target)


def _quantize_inputs(name: str, node: fx.Node, scheme: Scheme) -> None:
    """Let a node read the dequantized values of its inputs."""
    sources = inputs_of(node)
    reads = iter(
        [
            _dequantized(source, scheme.inputs.get((name, index)))
            for index, source in enumerate(sources)
        ]
    )

    def replaced(source: fx.Node) -> fx.Node:
        return next(reads) if source in sources else source

    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), replaced)


def _dequantized(node: fx.Node, quantized: QuantizedInput | None) -> fx.Node:
    """The dequantized value of a node, which all its readers with the same scale share."""
    if quantized is None:
        return node
    rest = (quantized.scale, quantized.zero_point, 0, quantized.largest, torch.uint8)
    for user in _users(node, QUANTIZE, rest):
        for read in _users(user, DEQUANTIZE, rest):
            return read
    with node.graph.inserting_after(node):
        integers = node.graph.call_function(QUANTIZE, (node, *rest))
    with node.graph.inserting_after(integers):
        return node.graph.call_function(DEQUANTIZE, (integers, *rest))


def _users(node: fx.Node, target: Any, rest: tuple[Any, ...]) -> Iterator[fx.Node]:
    return (user for user in node.users if user.target is target and user.args[1:] == rest)
