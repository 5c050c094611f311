"""The analysis of constant channels: constant propagation over a model's exported graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune.structure import rules
from starfire_prune.structure.abstract_values import channel_values, shape_of
from starfire_prune.structure.channels import ConstantChannels, LayerChannels, merged_layer
from starfire_prune.structure.graph import Graph, exported_graph, layer_of, used_elsewhere
from starfire_prune.structure.ops import CONVOLUTIONS, LINEAR
from starfire_prune.structure.propagate import propagate, why_varying
from starfire_prune.utils.modules import clean_name, unwrap

__all__ = ["ChannelAnalysis", "per_weight"]


class ChannelAnalysis:
    """Finds the constant channels of a model, again and again while its weights change.

    The model is exported once. Each run then propagates constants through the graph with the
    current weights, masked if hooks prune them. The model and its hooks are not changed.

    The result holds for inputs of the example's shape with any batch size, and for the same Python
    arguments. A copy of an analysis exports the model again on its first run.

    Args:
        model: A model in any phase of pruning, possibly wrapped by DDP or `torch.compile`.
        example_input: A small batch, or the tuple of the model's arguments.

    Raises:
        TraceError: If `torch.export` can't trace the model.

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
        """The state without the graphs, which can't be copied."""
        return {**vars(self), "_graphs": {}}

    @property
    def graph(self) -> Graph:
        """The graph of the model in eval mode."""
        return self._graph(training=False)

    def run(self) -> ConstantChannels:
        """The channels that are constant in eval mode, with the model's current weights."""
        return _run(self.graph, self._model)

    def zero_inputs(self) -> dict[str, Tensor]:
        """The input channels of each layer that are zero both in training and in eval mode.

        In training a batch norm uses the batch's statistics, so a channel may be zero in only one
        of the modes; weights that read it are not redundant during training. A zero that depends on
        a bias, a batch norm's weight or another trainable vector does not count, since it can
        change. A layer has no zero inputs if its weight is also used elsewhere, or if one of the
        modes does not use the layer. The first call also exports the model in training mode.

        Returns:
            A bool tensor of shape `(in_channels,)` or `(in_features,)` by the layer's name.
        """
        runs = [_run(self._graph(training), self._model) for training in (False, True)]
        modes = [{layer.name: layer for layer in run.layers} for run in runs]
        layers = {name: layer for mode in reversed(modes) for name, layer in mode.items()}
        return {
            name: torch.stack([_redundant_inputs(mode.get(name), layer) for mode in modes]).all(0)
            for name, layer in layers.items()
        }

    def fully_connected(self) -> frozenset[str]:
        """The convolutions that act as linear layers, such as those of timm's VGG.

        A convolution does if its kernel covers its complete input, as do those that follow it.
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


def per_weight(channels: Tensor, weight: Tensor) -> Tensor:
    """Values of `(C,)` input channels, to broadcast over the weight `(K, C / groups, …)`."""
    groups = len(channels) // weight.shape[1]
    rows = channels.view(groups, -1)
    if groups > 1:
        rows = rows.repeat_interleave(len(weight) // groups, 0)
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))


def _covers(node: fx.Node, behind: bool) -> bool:
    """Whether a kernel is as large as its input, and larger than 1x1 or `behind` such a kernel."""
    _, *kernel = shape_of(node.args[1])  # its input channels first: not those of a grouped one
    covers = tuple(kernel) == shape_of(node.args[0])[-len(kernel) :]
    larger = behind or math.prod(kernel[1:]) > 1
    return covers and larger and not rules.is_padded(node)


def _redundant_inputs(found: LayerChannels | None, layer: LayerChannels) -> Tensor:
    """The inputs whose weights are redundant in one mode, as many as the layer has."""
    if found is None or found.shared is not None:
        return torch.zeros_like(layer.zero_inputs)
    return found.zero_inputs


def _run(graph: Graph, model: nn.Module) -> ConstantChannels:
    values, unknown = propagate(graph, model)
    found: dict[str, LayerChannels] = {}
    for node in graph.nodes:
        name = layer_of(graph, node)
        if name is not None:
            layer = _layer(clean_name(name), node, values, used_elsewhere(graph, node))
            found[name] = merged_layer(found[name], layer) if name in found else layer
    return ConstantChannels(tuple(found.values()), tuple(dict.fromkeys(unknown)))


def _layer(
    name: str, node: fx.Node, values: Mapping[fx.Node, Any], shared: str | None
) -> LayerChannels:
    weight = values[node.args[1]]  # type: ignore[index]
    out_channels = shape_of(node.args[1])[0]
    value = values[node.args[0]]  # type: ignore[index]
    is_conv = node.target is not LINEAR
    shape = shape_of(node.args[0])
    dim = len(shape) - (weight.ndim - 1 if is_conv else 1)
    inputs = channel_values(value, dim, shape[dim])
    return LayerChannels(
        name=name,
        kind="conv" if is_conv else "linear",
        inputs=inputs,
        outputs=channel_values(values[node], dim, out_channels),
        dead=(~weight.flatten(1).any(1)).cpu().expand(out_channels),
        padded=is_conv and rules.is_padded(node),
        shared=shared,
        reason=shared if inputs.isfinite().any() else why_varying(node.args[0], values),
    )
