"""Folding: weights that read constant channels become zero, and other tensors compensate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune.structure.analysis import ChannelAnalysis, per_weight
from starfire_prune.structure.channels import LayerChannels
from starfire_prune.structure.graph import Graph, dense_copy, layer_of
from starfire_prune.structure.ops import BATCH_NORMS
from starfire_prune.structure.rules import bias_of
from starfire_prune.utils.modules import clean_name, unwrap, weight_key

__all__ = ["FoldReport", "FoldedLayer", "fold_constants", "fold_in_place"]


@dataclasses.dataclass(frozen=True)
class FoldedLayer:
    """What happened to a layer's weights that read constants.

    Attributes:
        name: Name of the module.
        redundant: Number of weights that read a constant zero; they are zero now.
        folded: Number of weights that read another constant; they are zero now.
        into: Name of the parameter or buffer that they were folded into; None if there were none.
        left: Number of non-zero weights that still read a constant.
        reason: Why they were not folded; None if there are none.
    """

    name: str
    redundant: int
    folded: int
    into: str | None
    left: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What folding did.

    Attributes:
        layers: A `FoldedLayer` for each layer that reads constants, in the order of use.
        unknown: Operations that the analysis has no rule for, as in `ConstantChannels`.
    """

    layers: tuple[FoldedLayer, ...]
    unknown: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"FoldReport({len(self.layers)} layers, redundant={self.redundant}, "
            f"folded={self.folded})"
        )

    @property
    def redundant(self) -> int:
        """Number of weights set to zero because they read zeros."""
        return sum(layer.redundant for layer in self.layers)

    @property
    def folded(self) -> int:
        """Number of weights folded into biases and running means."""
        return sum(layer.folded for layer in self.layers)


def fold_constants(
    model: nn.Module, example_input: Tensor | tuple[Any, ...]
) -> tuple[nn.Module, FoldReport]:
    """A copy of a model without the weights that read constants; outputs in eval mode are equal.

    A weight that reads a constant zero is redundant and becomes zero. A weight that reads another
    constant becomes zero, too, and its contribution is added to the layer's bias, or without a bias
    to the running mean of the batch norm directly after the layer. It is kept if the layer pads its
    input by zeros, since it reads the padding at the border, and if the model also uses the weight
    or the layer's bias elsewhere.

    This is for export: in training, batch norms use other statistics. The outputs are equal for
    inputs of the example's shape with any batch size, and for the same Python arguments.

    Args:
        model: A model in any phase of pruning; it is not changed.
        example_input: A small batch, or the tuple of the model's arguments.

    Returns:
        The copy, with pruning made permanent, and what was done.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3)
        >>> with torch.no_grad():
        ...     conv.weight[0] = 0
        >>> model = nn.Sequential(conv, nn.Flatten(), nn.Linear(18, 10))
        >>> folded, report = fold_constants(model, torch.rand(1, 1, 5, 5))
        >>> report.layers[0].folded, report.layers[0].into
        (90, '2.bias')
    """
    folded = dense_copy(model)
    return folded, fold_in_place(folded, ChannelAnalysis(folded, example_input))


def fold_in_place(
    model: nn.Module, analysis: ChannelAnalysis, *, merge: bool = False
) -> FoldReport:
    """`fold_constants` on the model itself, which must have no pruning hooks.

    Args:
        model: The model, which is changed.
        analysis: The analysis of this model.
        merge: Whether weights that can't be folded, for example because of padding, are moved to
            the weights of one of the constant channels that a layer (or each of its groups) reads.
            That is exact at the border, too, and never adds weights, but may make pruned weights
            non-zero.
    """
    channels = analysis.run()
    calls = _calls(analysis.graph)
    norms = _norms_after(analysis.graph, calls)
    layers = []
    for layer in channels.layers:
        own = _has_own_bias(analysis.graph, model, layer.name, calls[layer.name])
        layers.append(_fold(model, layer, own, norms.get(layer.name), merge))
    return FoldReport(tuple(filter(None, layers)), channels.unknown)


@dataclasses.dataclass(frozen=True)
class _Sink:
    """The bias or running mean to which the contribution of a layer's constants is added."""

    name: str
    values: Tensor
    sign: int

    def add(self, shift: Tensor) -> None:
        self.values.add_(self.sign * shift.to(self.values))


