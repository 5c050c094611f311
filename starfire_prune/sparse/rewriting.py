"""Rewrites graphs so that channels come second, and combines what is one operation of the kernels.

Networks such as ConvNeXt move the channels of images to the end for layer norms and linear layers.
Here each operation on such images becomes one on images whose channels come second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

__all__ = ["channel_norm", "global_response", "rewrite"]


aten = torch.ops.aten
TO_LAST, FROM_LAST = [0, 2, 3, 1], [0, 3, 1, 2]
_UNARY = (
    *(aten.relu.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.clone.default, aten.alias.default),
)
_BROADCASTING = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.addcmul.default),
)


def channel_norm(images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A layer norm over the channels of each pixel of images, `(N, C, H, W)`."""
    last = images.permute(TO_LAST)
    return functional.layer_norm(last, last.shape[3:], weight, bias, eps).permute(FROM_LAST)


def global_response(norms: Tensor, epsilon: float) -> Tensor:
    """Numbers for each channel, `(N, C, 1, 1)`, divided by their mean plus `epsilon`."""
    return norms / (norms.mean(1, keepdim=True) + epsilon)


def rewrite(graph: fx.GraphModule) -> None:
    """Rewrite a graph in place; its outputs stay the same."""
    _ChannelsSecond(graph.graph).run()
    for node in graph.graph.find_nodes(op="call_function", target=aten.div.Tensor):
        _combine_response(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _combine_response(node: fx.Node) -> None:
    """Make a division of norms by their mean over channels one operation."""
    norms, total = node.args
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or total.kwargs:
        return
    mean, epsilon = total.args
    is_mean = isinstance(mean, fx.Node) and mean.target is aten.mean.dim and not mean.kwargs
    if is_mean and mean.args == (norms, [1], True) and isinstance(epsilon, float):  # type: ignore[union-attr]
        with node.graph.inserting_before(node):
            combined = node.graph.call_function(global_response, (norms, epsilon))
        combined.meta = node.meta
        node.replace_all_uses_with(combined)


class _ChannelsSecond:
    """Moves permutations of images to channels-last behind the operations that read them."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._second: dict[Any, fx.Node] = {}  # by a node whose channels come last: the same image

    def run(self) -> None:
        """Rewrite the graph; permutations that are left are those that other operations read."""
        for node in list(self._graph.nodes):
            if node.target is aten.permute.default:
                self._permute(node)
            elif any(source in self._second for source in node.all_input_nodes):
                self._move(node)
        for node, second in reversed(self._second.items()):
            if node.target is not aten.permute.default and node.users:
                with self._graph.inserting_before(node):
                    last = self._graph.call_function(aten.permute.default, (second, TO_LAST))
                last.meta = node.meta
                node.replace_all_uses_with(last)
            if not node.users:
                self._graph.erase_node(node)

    def _permute(self, node: fx.Node) -> None:
        source, order = node.args
        if order == FROM_LAST and source in self._second:
            node.replace_all_uses_with(self._second[source])
        elif order == TO_LAST and isinstance(source, fx.Node):
            self._second[node] = source

    def _move(self, node: fx.Node) -> None:
        rule = _RULES.get(node.target)
        value = node.meta.get("val")
        if rule is None or not isinstance(value, Tensor) or value.ndim != 4:
            return
        with self._graph.inserting_before(node):
            call = rule(self, node)
            if call is None:
                return
            target, arguments, options = call
            moved = self._graph.call_function(target, arguments, options)
        moved.meta = {**node.meta, "val": value.permute(FROM_LAST)}
        self._second[node] = moved

    def _unary(self, node: fx.Node) -> Any:
        return node.target, (self._second[node.args[0]], *node.args[1:]), node.kwargs

    def _broadcasting(self, node: fx.Node) -> Any:
        """Each operand is an image, a number, or has one number for each channel."""
        moved = [self._operand(operand) for operand in node.args]
        return None if None in moved else (node.target, tuple(moved), node.kwargs)

    def _operand(self, operand: Any) -> Any:
        if operand in self._second or not isinstance(operand, fx.Node):
            return self._second.get(operand, operand)
        shape = operand.meta["val"].shape
        if not shape or any(size != 1 for size in shape[:-1]):
            return None
        return self._view(operand, [shape[-1], 1, 1])

    def _view(self, node: fx.Node, shape: list[int]) -> fx.Node:
        view = self._graph.call_function(aten.view.default, (node, shape))
        view.meta = {"val": node.meta["val"].reshape(shape)}
        return view

    def _layer_norm(self, node: fx.Node) -> Any:
        source, shape, weight, bias, epsilon = (*node.args, None, None, 1e-5)[:5]
        if len(node.args) < 5 or len(shape) != 1:  # type: ignore[arg-type]
            return None
        return channel_norm, (self._second[source], weight, bias, epsilon), {}

    def _linear(self, node: fx.Node) -> Any:
        source, weight, *rest = node.args
        if source not in self._second or weight in self._second:
            return None
        shape = [*weight.meta["val"].shape, 1, 1]  # type: ignore[union-attr]
        kernel = self._view(weight, shape)  # type: ignore[arg-type]
        return aten.conv2d.default, (self._second[source], kernel, *rest), {}

    def _reduction(self, node: fx.Node, at: int) -> Any:
        """A mean or a norm that keeps its dimensions; `at` is the argument of those it is over."""
        dims: Any = node.args[at] if len(node.args) == at + 2 else None
        if dims is None or not node.args[at + 1] or node.kwargs:
            return None
        moved = sorted(TO_LAST[dim % 4] for dim in dims)
        before = node.args[1:at]
        return node.target, (self._second[node.args[0]], *before, moved, True), {}

    def _mean(self, node: fx.Node) -> Any:
        return self._reduction(node, 1)

    def _norm(self, node: fx.Node) -> Any:
        return self._reduction(node, 2)


_RULES: dict[Any, Callable[[_ChannelsSecond, fx.Node], Any]] = {
    **dict.fromkeys(_UNARY, _ChannelsSecond._unary),
    **dict.fromkeys(_BROADCASTING, _ChannelsSecond._broadcasting),
    aten.layer_norm.default: _ChannelsSecond._layer_norm,
    aten.linear.default: _ChannelsSecond._linear,
    aten.mean.dim: _ChannelsSecond._mean,
    aten.linalg_vector_norm.default: _ChannelsSecond._norm,
}
