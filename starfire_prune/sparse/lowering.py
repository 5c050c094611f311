"""Lowers a graph to IR ops: folds batch norms, and fuses activations, additions and quantization.

A layer multiplies integers if its source and its weight are quantized, and if its sums fit into
int32. Maximum pooling keeps a value quantized, and means are computed of bytes. Other operations
read floats: a quantized value is dequantized for them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from starfire_prune.sparse.affine import Affine, affine_of
from starfire_prune.sparse.ir import (
    ChannelNorm,
    Convolution,
    Copy,
    Dequantize,
    Flatten,
    Layer,
    Linear,
    Mean,
    Norm,
    Op,
    Pooling,
    Quantization,
    Quantize,
    Response,
    Upsampling,
    Value,
)
from starfire_prune.sparse.nodes import (
    SAME,
    Constants,
    argument_of,
    count_users,
    shape_of,
)
from starfire_prune.sparse.quantized import (
    Constant,
    QuantizedWeight,
    is_dequantize,
    is_quantize,
    quantization_of,
)
from starfire_prune.sparse.rewriting import channel_norm, global_response
from starfire_prune.sparse.supported import (
    ACTIVATIONS,
    BATCH_NORM,
    BOUNDS,
    CONVOLUTIONS,
    PRODUCTS,
    SPLITS,
    SUMS,
    UPSAMPLINGS,
    activation_of,
    aten,
    bounds,
    convolution_window,
    first_channel,
    pooling_window,
)

__all__ = ["Lowering"]


class Lowering:
    """Lowers a graph's nodes, one after the other.

    Attributes:
        ops: The IR ops so far.
        values: The value of each input and lowered node.
    """

    def __init__(self, constants: Constants) -> None:
        self.ops: list[Op] = []
        self.values: dict[fx.Node, Value] = {}
        self._constants = constants
        self._producers: dict[Value, Op] = {}
        self._dequantized: dict[Value, Value] = {}
        self._joins: set[Value] = set()  # concatenations

    def add_input(self, node: fx.Node) -> Value:
        """Make a node an input."""
        self.values[node] = self._new_value(shape_of(node))
        return self.values[node]

    def lower(self, node: fx.Node) -> None:
        """Turn a node into an op, or fuse it into a previous one."""
        if is_quantize(node):
            self.values[node] = self._quantized(node)
        elif is_dequantize(node):
            self.values[node] = self._stored(node)
        else:
            self.values[node] = RULES[node.target](self, node)

    def finished_ops(self, outputs: Sequence[fx.Node]) -> list[Op]:
        """All ops, in an order in which they can run.

        Args:
            outputs: Nodes whose values are needed in floats.
        """
        for node in outputs:
            self.values[node] = self._floats(self.values[node])
        ordered: list[Op] = []
        for op in list(self.ops):
            if op.residual is not None and op.output.quantization is None:
                op.residual = self._floats(op.residual)
                if op.residual in self._dequantized.values():
                    ordered.append(self._producers[op.residual])
            ordered.append(op)
        return list(dict.fromkeys(ordered))  # a dequantization that others read later is done once

    def _new_value(self, shape: tuple[int, ...], quantization: Quantization | None = None) -> Value:
        height, width = shape[2:] or (1, 1)
        return Value(shape[1], height, width, quantization)

    def _add(self, op: Op) -> Value:
        self.ops.append(op)
        self._producers[op.output] = op
        return op.output

    def _constant(self, node: Any) -> NDArray[Any] | None:
        """A parameter in float64."""
        if node is None:
            return None
        value = self._constants[node]
        if isinstance(value, QuantizedWeight):
            return value.dequantized().numpy()
        values: NDArray[Any] = value.detach().to(torch.float64).numpy()
        return values

    def _stored(self, node: fx.Node) -> Value:
        """The value of a node's source, as it is stored."""
        source: Any = node.args[0]
        return self.values[source]

    def _source(self, node: fx.Node) -> Value:
        """The value of a node's source, in floats."""
        return self._floats(self._stored(node))

    def _floats(self, value: Value) -> Value:
        if value.quantization is None:
            return value
        if value not in self._dequantized:
            floats = Value(value.channels, *value.size)
            self._dequantized[value] = self._add(Dequantize(value, floats))
        return self._dequantized[value]

    def _fusable(self, node: Any) -> Any:
        """The op that computes a node's value, if the value's only user can be fused into it."""
        op = self._producer_for_one(node)
        if not isinstance(op, (Layer, Copy, Pooling)) or op.is_finished:
            return None
        return op if op.output.quantization is None else None

    def _producer_for_one(self, node: Any) -> Op | None:
        """The op that computes a node's value, if it has one user."""
        return self._producers.get(self.values[node]) if count_users(node) == 1 else None

    def _quantized(self, node: fx.Node) -> Value:
        """A value in bytes: of the op that computes it where possible, or of one more op."""
        quantization, source = quantization_of(node), self._stored(node)
        if source.quantization == quantization:
            return source
        op = self._producer_for_one(node.args[0])
        if isinstance(op, Convolution) and op.can_store_bytes:
            op.output.quantization = quantization
            return op.output
        floats = self._floats(source)
        return self._add(Quantize(floats, Value(floats.channels, *floats.size, quantization)))

    def _layer(self, node: fx.Node) -> Value:
        source, output = self._stored(node), self._new_value(shape_of(node))
        constant: Any = self._constants[node.args[1]]  # type: ignore[index]
        parts: dict[str, Any] = {}
        if _multiplies_integers(source, constant):
            parts["weight"] = constant.values.numpy()
            parts["weight_scale"] = constant.scales.to(torch.float64).numpy()
        else:
            source, parts["weight"] = self._floats(source), self._constant(node.args[1])
        bias = self._constant(argument_of(node, 2, "bias", None))
        parts["bias"] = np.zeros(len(parts["weight"])) if bias is None else bias
        if node.target is aten.linear.default:
            return self._add(Linear(source, output, **parts))
        window = convolution_window(node)
        groups = argument_of(node, 6, "groups", 1)
        if window.is_pointwise and window.stride != (1, 1):
            thinned = Value(source.channels, *output.size, source.quantization)
            source = self._add(Copy(source, thinned, stride=window.stride))
            window = window._replace(stride=(1, 1))
        return self._add(Convolution(source, output, groups=groups, window=window, **parts))

    def _batch_norm(self, node: fx.Node) -> Value:
        weight, bias, mean, var = (self._constant(argument) for argument in node.args[1:5])
        scale = 1 / np.sqrt(var + node.args[6])  # type: ignore[operator]
        scale = scale if weight is None else scale * weight
        shift = (0.0 if bias is None else bias) - mean * scale  # type: ignore[operator]
        source: Any = node.args[0]
        return self._affine(Affine(source, scale, shift))

    def _affine(self, affine: Affine) -> Value:
        """A product and a sum with constants, as part of the op before them where possible."""
        op: Op | None = self._fusable(affine.source)
        if not isinstance(op, (Layer, Copy)) or op.residual is not None:
            op = self._copy(affine.source)
        op.rescale(affine.scale, affine.shift)
        return op.output

    def _copy(self, node: Any) -> Copy:
        """A new copy of a node's value."""
        source = self._floats(self.values[node])
        op = Copy(source, Value(source.channels, *source.size))
        self._add(op)
        return op

    def _bounds(self, node: fx.Node) -> Value:
        op: Op = self._fusable(node.args[0]) or self._copy(node.args[0])
        op.low, op.high = bounds(node)
        return op.output

    def _activation(self, node: fx.Node) -> Value:
        op: Op | None = self._fusable(node.args[0])
        if op is None or (isinstance(op, Layer) and op.weight_scale is not None):
            op = self._copy(node.args[0])
        op.activation = activation_of(node)
        return op.output

    def _sum(self, node: fx.Node) -> Value:
        affine = affine_of(node, self._constants)
        if affine is not None:
            return self._affine(affine)
        one, other = node.args[:2]
        for summand, added in ((one, other), (other, one)):
            op = self._fusable(summand)
            is_product = isinstance(op, Copy) and op.factor is not None
            fusable = (isinstance(op, Convolution) or is_product) and op.residual is None
            if fusable and one is not other:
                self.ops.remove(op)  # the added value may be computed after it
                stored = self.values[added]  # type: ignore[index]
                sums_bytes = isinstance(op, Layer) and op.weight_scale is not None
                op.residual = stored if sums_bytes else self._floats(stored)
                return self._add(op)
        source, residual = self._source(node), self._floats(self.values[other])  # type: ignore[index]
        output = Value(source.channels, *source.size)
        return self._add(Copy(source, output, residual))

    def _product(self, node: fx.Node) -> Value:
        affine = affine_of(node, self._constants)
        if affine is not None:
            return self._affine(affine)
        operands: Any = node.args[:2]
        source, factor = (self._floats(self.values[operand]) for operand in operands)
        if shape_of(operands[0]) != shape_of(node):
            source, factor = factor, source
        return self._add(Copy(source, Value(source.channels, *source.size), factor=factor))

    def _concatenation(self, node: fx.Node) -> Value:
        output, first = self._new_value(shape_of(node)), 0
        sources: Any = node.args[0]
        for source in self._joined([self._floats(self.values[each]) for each in sources]):
            if self._can_be_part(source):
                source.whole, source.first = output, first
            else:
                self.ops.append(Copy(source, output, first=first))
            first += source.channels
        self._joins.add(output)
        return output

    def _joined(self, sources: list[Value]) -> list[Value]:
        """The sources, with all parts of a value, one after the other, replaced by that value."""
        found: list[Value] = []
        while sources:
            whole, parts, channels = sources[0].whole, 0, 0
            for part in sources:
                if whole is None or part.whole is not whole or part.first != channels:
                    break
                parts, channels = parts + 1, channels + part.channels
            complete = whole is not None and channels == whole.channels
            if whole is not None and complete and self._can_be_part(whole):
                found.append(whole)
            else:
                found.append(sources[0])
                parts = 1
            sources = sources[parts:]
        return found

    def _can_be_part(self, value: Value) -> bool:
        """Whether a value can be stored as a part of another one: an op computes it on its own."""
        op = self._producers.get(value)
        adds = isinstance(op, Convolution) and op.residual is not None  # of tiles as far apart
        computed = value in self._joins or (op is not None and not isinstance(op, Flatten))
        computed = computed and not adds
        return computed and value.whole is None and value.quantization is None

    def _part(self, node: fx.Node) -> Value:
        """Some channels of a value."""
        source = node.args[0]
        if node.target is operator.getitem:
            source = source.args[0]  # type: ignore[union-attr]
        part = self._new_value(shape_of(node))
        part.whole = self._floats(self.values[source])  # type: ignore[index]
        part.first = first_channel(node)
        return part

    def _getitem(self, node: fx.Node) -> Value:
        split: Any = node.args[0]
        return self._part(node) if split.target in SPLITS else self._alias(node)

    def _upsampling(self, node: fx.Node) -> Value:
        return self._add(Upsampling(self._source(node), self._new_value(shape_of(node))))

    def _pooling(self, node: fx.Node) -> Value:
        window, source = pooling_window(node), self._stored(node)
        average = node.target is not aten.max_pool2d.default
        source = self._floats(source) if average else source
        producer = self._producers.get(source)
        positive = average or (producer is not None and min(producer.low, producer.high) >= 0)
        fill = 0.0 if positive else -math.inf
        scale = 1 / math.prod(window.size) if average else None
        output = self._new_value(shape_of(node), source.quantization)
        return self._add(Pooling(source, output, window=window, fill=fill, scale=scale))

    def _norm(self, node: fx.Node) -> Value:
        return self._add(Norm(self._source(node), self._new_value(shape_of(node))))

    def _response(self, node: fx.Node) -> Value:
        epsilon: Any = node.args[1]
        return self._add(
            Response(self._source(node), self._new_value(shape_of(node)), epsilon=epsilon)
        )

    def _channel_norm(self, node: fx.Node) -> Value:
        weight, bias, epsilon = node.args[1:]
        source = self._source(node)
        scale, shift = self._constant(weight), self._constant(bias)
        ones = np.ones(source.channels)
        scale, shift = ones if scale is None else scale, 0 * ones if shift is None else shift
        output = Value(source.channels, *source.size)
        parts: dict[str, Any] = {"scale": scale, "shift": shift, "epsilon": epsilon}
        return self._add(ChannelNorm(source, output, **parts))

    def _mean(self, node: fx.Node) -> Value:
        return self._add(Mean(self._stored(node), self._new_value(shape_of(node))))

    def _adaptive_pooling(self, node: fx.Node) -> Value:
        return self._mean(node) if shape_of(node)[2:] == (1, 1) else self._pooling(node)

    def _view(self, node: fx.Node) -> Value:
        if self._stored(node).size == (1, 1) or shape_of(node) == shape_of(node.args[0]):
            return self._stored(node)
        return self._add(Flatten(self._source(node), self._new_value(shape_of(node))))

    def _alias(self, node: fx.Node) -> Value:
        return self._stored(node)


