"""Steps from a graph of operations: batch norms folded, activations and additions joined."""

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
    Pooling,
    Step,
    Value,
)
from starfire_prune.sparse.supported import (
    BATCH_NORM,
    BOUNDS,
    CONVOLUTIONS,
    RENAMES,
    Constants,
    argument_of,
    aten,
    bounds,
    convolution_window,
    pooling_window,
    shape_of,
)

__all__ = ["Reader"]


# ---------------------------------------------------------------------------------------------
# Reading them
# ---------------------------------------------------------------------------------------------


class Reader:
    """Reads a graph's nodes, one after the other.

    Attributes:
        steps: what they became.
        values: of the nodes read, and of those given.
    """

    def __init__(self, constants: Constants) -> None:
        self.steps: list[Step] = []
        self.values: dict[fx.Node, Value] = {}
        self._constants = constants
        self._makers: dict[Value, Step] = {}

    def give(self, node: fx.Node) -> Value:
        """Take a node as an input."""
        self.values[node] = self._new(shape_of(node))
        return self.values[node]

    def read(self, node: fx.Node) -> None:
        """Turn a node into a step or make it part of one."""
        self.values[node] = READERS[node.target](self, node)

    def _new(self, shape: tuple[int, ...]) -> Value:
        return Value(*shape[1:])

    def _add(self, step: Step) -> Value:
        self.steps.append(step)
        self._makers[step.output] = step
        return step.output

    def _constant(self, node: Any) -> NDArray[Any] | None:
        """A parameter's numbers, in float64."""
        if node is None:
            return None
        values: NDArray[Any] = self._constants[node].detach().to(torch.float64).numpy()
        return values

    def _source(self, node: fx.Node) -> Value:
        source: Any = node.args[0]
        return self.values[source]

    def _open(self, node: Any) -> Any:
        """The step that made a node's value, if what alone reads it can still be joined to it."""
        step = self._makers.get(self.values[node])
        joinable = isinstance(step, (Layer, Copy, Pooling)) and not step.is_clamped
        return step if joinable and _readers(node) == 1 else None

    def _layer(self, node: fx.Node) -> Value:
        weight: Any = self._constant(node.args[1])
        bias = self._constant(argument_of(node, 2, "bias", None))
        source, output = self._source(node), self._new(shape_of(node))
        bias = np.zeros(len(weight)) if bias is None else bias
        if node.target is aten.linear.default:
            return self._add(Linear(source, output, weight=weight, bias=bias))
        window = convolution_window(node)
        groups = argument_of(node, 6, "groups", 1)
        if window.is_point and window.stride != (1, 1):
            thinned = Value(source.channels, output.height, output.width)
            source = self._add(Copy(source, thinned, stride=window.stride))
            window = window._replace(stride=(1, 1))
        layer = Convolution(source, output, weight=weight, bias=bias, groups=groups, window=window)
        return self._add(layer)

    def _norm(self, node: fx.Node) -> Value:
        weight, bias, mean, var = (self._constant(argument) for argument in node.args[1:5])
        scale = 1 / np.sqrt(var + node.args[6])  # type: ignore[operator]
        scale = scale if weight is None else scale * weight
        shift = (0.0 if bias is None else bias) - mean * scale  # type: ignore[operator]
        step: Step | None = self._open(node.args[0])
        if not isinstance(step, (Layer, Copy)) or step.residual is not None:
            source = self._source(node)
            step = Copy(source, Value(source.channels, *source.size))
            self._add(step)
        step.rescale(scale, shift)
        return step.output

    def _activation(self, node: fx.Node) -> Value:
        step: Step | None = self._open(node.args[0])
        if step is None:
            source = self._source(node)
            step = Copy(source, Value(source.channels, *source.size))
            self._add(step)
        step.low, step.high = bounds(node)
        return step.output

    def _sum(self, node: fx.Node) -> Value:
        one, other = node.args[:2]
        for node_, added in ((one, other), (other, one)):
            step = self._open(node_)
            joinable = isinstance(step, Convolution) and step.residual is None
            if joinable and one is not other:
                self.steps.remove(step)  # what is added may be made after it
                step.residual = self.values[added]  # type: ignore[index]
                return self._add(step)
        source = self._source(node)
        output = Value(source.channels, *source.size)
        return self._add(Copy(source, output, self.values[other]))  # type: ignore[index]

    def _join(self, node: fx.Node) -> Value:
        output, first = self._new(shape_of(node)), 0
        parts: Any = node.args[0]
        for part in parts:
            source = self.values[part]
            self.steps.append(Copy(source, output, first=first))
            first += source.channels
        return output

    def _pooling(self, node: fx.Node) -> Value:
        window, source = pooling_window(node), self._source(node)
        average = node.target is not aten.max_pool2d.default
        maker = self._makers.get(source)
        positive = average or (maker is not None and min(maker.low, maker.high) >= 0)
        fill = 0.0 if positive else -math.inf
        scale = 1 / math.prod(window.size) if average else None
        output = self._new(shape_of(node))
        return self._add(Pooling(source, output, window=window, fill=fill, scale=scale))

    def _mean(self, node: fx.Node) -> Value:
        return self._add(Mean(self._source(node), self._new(shape_of(node))))

    def _adaptive(self, node: fx.Node) -> Value:
        return self._mean(node) if shape_of(node)[2:] == (1, 1) else self._pooling(node)

    def _flatten(self, node: fx.Node) -> Value:
        source = self._source(node)
        if source.size == (1, 1):
            return source
        return self._add(Flatten(source, self._new(shape_of(node))))

    def _same(self, node: fx.Node) -> Value:
        return self._source(node)


def _readers(node: fx.Node) -> int:
    """How many operations read a node's value, also by its other names."""
    while node.target in RENAMES:
        node = node.args[0]  # type: ignore[assignment]
    return _readers_below(node)


def _readers_below(node: fx.Node) -> int:
    return sum(_readers_below(user) if user.target in RENAMES else 1 for user in node.users)


READERS: dict[Any, Callable[[Reader, fx.Node], Value]] = {
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), Reader._layer),
    BATCH_NORM: Reader._norm,
    operator.getitem: Reader._same,
    aten.add.Tensor: Reader._sum,
    aten.cat.default: Reader._join,
    aten.max_pool2d.default: Reader._pooling,
    aten.avg_pool2d.default: Reader._pooling,
    aten.adaptive_avg_pool2d.default: Reader._adaptive,
    aten.mean.dim: Reader._mean,
    aten.view.default: Reader._flatten,
    **dict.fromkeys(BOUNDS, Reader._activation),
    aten.clone.default: Reader._same,
}
