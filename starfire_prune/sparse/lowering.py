"""Lowers a graph to IR ops: folds batch norms, and fuses activations and additions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from starfire_prune.sparse.ir import (
    Convolution,
    Copy,
    Flatten,
    Layer,
    Linear,
    Mean,
    Op,
    Pooling,
    Value,
)
from starfire_prune.sparse.supported import (
    ALIASES,
    BATCH_NORM,
    BOUNDS,
    CONVOLUTIONS,
    Constants,
    argument_of,
    aten,
    bounds,
    convolution_window,
    pooling_window,
    shape_of,
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

    def add_input(self, node: fx.Node) -> Value:
        """Make a node an input."""
        self.values[node] = self._new_value(shape_of(node))
        return self.values[node]

    def lower(self, node: fx.Node) -> None:
        """Turn a node into an op, or fuse it into a previous one."""
        self.values[node] = RULES[node.target](self, node)

    def _new_value(self, shape: tuple[int, ...]) -> Value:
        return Value(*shape[1:])

    def _add(self, op: Op) -> Value:
        self.ops.append(op)
        self._producers[op.output] = op
        return op.output

    def _constant(self, node: Any) -> NDArray[Any] | None:
        """A parameter in float64."""
        if node is None:
            return None
        values: NDArray[Any] = self._constants[node].detach().to(torch.float64).numpy()
        return values

    def _source(self, node: fx.Node) -> Value:
        source: Any = node.args[0]
        return self.values[source]

    def _fusable(self, node: Any) -> Any:
        """The op that computes a node's value, if the value's only user can be fused into it."""
        op = self._producers.get(self.values[node])
        open_ended = isinstance(op, (Layer, Copy, Pooling)) and not op.is_clamped
        return op if open_ended and _count_users(node) == 1 else None

    def _layer(self, node: fx.Node) -> Value:
        weight: Any = self._constant(node.args[1])
        bias = self._constant(argument_of(node, 2, "bias", None))
        source, output = self._source(node), self._new_value(shape_of(node))
        bias = np.zeros(len(weight)) if bias is None else bias
        if node.target is aten.linear.default:
            return self._add(Linear(source, output, weight=weight, bias=bias))
        window = convolution_window(node)
        groups = argument_of(node, 6, "groups", 1)
        if window.is_pointwise and window.stride != (1, 1):
            thinned = Value(source.channels, output.height, output.width)
            source = self._add(Copy(source, thinned, stride=window.stride))
            window = window._replace(stride=(1, 1))
        layer = Convolution(source, output, weight=weight, bias=bias, groups=groups, window=window)
        return self._add(layer)

    def _batch_norm(self, node: fx.Node) -> Value:
        weight, bias, mean, var = (self._constant(argument) for argument in node.args[1:5])
        scale = 1 / np.sqrt(var + node.args[6])  # type: ignore[operator]
        scale = scale if weight is None else scale * weight
        shift = (0.0 if bias is None else bias) - mean * scale  # type: ignore[operator]
        op: Op | None = self._fusable(node.args[0])
        if not isinstance(op, (Layer, Copy)) or op.residual is not None:
            source = self._source(node)
            op = Copy(source, Value(source.channels, *source.size))
            self._add(op)
        op.rescale(scale, shift)
        return op.output

    def _activation(self, node: fx.Node) -> Value:
        op: Op | None = self._fusable(node.args[0])
        if op is None:
            source = self._source(node)
            op = Copy(source, Value(source.channels, *source.size))
            self._add(op)
        op.low, op.high = bounds(node)
        return op.output

    def _sum(self, node: fx.Node) -> Value:
        one, other = node.args[:2]
        for summand, added in ((one, other), (other, one)):
            op = self._fusable(summand)
            fusable = isinstance(op, Convolution) and op.residual is None
            if fusable and one is not other:
                self.ops.remove(op)  # the added value may be computed after it
                op.residual = self.values[added]  # type: ignore[index]
                return self._add(op)
        source = self._source(node)
        output = Value(source.channels, *source.size)
        return self._add(Copy(source, output, self.values[other]))  # type: ignore[index]

    def _concatenation(self, node: fx.Node) -> Value:
        output, first = self._new_value(shape_of(node)), 0
        sources: Any = node.args[0]
        for each in sources:
            source = self.values[each]
            self.ops.append(Copy(source, output, first=first))
            first += source.channels
        return output

    def _pooling(self, node: fx.Node) -> Value:
        window, source = pooling_window(node), self._source(node)
        average = node.target is not aten.max_pool2d.default
        producer = self._producers.get(source)
        positive = average or (producer is not None and min(producer.low, producer.high) >= 0)
        fill = 0.0 if positive else -math.inf
        scale = 1 / math.prod(window.size) if average else None
        output = self._new_value(shape_of(node))
        return self._add(Pooling(source, output, window=window, fill=fill, scale=scale))

    def _mean(self, node: fx.Node) -> Value:
        return self._add(Mean(self._source(node), self._new_value(shape_of(node))))

    def _adaptive_pooling(self, node: fx.Node) -> Value:
        return self._mean(node) if shape_of(node)[2:] == (1, 1) else self._pooling(node)

    def _flatten(self, node: fx.Node) -> Value:
        source = self._source(node)
        if source.size == (1, 1):
            return source
        return self._add(Flatten(source, self._new_value(shape_of(node))))

    def _alias(self, node: fx.Node) -> Value:
        return self._source(node)


def _count_users(node: fx.Node) -> int:
    """The number of operations that read a node's value, directly or through an alias."""
    while node.target in ALIASES:
        node = node.args[0]  # type: ignore[assignment]
    return _count_users_below(node)


def _count_users_below(node: fx.Node) -> int:
    return sum(_count_users_below(user) if user.target in ALIASES else 1 for user in node.users)


RULES: dict[Any, Callable[[Lowering, fx.Node], Value]] = {
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), Lowering._layer),
    BATCH_NORM: Lowering._batch_norm,
    operator.getitem: Lowering._alias,
    aten.add.Tensor: Lowering._sum,
    aten.cat.default: Lowering._concatenation,
    aten.max_pool2d.default: Lowering._pooling,
    aten.avg_pool2d.default: Lowering._pooling,
    aten.adaptive_avg_pool2d.default: Lowering._adaptive_pooling,
    aten.mean.dim: Lowering._mean,
    aten.view.default: Lowering._flatten,
    **dict.fromkeys(BOUNDS, Lowering._activation),
    aten.clone.default: Lowering._alias,
}
