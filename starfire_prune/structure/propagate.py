"""Propagation of abstract values through an exported graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune.structure import rules
from starfire_prune.structure.abstract_values import VARYING, abstract, varying
from starfire_prune.structure.graph import Graph, is_known, is_weight_of, place_of, without_autocast
from starfire_prune.structure.ops import BATCH_NORMS, CENTERING_NORMS, CONVOLUTIONS, LINEAR
from starfire_prune.structure.rules import MIXING, RULES
from starfire_prune.utils.modules import effective_weight

__all__ = ["propagate", "why_varying"]


@without_autocast()
@torch.no_grad()
def propagate(graph: Graph, model: nn.Module) -> tuple[dict[fx.Node, Any], list[str]]:
    """The abstract value or known tensor of each node, and the operations without a rule."""
    values: dict[fx.Node, Any] = {}
    known: set[fx.Node] = set()  # parameters, and what is computed from known tensors only
    unknown: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node], is_source = _source(graph, model, node)
            if is_source:
                known.add(node)
        elif node.op == "call_function":
            if is_known(node, known):
                values[node] = _call(node, values)
                known.add(node)
                continue
            value = _by_rule(node, values, known, graph.training)
            if value is NotImplemented:
                unknown.append(f"{node.target} in {place_of(node)}")
                value = _all_varying(node)
            values[node] = value
    return values, unknown


def _source(graph: Graph, model: nn.Module, node: fx.Node) -> tuple[Any, bool]:
    """The tensor of a parameter or buffer as a forward pass would use it, and whether it is known.

    Not known are the model's inputs, what a forward pass changes, and in training vectors whose
    zeros may change; for these the abstract value is returned.
    """
    if "constant" in node.meta:
        return node.meta["constant"], True
    if node.name not in graph.sources or _changes(graph, node):
        return _all_varying(node), False
    path, _, name = graph.sources[node.name].rpartition(".")
    module = model.get_submodule(path)
    if f"{name}_orig" in module._parameters:
        return effective_weight(module, name), True
    value: Tensor = getattr(module, name)
    if graph.training and _is_trained_vector(node, value) and not bool(value.all()):
        vector = abstract(value)
        return vector.masked_fill(vector == 0, VARYING), False
    return value, True


def _changes(graph: Graph, node: fx.Node) -> bool:
    """Whether a forward pass changes a buffer, other than the statistics of batch norms."""
    users = graph.users(node)
    return node.name in graph.changed and not all(
        rules.is_statistic(user, placeholder) for user, placeholder in users
    )


def _is_trained_vector(node: fx.Node, value: Tensor) -> bool:
    """Whether training changes a vector, such as a bias, a norm's weight or a single number."""
    trained = isinstance(value, nn.Parameter) and value.requires_grad
    vector = value.numel() == max(value.shape, default=1)
    return trained and vector and not any(is_weight_of(node, user) for user in node.users)


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _by_rule(
    node: fx.Node, values: Mapping[fx.Node, Any], known: set[fx.Node], training: bool
) -> Any:
    rule = RULES.get(node.target)
    if rule is None:
        return NotImplemented

    def operand(argument: fx.Node) -> Any:
        value = values[argument]
        return _with_infinity(value) if argument in known else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    if training and _is_centered(node):
        args = (*args[:2], None, *args[3:])
    value = rule(node, *args, **kwargs)
    if isinstance(value, (tuple, list)):
        items = zip(value, _all_varying(node), strict=False)  # norms have three outputs or five
        return [other if item is None else _overflow_varies(item) for item, other in items]
    return value if value is NotImplemented else _overflow_varies(value)


def _with_infinity(value: Any) -> Any:
    """A parameter with infinity for NaN, which rules would understand as varying."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (
        value if bool(value.sum().isfinite()) else value.nan_to_num(math.inf, math.inf, -math.inf)
    )


def _is_centered(node: fx.Node) -> bool:
    """Whether only batch norms read a layer's node; they subtract its bias, whatever it is."""
    is_layer = node.target in CONVOLUTIONS or node.target is LINEAR
    return is_layer and all(
        user.target in CENTERING_NORMS and user.args[0] is node for user in node.users
    )


def _overflow_varies(value: Any) -> Any:
    """The value with overflowed constants as varying."""
    if not isinstance(value, Tensor):
        return value
    return value.masked_fill(~value.isfinite(), VARYING)


def _all_varying(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [varying(item.ndim) if item is not None else None for item in value]
    return varying(value.ndim) if isinstance(value, Tensor) else value


def why_varying(node: Any, values: Mapping[fx.Node, Any]) -> str:
    """Why a tensor has no constant channel: the operation after which none is left."""
    node = _origin(node, values)
    if node.op == "placeholder":
        return "it reads the model's input"
    if node.target in MIXING:
        return f"its input comes from {place_of(node)}, a norm over channels, which mixes them"
    if node.target not in RULES:
        return f"its input comes from {node.target}, which the analysis has no rule for"
    if node.target in CONVOLUTIONS or node.target is LINEAR:
        return f"every output channel of {place_of(node)} has a weight that reads a varying channel"
    operands = [values[argument] for argument in node.all_input_nodes]
    if len(operands) > 1 and node.target is torch.ops.aten.add.Tensor:
        both = all(bool(operand.isnan().all()) for operand in operands)
        sides = "both sides vary" if both else "one side or both vary in every channel"
        return f"its input comes from an addition in which {sides}"
    return (
        f"its input comes from {node.target} in {place_of(node)}, after which every channel varies"
    )


def _origin(node: fx.Node, values: Mapping[fx.Node, Any]) -> fx.Node:
    """The node before operations that vary only because their single operand varies."""
    while (node.target in RULES and len(node.all_input_nodes) == 1) or node.target in BATCH_NORMS:
        operand = node.all_input_nodes[0]
        value = values[operand]
        first = value[0] if isinstance(value, list) else value
        if node.target in MIXING or not bool(first.isnan().all()):
            return node
        node = operand
    return node
