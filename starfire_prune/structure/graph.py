"""A model's exported graph: the layers of its nodes, and what else uses their weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from starfire_prune.methods.base import make_permanent
from starfire_prune.structure.exporting import exported_program
from starfire_prune.structure.ops import CONVOLUTIONS, CREATING, LINEAR
from starfire_prune.structure.rules import is_pure
from starfire_prune.utils.marks import unmark
from starfire_prune.utils.modules import copied_module, unwrap

__all__ = [
    "Graph",
    "dense_copy",
    "exported_graph",
    "is_known",
    "is_weight_of",
    "layer_of",
    "place_of",
    "used_elsewhere",
    "without_autocast",
]


@dataclasses.dataclass(frozen=True)
class Graph:
    """An exported model.

    Attributes:
        nodes: Nodes in the order of execution.
        sources: Name of the parameter or buffer of a placeholder, by the placeholder's name.
        tied: Placeholders of the same memory, by the name of each of them.
        changed: Names of placeholders of parameters and buffers that a forward pass changes.
        training: Whether the model was exported in training mode.
    """

    nodes: tuple[fx.Node, ...]
    sources: Mapping[str, str]
    tied: Mapping[str, tuple[fx.Node, ...]]
    changed: frozenset[str]
    training: bool

    def users(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The users of a placeholder and those tied to it, each with the placeholder it reads."""
        for placeholder in self.tied.get(node.name, (node,)):
            for user in placeholder.users:
                yield user, placeholder


def exported_graph(model: nn.Module, example: tuple[Any, ...], training: bool) -> Graph:
    """Export a copy of a model, with pruning made permanent, in training or eval mode.

    Raises:
        TraceError: If `torch.export` can't trace the model.
    """
    model = dense_copy(model).train(training)
    with without_autocast():
        exported = exported_program(model, example).run_decompositions({})
    signature = exported.graph_signature
    nodes = tuple(exported.graph.nodes)
    sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    for node in nodes:
        if node.name in constants:
            node.meta["constant"] = exported.constants[constants[node.name]]
    parameters = getattr(signature, "parameters_to_mutate", {})  # not in torch 2.6
    changed = {*signature.buffers_to_mutate.values(), *parameters.values()}
    tied = _tied(model, [node for node in nodes if node.name in sources], sources)
    names = {
        twin.name for node in nodes if sources.get(node.name) in changed for twin in tied[node.name]
    }
    return Graph(nodes, sources, tied, frozenset(names), training)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast, which would wrap the complete exported graph in one operation."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _tied(
    model: nn.Module, nodes: list[fx.Node], sources: Mapping[str, str]
) -> dict[str, tuple[fx.Node, ...]]:
    """The placeholders of the same memory, by the name of each."""
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        path, _, name = sources[node.name].rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(path), name)
        memory = tensor.untyped_storage()._cdata  # its address, of meta tensors too
        groups.setdefault(memory, []).append(node)
    return {node.name: tuple(group) for group in groups.values() for node in group}


def dense_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model with pruning made permanent.

    Args:
        model: A model in any phase of pruning, possibly wrapped by DDP or `torch.compile`.
    """
    model = unwrap(model)
    twin = copied_module(model)
    unmark(twin.modules(), only_finished=True)  # its weights may be changed
    for module in twin.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                make_permanent(module, hook._tensor_name)
    return twin


def layer_of(graph: Graph, node: fx.Node) -> str | None:
    """The name of the layer whose weight a convolution or linear node reads.

    It is empty if the model itself is the layer.
    """
    if node.target not in CONVOLUTIONS and node.target is not LINEAR:
        return None
    path, _, name = graph.sources.get(getattr(node.args[1], "name", ""), "").rpartition(".")
    return path if name == "weight" else None


def used_elsewhere(graph: Graph, node: fx.Node) -> str | None:
    """What else uses the weight of a layer's node; None if nothing does."""
    weight: Any = node.args[1]
    for user, placeholder in graph.users(weight):
        if user.op == "output":
            return "its weight is also an output of the model"
        if placeholder is not weight or not is_weight_of(placeholder, user):
            return f"its weight is also used by {user.target} in {place_of(user)}"
    return None


def is_weight_of(placeholder: fx.Node, user: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer that reads a placeholder as weight only."""
    is_layer = user.target in CONVOLUTIONS or user.target is LINEAR
    return is_layer and [a for a in user.args if a is placeholder] == [user.args[1]]


def is_known(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether an operation's output can be computed from known tensors only."""
    inputs = node.all_input_nodes
    if not inputs:
        return node.target in CREATING
    return known.issuperset(inputs) and is_pure(node)


def place_of(node: fx.Node) -> str:
    """The module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values())) if path), "")
    return path or "the model"
