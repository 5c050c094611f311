"""Constant channels: which channels of a model have the same value whatever its input.

A convolution's output channel whose kernels are all zero is its bias; batch norms, activations and
pooling carry constants on. What reads a zero constant is useless, and what reads another one can be
folded into a bias (`starfire_prune.folding`). The analysis runs over the graph of `torch.export`,
by the rules of `starfire_prune.constant_rules`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from starfire_prune import constant_rules
from starfire_prune.constant_rules import BATCH_NORMS, CONVOLUTIONS, LINEAR, MIXING, RULES
from starfire_prune.layers import clean_name, unwrap
from starfire_prune.mask_method import make_permanent, masked_parameter
from starfire_prune.templates import VARYING, channel_values, shape_of, varying

__all__ = [
    "ChannelAnalysis",
    "ConstantChannels",
    "Graph",
    "LayerChannels",
    "dense_copy",
    "is_known",
    "layer_of",
    "over_weight",
    "place_of",
]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerChannels:
    """The constant channels around a convolution or linear layer.

    Attributes:
        name: of the module.
        kind: `"conv"` or `"linear"`.
        inputs: the constant of each input channel or feature, float64 of shape `(C,)`; NaN where
            it varies, and where calls of the same layer differ.
        outputs: the same of its output channels, of shape `(K,)`.
        dead: the output channels whose weights are all zero, bool of shape `(K,)`.
        padded: whether it pads its input by zeros, which a constant other than zero doesn't pass.
        reason: where its inputs all vary, why.
    """

    name: str
    kind: str
    inputs: Tensor
    outputs: Tensor
    dead: Tensor
    padded: bool
    reason: str | None

    @property
    def zero_inputs(self) -> Tensor:
        """The input channels that are constantly zero, bool of shape `(C,)`."""
        return self.inputs == 0

    @property
    def constant_inputs(self) -> Tensor:
        """The input channels that are constant, zero or not, bool of shape `(C,)`."""
        return self.inputs.isfinite()

    @property
    def constant_outputs(self) -> Tensor:
        """The output channels that are constant, bool of shape `(K,)`."""
        return self.outputs.isfinite()


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantChannels:
    """What an analysis found.

    Attributes:
        layers: a `LayerChannels` for each convolution and linear layer, in the order of use.
        unknown: the operations that the analysis has no rule for, and where; their outputs count
            as varying.
    """

    layers: tuple[LayerChannels, ...]
    unknown: tuple[str, ...]

    def __getitem__(self, name: str) -> LayerChannels:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no convolution or linear layer {name!r} in the model's graph")


@dataclasses.dataclass(frozen=True)
class Graph:
    """An exported model: its nodes, and the names of the parameters and buffers that it reads."""

    nodes: tuple[fx.Node, ...]
    sources: Mapping[str, str]


class ChannelAnalysis:
    """Finds the constant channels of a model, as often as its weights change.

    The model is exported once. A run then carries constants through the graph with the weights as
    they are: masked where hooks prune them. The model is left as it is, hooks and all.

    Args:
        model: also wrapped by DDP or `torch.compile`, in any phase of pruning.
        example_input: a small batch of any size, or the tuple of the model's arguments.

    Raises:
        torch._dynamo.exc.UserError and others of `torch.export`: if it can't export the model.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3)
        >>> model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(18, 10))
        >>> with torch.no_grad():
        ...     conv.weight[0] = 0
        ...     _ = conv.bias.copy_(torch.tensor([-1.0, 1.0]))
        >>> channels = ChannelAnalysis(model, torch.rand(1, 1, 5, 5)).run()
        >>> int(channels["3"].zero_inputs.sum())
        9
    """

    def __init__(self, model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> None:
        self._model = unwrap(model)
        self._example = example_input if isinstance(example_input, tuple) else (example_input,)
        self._training_graph: Graph | None = None
        self.graph = self._exported(training=False)

    def run(self) -> ConstantChannels:
        """The channels that are constant in eval mode, with the model's present weights."""
        return _run(self.graph, self._model)

    def zero_inputs(self) -> dict[str, Tensor]:
        """The input channels of each layer that are zero while training and in eval mode alike.

        A dead channel may be zero in the one and not in the other, since a batch norm uses the
        batch's statistics while training: during training only these may be taken as useless. The
        first call exports the model once more, in training mode.

        Returns:
            A bool tensor of shape `(in_channels,)` or `(in_features,)` by the layer's name.
        """
        if self._training_graph is None:
            self._training_graph = self._exported(training=True)
        training = _run(self._training_graph, self._model)
        return {
            layer.name: layer.zero_inputs & training[layer.name].zero_inputs
            for layer in self.run().layers
        }

    def fully_connected(self) -> frozenset[str]:
        """The convolutions that stand for linear layers, as timm's VGG has them.

        That is one whose kernel covers its whole input, and those that read nothing else.
        """
        found: set[str] = set()
        after: set[fx.Node] = set()
        for node in self.graph.nodes:
            name = layer_of(self.graph, node)
            operands = [n for n in node.all_input_nodes if n.name not in self.graph.sources]
            behind = bool(operands) and after.issuperset(operands)
            if name is not None and node.target in CONVOLUTIONS and _covers(node, behind):
                found.add(clean_name(name))
                after.add(node)
            elif behind:
                after.add(node)
        return frozenset(found)

    def _exported(self, training: bool) -> Graph:
        model = dense_copy(self._model).train(training)
        # strict=False: torch 2.6 would trace the code by default, with warnings of its own
        exported = torch.export.export(model, self._example, strict=False).run_decompositions({})
        signature = exported.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        for node in exported.graph.nodes:
            if node.name in constants:
                node.meta["constant"] = exported.constants[constants[node.name]]
        return Graph(tuple(exported.graph.nodes), sources)


