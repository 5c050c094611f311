"""Channel coupling: which layers must keep all their output channels.

These are the layers whose output channels are read by something other than a layer's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from starfire_prune.structure import ops
from starfire_prune.structure.abstract_values import shape_of
from starfire_prune.structure.graph import Graph, is_known, layer_of, place_of
from starfire_prune.structure.ops import CONVOLUTIONS, LINEAR
from starfire_prune.structure.rules import MIXING, RULES
from starfire_prune.utils.modules import clean_name

__all__ = ["required_outputs"]


aten = torch.ops.aten
_CONCATENATION = aten.cat.default


def required_outputs(graph: Graph, names: Iterable[str] = ()) -> dict[str, str]:
    """The layers whose output channels must all be kept, and why.

    An output channel can be removed if only weights of layers read it, also through operations that
    treat each channel separately. The model's output, norms over channels, reshaping other than
    flattening, splitting, and operations without a rule need all channels. So does a layer that
    computes its weight, by parameters that are not cut with it.

    Args:
        graph: The model's graph in eval mode.
        names: Names of all the model's layers.

    Returns:
        The reason by the layer's name.
    """
    layers = (layer_of(graph, node) for node in graph.nodes)
    read = {clean_name(name) for name in layers if name is not None}
    unread = "no operation of the model reads its weight as it is"
    required = {name: unread for name in names if name not in read}
    given = _given(graph)
    for node in graph.nodes:
        name = layer_of(graph, node)
        if name is not None:
            reason = next(_obstacles(graph, given, node, _channel_dim(node)), None)
            if not _is_read_by_layers_only(graph, node):
                reason = "its weight is also read elsewhere"
            if reason is not None:
                required.setdefault(name, reason)
    return required


def _given(graph: Graph) -> set[fx.Node]:
    """Nodes with channels that no layer produces: parameters, constants, and the model's inputs.

    They include the outputs of operations on such nodes only, and concatenations with any of them.
    """
    given: set[fx.Node] = set()
    for node in graph.nodes:
        layer = layer_of(graph, node) is not None
        joined = node.target is _CONCATENATION and not given.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or joined or (not layer and is_known(node, given)):
            given.add(node)
    return given


def _is_read_by_layers_only(graph: Graph, node: fx.Node) -> bool:
    """Whether only layers read the weight of a layer's node, each as its weight."""
    weight: Any = node.args[1]
    return all(layer_of(graph, user) and user.args[1] is weight for user in weight.users)


def _channel_dim(node: fx.Node) -> int:
    dims = len(shape_of(node))
    return dims - 1 if node.target is LINEAR else dims - len(shape_of(node.args[1])) + 1


def _obstacles(graph: Graph, given: set[fx.Node], start: fx.Node, dim: int) -> Iterator[str]:
    """Why channels along `dim` of a node must be kept, for all users up to the next layers."""
    pending, seen = [(start, dim)], set()
    while pending:
        node, dim = pending.pop()
        for user in node.users:
            if user.op == "output":
                yield "its channels are the model's output"
                continue
            after = _follow(graph, given, user, node, dim)
            if after is None:
                yield f"all its channels are needed by {user.target} in {place_of(user)}"
            elif after >= 0 and (user, after) not in seen:
                seen.add((user, after))
                pending.append((user, after))


def _follow(
    graph: Graph, given: set[fx.Node], user: fx.Node, node: fx.Node, dim: int
) -> int | None:
    """Dimension of the channels after `user`: -1 if a layer reads them, None if it needs all."""
    if user.target in CONVOLUTIONS or user.target is LINEAR:
        layer = layer_of(graph, user) is not None
        reads = layer and user.args[0] is node and _is_read_by_layers_only(graph, user)
        own = len(shape_of(node)) - (
            1 if user.target is LINEAR else len(shape_of(user.args[1])) - 1
        )
        return -1 if reads and dim == own else None
    if user.target not in RULES or user.target in MIXING:
        return None
    dim_after = _DIM_AFTER.get(user.target)
    if dim_after is not None:
        return None if user in given else dim_after(user, dim)
    if user.target in _NEEDS_ALL:
        return None
    others = [other for other in user.all_input_nodes if other is not node]
    if user.target in ops.BATCH_NORMS:
        return dim if dim == 1 and all(other.name in graph.sources for other in others) else None
    separate = all(_has_channels(other, node, dim, other in given) for other in others)
    return dim if separate else None


def _has_channels(other: fx.Node, node: fx.Node, dim: int, given: bool) -> bool:
    """Whether an operand has the node's channels, or is a single number for all of them."""
    if math.prod(shape_of(other)) == 1:
        return True
    from_right = dim - len(shape_of(node))
    shape = shape_of(other)
    return not given and len(shape) >= -from_right and shape[from_right] == shape_of(node)[dim]


def _after_reshape(user: fx.Node, dim: int) -> int | None:
    """Flattening keeps a channel's values together, and so does removing dimensions of size 1."""
    before, after = shape_of(user.args[0]), shape_of(user)
    flat = (before[0], math.prod(before[1:]))
    return 1 if dim == 1 and after == flat else None


def _after_permute(user: fx.Node, dim: int) -> int | None:
    dims: Any = user.args[1]
    return [d % len(dims) for d in dims].index(dim)


def _after_reduction(user: fx.Node, dim: int) -> int | None:
    dims: Any = user.args[1] if len(user.args) > 1 else None
    keepdim = user.args[2] if len(user.args) > 2 else user.kwargs.get("keepdim", False)
    if not dims:
        return None
    reduced = {d % len(shape_of(user.args[0])) for d in dims}
    if dim in reduced:
        return None
    return dim if keepdim else dim - sum(d < dim for d in reduced)


def _after_concatenation(user: fx.Node, dim: int) -> int | None:
    along: Any = user.args[1] if len(user.args) > 1 else 0
    return dim if along % len(shape_of(user)) == dim else None


def _after_padding(user: fx.Node, dim: int) -> int | None:
    pad: Any = user.args[1]
    return dim if dim < len(shape_of(user)) - len(pad) // 2 else None


def _after_item(user: fx.Node, dim: int) -> int | None:
    return dim if user.args[1] == 0 else None


_DIM_AFTER: Mapping[Any, Callable[[fx.Node, int], int | None]] = {
    **dict.fromkeys(ops.RESHAPING, _after_reshape),
    **dict.fromkeys(ops.REDUCTIONS, _after_reduction),
    aten.permute.default: _after_permute,
    _CONCATENATION: _after_concatenation,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _after_padding),
    ops.ITEM: _after_item,
}
_NEEDS_ALL = {
    *ops.SPLITTING,
    *(aten.transpose.int, aten.t.default, aten.expand.default),
    *(aten.select.int, aten.slice.Tensor),
}