def _multiplies_integers(source: Value, weight: Constant) -> bool:
    """Whether both are quantized, and no sum of products exceeds int32.

    Sums that exceed it only on the way are right in the end, since they wrap around.
    """
    if not isinstance(weight, QuantizedWeight) or source.quantization is None:
        return False
    rows = weight.values.reshape(len(weight.values), -1).to(torch.int64)
    largest = max(int(part.sum(1).amax()) for part in (rows.clamp(min=0), -rows.clamp(max=0)))
    return source.quantization.high * largest <= np.iinfo(np.int32).max


RULES: dict[Any, Callable[[Lowering, fx.Node], Value]] = {
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), Lowering._layer),
    BATCH_NORM: Lowering._batch_norm,
    operator.getitem: Lowering._getitem,
    **dict.fromkeys(SPLITS, Lowering._alias),
    aten.slice.Tensor: Lowering._part,
    **dict.fromkeys(UPSAMPLINGS, Lowering._upsampling),
    **dict.fromkeys(SUMS, Lowering._sum),
    **dict.fromkeys(PRODUCTS, Lowering._product),
    aten.addcmul.default: Lowering._product,
    aten.cat.default: Lowering._concatenation,
    aten.max_pool2d.default: Lowering._pooling,
    aten.avg_pool2d.default: Lowering._pooling,
    aten.adaptive_avg_pool2d.default: Lowering._adaptive_pooling,
    aten.mean.dim: Lowering._mean,
    aten.linalg_vector_norm.default: Lowering._norm,
    channel_norm: Lowering._channel_norm,
    global_response: Lowering._response,
    aten.view.default: Lowering._view,
    **dict.fromkeys(BOUNDS, Lowering._bounds),
    **dict.fromkeys(ACTIVATIONS, Lowering._activation),
    **dict.fromkeys(SAME, Lowering._alias),
}