def dense_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model with its pruning made permanent, whatever hooks it has.

    Args:
        model: also wrapped by DDP or `torch.compile`.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a stale, masked weight
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                make_permanent(module, hook._tensor_name)
    return twin


def over_weight(channels: Tensor, weight: Tensor) -> Tensor:
    """What each weight reads of `(C,)` input channels, to broadcast over `(K, C / groups, …)`."""
    groups = len(channels) // weight.shape[1]
    rows = channels.view(groups, -1)
    if groups > 1:
        rows = rows.repeat_interleave(len(weight) // groups, 0)
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))


def _covers(node: fx.Node, behind: bool) -> bool:
    """Whether a kernel is as large as its input: of more than one place, or `behind` such a one."""
    _, *kernel = shape_of(node.args[1])  # its input channels first: not those of a grouped one
    whole = tuple(kernel) == shape_of(node.args[0])[-len(kernel) :]
    larger = behind or math.prod(kernel[1:]) > 1
    return whole and larger and not constant_rules.is_padded(node)


def layer_of(graph: Graph, node: fx.Node) -> str | None:
    """The name of the layer whose own weight a convolution's or linear node reads."""
    if node.target not in CONVOLUTIONS and node.target is not LINEAR:
        return None
    source = graph.sources.get(getattr(node.args[1], "name", ""), "")
    return source.rpartition(".")[0] if source.endswith(".weight") else None


def _run(graph: Graph, model: nn.Module) -> ConstantChannels:
    values, unknown = _propagate(graph, model)
    found: dict[str, LayerChannels] = {}
    for node in graph.nodes:
        name = layer_of(graph, node)
        if name is not None:
            layer = _layer(clean_name(name), node, values)
            found[name] = _merged(found[name], layer) if name in found else layer
    return ConstantChannels(tuple(found.values()), tuple(dict.fromkeys(unknown)))


