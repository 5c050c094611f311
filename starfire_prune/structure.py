"""Constant channels: which channels of a model have the same value whatever its input.

A convolution's output channel whose kernels are all zero is its bias; batch norms, activations and
pooling carry constants on. What reads a zero constant is useless, and what reads another one can be
folded into a bias (`starfire_prune.folding`). The analysis runs over the graph of `torch.export`,
by the rules of `starfire_prune.constant_rules`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune import constant_rules
from starfire_prune.constant_rules import (
    BATCH_NORMS,
    CENTERING_NORMS,
    CONVOLUTIONS,
    LINEAR,
    MIXING,
    RULES,
)
from starfire_prune.layers import clean_name, unwrap
from starfire_prune.mask_method import masked_parameter
from starfire_prune.model_graph import (
    Graph,
    exported_graph,
    is_known,
    is_weight_of,
    layer_of,
    place_of,
    used_elsewhere,
    without_autocast,
)
from starfire_prune.templates import VARYING, as_template, channel_values, shape_of, varying

__all__ = ["ChannelAnalysis", "ConstantChannels", "LayerChannels", "over_weight"]


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
        shared: where its weight is used by anything else too, so that what the layer reads doesn't
            tell which of its weights are needed, by what.
        reason: where its inputs all vary, why; otherwise as `shared`.
    """

    name: str
    kind: str
    inputs: Tensor
    outputs: Tensor
    dead: Tensor
    padded: bool
    shared: str | None
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


class ChannelAnalysis:
    """Finds the constant channels of a model, as often as its weights change.

    The model is exported once. A run then carries constants through the graph with the weights as
    they are: masked where hooks prune them. The model is left as it is, hooks and all.

    What it finds holds for inputs of the example's shape but for the size of the batch, and for the
    same Python arguments. A copy of an analysis exports again when it is first asked.

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
        self._graphs: dict[bool, Graph] = {}
        self._graph(training=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which can't be copied."""
        return {**vars(self), "_graphs": {}}

    @property
    def graph(self) -> Graph:
        """The model in eval mode."""
        return self._graph(training=False)

    def run(self) -> ConstantChannels:
        """The channels that are constant in eval mode, with the model's present weights."""
        return _run(self.graph, self._model)

    def zero_inputs(self) -> dict[str, Tensor]:
        """The input channels of each layer that are zero while training and in eval mode alike.

        A dead channel may be zero in the one and not in the other, since a batch norm uses the
        batch's statistics while training: during training only these may be taken as useless. Nor
        does a zero count that rests on a bias, a batch norm's weight or another trainable vector
        being zero just now. A layer whose weight something else uses too, or that one of the two
        modes does without, has none. The first call exports the model once more, in training mode.

        Returns:
            A bool tensor of shape `(in_channels,)` or `(in_features,)` by the layer's name.
        """
        runs = [_run(self._graph(training), self._model) for training in (False, True)]
        modes = [{layer.name: layer for layer in run.layers} for run in runs]
        layers = {name: layer for mode in reversed(modes) for name, layer in mode.items()}
        return {
            name: torch.stack([_droppable(mode.get(name), layer) for mode in modes]).all(0)
            for name, layer in layers.items()
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

    def _graph(self, training: bool) -> Graph:
        if training not in self._graphs:
            self._graphs[training] = exported_graph(self._model, self._example, training)
        return self._graphs[training]


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


def _droppable(found: LayerChannels | None, layer: LayerChannels) -> Tensor:
    """The inputs whose weights may go as far as one mode shows, of the layer's number."""
    if found is None or found.shared is not None:
        return torch.zeros_like(layer.zero_inputs)
    return found.zero_inputs


def _run(graph: Graph, model: nn.Module) -> ConstantChannels:
    values, unknown = _propagate(graph, model)
    found: dict[str, LayerChannels] = {}
    for node in graph.nodes:
        name = layer_of(graph, node)
        if name is not None:
            layer = _layer(clean_name(name), node, values, used_elsewhere(graph, node))
            found[name] = _merged(found[name], layer) if name in found else layer
    return ConstantChannels(tuple(found.values()), tuple(dict.fromkeys(unknown)))


@without_autocast()
@torch.no_grad()
def _propagate(graph: Graph, model: nn.Module) -> tuple[dict[fx.Node, Any], list[str]]:
    """The template of each node, parameters as they are, and the operations without a rule."""
    values: dict[fx.Node, Any] = {}
    known: set[fx.Node] = set()  # parameters and what is worked out from them alone
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
    """A parameter or buffer as a forward pass would use it, and whether it is known.

    Otherwise a template: of the model's input, of what a forward pass changes, and for training of
    a vector that may leave its zeros.
    """
    if "constant" in node.meta:
        return node.meta["constant"], True
    if node.name not in graph.sources or _changes(graph, node):
        return _all_varying(node), False
    path, _, name = graph.sources[node.name].rpartition(".")
    module = model.get_submodule(path)
    if f"{name}_orig" in module._parameters:
        return masked_parameter(module, name), True
    value: Tensor = getattr(module, name)
    if graph.training and _is_trained_vector(node, value) and not bool(value.all()):
        template = as_template(value)
        return template.masked_fill(template == 0, VARYING), False
    return value, True


def _changes(graph: Graph, node: fx.Node) -> bool:
    """Whether a forward pass changes a buffer, other than the statistics of batch norms."""
    users = graph.users(node)
    return node.name in graph.changed and not all(
        constant_rules.is_statistic(user, placeholder) for user, placeholder in users
    )


def _is_trained_vector(node: fx.Node, value: Tensor) -> bool:
    """Whether a gradient changes it: a bias, a norm's weight, a scale of each channel, a number."""
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
        return [other if item is None else _settled(item) for item, other in items]
    return value if value is NotImplemented else _settled(value)


def _with_infinity(value: Any) -> Any:
    """Infinity in place of a parameter's NaN, which rules would take for a varying place."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (
        value if bool(value.sum().isfinite()) else value.nan_to_num(math.inf, math.inf, -math.inf)
    )


def _is_centered(node: fx.Node) -> bool:
    """Whether batch norms alone read a layer's node, which takes its bias off, whatever it is."""
    is_layer = node.target in CONVOLUTIONS or node.target is LINEAR
    return is_layer and all(
        user.target in CENTERING_NORMS and user.args[0] is node for user in node.users
    )


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


def _layer(
    name: str, node: fx.Node, values: Mapping[fx.Node, Any], shared: str | None
) -> LayerChannels:
    weight = values[node.args[1]]  # type: ignore[index]
    out_channels = shape_of(node.args[1])[0]
    template = values[node.args[0]]  # type: ignore[index]
    is_conv = node.target is not LINEAR
    shape = shape_of(node.args[0])
    dim = len(shape) - (weight.ndim - 1 if is_conv else 1)
    inputs = channel_values(template, dim, shape[dim])
    return LayerChannels(
        name=name,
        kind="conv" if is_conv else "linear",
        inputs=inputs,
        outputs=channel_values(values[node], dim, out_channels),
        dead=(~weight.flatten(1).any(1)).cpu().expand(out_channels),
        padded=is_conv and constant_rules.is_padded(node),
        shared=shared,
        reason=shared if inputs.isfinite().any() else _why_varying(node.args[0], values),
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
        reason=one.shared
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