@torch.no_grad()
def _fold(
    model: nn.Module, layer: LayerChannels, own: bool, norm: str | None, merge: bool
) -> FoldedLayer | None:
    module: Any = model.get_submodule(layer.name)
    weight: Tensor = module.weight
    constants = per_weight(layer.inputs.to(weight.device), weight)
    present = (weight != 0) & weight.isfinite()
    redundant = present & (constants == 0)
    constant = constants.isfinite() & (constants != 0)
    foldable = present & constant
    number, n_redundant = int(foldable.sum()), int(redundant.sum())
    if not number and not n_redundant:
        return None
    if layer.shared is not None:
        return FoldedLayer(layer.name, 0, 0, None, number + n_redundant, layer.shared)
    weight.masked_fill_(redundant, 0.0)
    sink = _sink(model, layer, own, norm) if number else None
    if sink is not None:
        sink.add((weight * constants.nan_to_num(nan=0.0)).flatten(1).sum(1))
        weight.masked_fill_(foldable, 0.0)
    elif merge:
        _merge(weight, layer.inputs.to(weight.device))
    left = int(((weight != 0) & constant).sum())
    into = weight_key(layer.name, "weight") if sink is None else sink.name
    return FoldedLayer(
        name=layer.name,
        redundant=n_redundant,
        folded=number - left,
        into=into if left < number else None,
        left=left,
        reason=_why_left(layer, own) if left else None,
    )


def _merge(weight: Tensor, inputs: Tensor) -> None:
    """In each group, move weights that read constants to those that read the largest constant."""
    groups = len(inputs) // weight.shape[1]
    for kernels, values in zip(weight.chunk(groups), inputs.view(groups, -1), strict=True):
        constant = (values.isfinite() & (values != 0)).nonzero().flatten()
        if len(constant) > 1:
            chosen = constant[values[constant].abs().argmax()]
            shares = (values[constant] / values[chosen]).view(-1, *[1] * (weight.ndim - 2))
            total = (kernels[:, constant] * shares).sum(1)
            kernels[:, constant] = 0.0
            kernels[:, chosen] = total.to(weight)


def _sink(model: nn.Module, layer: LayerChannels, own: bool, norm: str | None) -> _Sink | None:
    bias = _own_bias(model, layer.name)
    if layer.padded or not own:
        return None
    if bias is not None:
        return _Sink(weight_key(layer.name, "bias"), bias, 1)
    if norm is not None:
        name = weight_key(norm, "running_mean")
        return _Sink(name, model.get_buffer(name), -1)
    return None


def _own_bias(model: nn.Module, name: str) -> Tensor | None:
    """The bias of a layer's module, also if `torch.compile` wraps it."""
    return unwrap(model.get_submodule(name))._parameters.get("bias")


def _why_left(layer: LayerChannels, own: bool) -> str:
    if layer.padded:
        return "it pads its input by zeros, so that its output differs at the border"
    if not own:
        return "the model uses its bias elsewhere, too, or adds another one"
    return "it has neither a bias nor a batch norm that only it uses directly after it"


def _calls(graph: Graph) -> dict[str, list[fx.Node]]:
    """The nodes of each layer."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        name = layer_of(graph, node)
        if name is not None:
            calls.setdefault(clean_name(name), []).append(node)
    return calls


def _has_own_bias(graph: Graph, model: nn.Module, name: str, calls: list[fx.Node]) -> bool:
    """Whether a layer has no bias, or its calls add one that nothing else uses."""
    biases = [bias_of(call) for call in calls]
    if _own_bias(model, name) is None:
        return all(bias is None for bias in biases)
    return all(
        isinstance(bias, fx.Node)
        and clean_name(graph.sources.get(bias.name, "")) == weight_key(name, "bias")
        and all(_is_bias_of(placeholder, user, calls) for user, placeholder in graph.users(bias))
        for bias in biases
    )


def _is_bias_of(placeholder: fx.Node, user: fx.Node, calls: list[fx.Node]) -> bool:
    """Whether one of the calls reads a placeholder, only as its bias."""
    read = [argument for argument in user.args if argument is placeholder]
    return user in calls and len(read) == 1 and bias_of(user) is placeholder


def _norms_after(graph: Graph, calls: Mapping[str, list[fx.Node]]) -> dict[str, str]:
    """The batch norm that is the only user of a layer's output, by the layer's name."""
    after = {}
    for name, nodes in calls.items():
        users = [user for node in nodes for user in node.users]
        norm = _norm_of(graph, users[0]) if len(nodes) == len(users) == 1 else None
        if norm is not None and users[0].args[0] is nodes[0]:
            after[name] = norm
    return after


def _norm_of(graph: Graph, node: fx.Node) -> str | None:
    """The name of the batch norm whose running mean a node reads, if nothing else does."""
    if node.target not in BATCH_NORMS or not isinstance(node.args[3], fx.Node):
        return None
    path, _, name = graph.sources.get(node.args[3].name, "").rpartition(".")
    uses = sum(1 for _ in graph.users(node.args[3]))
    others = [argument for argument in node.args if argument is node.args[3]]
    return clean_name(path) if name == "running_mean" and uses == len(others) == 1 else None