@torch.no_grad()
def _propagate(graph: Graph, model: nn.Module) -> tuple[dict[fx.Node, Any], list[str]]:
    """The template of each node, parameters as they are, and the operations without a rule."""
    values: dict[fx.Node, Any] = {}
    known: set[fx.Node] = set()  # parameters and what is worked out from them alone
    unknown: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = _source(graph, model, node)
            if node.name in graph.sources or "constant" in node.meta:
                known.add(node)
        elif node.op == "call_function":
            if is_known(node, known):
                values[node] = _call(node, values)
                known.add(node)
                continue
            value = _by_rule(node, values)
            if value is NotImplemented:
                unknown.append(f"{node.target} in {place_of(node)}")
                value = _all_varying(node)
            values[node] = value
    return values, unknown


def is_known(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether an operation's output is worked out from known tensors alone."""
    inputs = node.all_input_nodes
    return known.issuperset(inputs) if inputs else node.target in constant_rules.CREATING


def _source(graph: Graph, model: nn.Module, node: fx.Node) -> Any:
    """A parameter or buffer as a forward pass would use it, or the varying input of the model."""
    if node.name in graph.sources:
        path, _, name = graph.sources[node.name].rpartition(".")
        module = model.get_submodule(path)
        pruned = f"{name}_orig" in module._parameters
        return masked_parameter(module, name) if pruned else getattr(module, name)
    if "constant" in node.meta:
        return node.meta["constant"]
    value = node.meta.get("val")
    return varying(value.ndim) if isinstance(value, Tensor) else value


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _by_rule(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    rule = RULES.get(node.target)
    if rule is None:
        return NotImplemented
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    value = rule(node, *args, **kwargs)
    if isinstance(value, (tuple, list)):
        return [_settled(item) for item in value]
    return value if value is NotImplemented else _settled(value)


def _settled(value: Any) -> Any:
    """Overflown constants count as varying."""
    if not isinstance(value, Tensor):
        return value
    return value.masked_fill(~value.isfinite(), VARYING)


def _all_varying(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [varying(item.ndim) if item is not None else None for item in value]
    return varying(value.ndim) if isinstance(value, Tensor) else value


def place_of(node: fx.Node) -> str:
    """The module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values())) if path), "")
    return path or "the model"


def _layer(name: str, node: fx.Node, values: Mapping[fx.Node, Any]) -> LayerChannels:
    weight = values[node.args[1]]  # type: ignore[index]
    template = values[node.args[0]]  # type: ignore[index]
    is_conv = node.target is not LINEAR
    shape = shape_of(node.args[0])
    dim = len(shape) - (weight.ndim - 1 if is_conv else 1)
    inputs = channel_values(template, dim, shape[dim])
    return LayerChannels(
        name=name,
        kind="conv" if is_conv else "linear",
        inputs=inputs,
        outputs=channel_values(values[node], dim, len(weight)),
        dead=~weight.flatten(1).any(1).cpu(),
        padded=is_conv and constant_rules.is_padded(node),
        reason=None if inputs.isfinite().any() else _why_varying(node.args[0], values),
    )


def _merged(one: LayerChannels, other: LayerChannels) -> LayerChannels:
    """Of two calls of a layer, what holds in both."""
    inputs, outputs = (
        torch.where(a == b, a, VARYING)
        for a, b in ((one.inputs, other.inputs), (one.outputs, other.outputs))
    )
    return dataclasses.replace(
        one,
        inputs=inputs,
        outputs=outputs,
        padded=one.padded or other.padded,
        reason=None
        if inputs.isfinite().any()
        else one.reason or other.reason or "its calls differ",
    )


def _why_varying(node: Any, values: Mapping[fx.Node, Any]) -> str:
    """Why a tensor has no constant channel: the operation that the last one is lost in."""
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
    """Back over operations of a single varying operand, whose output varies because that does."""
    while (node.target in RULES and len(node.all_input_nodes) == 1) or node.target in BATCH_NORMS:
        operand = node.all_input_nodes[0]
        value = values[operand]
        first = value[0] if isinstance(value, list) else value
        if node.target in MIXING or not bool(first.isnan().all()):
            return node
        node = operand
    return node
