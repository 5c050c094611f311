"""The graph that trains with quantization: its modes, and its batch norms, which torchao rewrites.

torchao replaces a convolution and its batch norm by

    bn(conv(x, rounded(w · s)) / s)    with s = gamma / sqrt(running variance + epsilon)

so that the weights that are rounded are those that will be folded. It writes its own momentum and
epsilon into the batch norm, and divides by gamma.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization.names import LAYERS, bias_name
from starfire_prune.utils.errors import QuantizationError

__all__ = [
    "BatchNorms",
    "batch_norm_settings",
    "fold_batch_norms",
    "lift_zero_scales",
    "refuse_random_numbers",
    "restore_batch_norms",
    "set_fake_quantization",
    "set_mode",
]


BatchNorms = dict[str, tuple[float, float]]
"""Momentum and epsilon of batch norms, by the name of their running mean."""

_ATEN: Final = torch.ops.aten
_BATCH_NORM: Final = _ATEN.batch_norm.default
_TRAINING, _MOMENTUM, _EPSILON = 5, 6, 7  # arguments of aten.batch_norm
_DROPOUTS: Final = tuple(
    getattr(_ATEN, name).default
    for name in ("dropout", "dropout_", "feature_dropout", "feature_dropout_")
)
_SMALLEST_SCALE: Final = 1e-8


# Modes


def set_mode(module: fx.GraphModule, mode: bool, *, frozen: bool) -> None:
    """Put a graph in training or eval mode.

    Args:
        module: A graph that was exported in training mode and prepared.
        mode: True for training: dropout drops, batch norms use the batch's statistics and follow
            them, and observers follow the ranges.
        frozen: Whether batch norms and observers are as in eval mode also in training.
    """
    follows = mode and not frozen
    for node in module.graph.nodes:
        if node.target is _BATCH_NORM:
            node.update_arg(_TRAINING, follows)
        elif node.target is _ATEN.add_.Tensor and _counts_batches(node):
            node.update_arg(1, int(follows))
        elif node.target in _DROPOUTS:
            node.update_arg(2, mode)
    module.recompile()
    for part in _fake_quantizers(module):
        part.enable_observer(follows)
    nn.Module.train(module, mode)


def _counts_batches(node: fx.Node) -> bool:
    return str(getattr(node.args[0], "target", "")).endswith("num_batches_tracked")


def set_fake_quantization(module: nn.Module, enabled: bool) -> None:
    """Let a graph round, or compute as the float model."""
    for part in _fake_quantizers(module):
        part.enable_fake_quant(enabled)


def _fake_quantizers(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if hasattr(part, "fake_quant_enabled"))


def refuse_random_numbers(graph: fx.GraphModule) -> None:
    """Raise QuantizationError if a graph draws random numbers that eval mode can't switch off."""
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and node.target not in _DROPOUTS:
            raise QuantizationError(
                f"the model draws random numbers in training by {node.target}, which its exported "
                f"graph would draw in evaluations too: train without, such as with "
                f"drop_path_rate=0"
            )


# Batch norms


@torch.no_grad()
def lift_zero_scales(model: nn.Module) -> None:
    """Set the scales of batch norms that are exactly 0 to 1e-8, since torchao divides by them."""
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.weight is not None:
            part.weight.masked_fill_(part.weight == 0, _SMALLEST_SCALE)


def batch_norm_settings(graph: fx.GraphModule) -> BatchNorms:
    """The momentum and the epsilon of each batch norm of an exported graph."""
    return {
        str(node.args[3].target): (node.args[_MOMENTUM], node.args[_EPSILON])
        for node in graph.graph.find_nodes(op="call_function", target=_BATCH_NORM)
    }


def restore_batch_norms(module: fx.GraphModule, settings: BatchNorms) -> None:
    """Give the batch norms of a prepared graph the momentum and the epsilon that they had."""
    for node in module.graph.find_nodes(op="call_function", target=_BATCH_NORM):
        momentum, epsilon = settings[str(node.args[3].target)]
        node.update_arg(_MOMENTUM, momentum)
        node.update_arg(_EPSILON, epsilon)
        if (fused := _fused(node)) is not None:
            deviation: Any = fused.scale.args[1]
            deviation.args[0].update_arg(1, epsilon)  # div(gamma, sqrt(add(variance, epsilon)))
    module.recompile()


@dataclasses.dataclass(frozen=True)
class _Fused:
    """The nodes of a convolution and its batch norm as torchao has joined them."""

    layer: fx.Node
    rounding: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    scale: fx.Node


@torch.no_grad()
def fold_batch_norms(module: fx.GraphModule) -> None:
    """Fold the batch norms of a prepared graph into the convolutions before them, in place.

    torchao's own folding traces a hundred patterns in half a minute.
    """
    for node in module.graph.find_nodes(op="call_function", target=_BATCH_NORM):
        if (fused := _fused(node)) is not None:
            _fold(module, node, fused)
    module.graph.eliminate_dead_code()
    module.recompile()


def _fused(node: fx.Node) -> _Fused | None:
    """The convolution that a batch norm was joined with, if it was."""
    quotient, bias = cast("Any", node.args[0]), None
    if quotient.target is _ATEN.add.Tensor:
        quotient, bias = quotient.args[0], quotient.args[1].args[0]  # bias.reshape(…)
    if getattr(quotient, "target", None) is not _ATEN.div.Tensor:
        return None
    layer, scales = quotient.args
    if layer.target not in LAYERS or scales.target is not _ATEN.reshape.default:
        return None
    rounding = layer.args[1]
    return _Fused(layer, rounding, rounding.args[0].args[0], bias, scales.args[0])


def _fold(module: fx.GraphModule, node: fx.Node, fused: _Fused) -> None:
    def tensor(read: Any) -> Tensor:
        found: Tensor = operator.attrgetter(read.target)(module)
        return found.detach()

    gamma, beta, mean, variance = (tensor(read) for read in node.args[1:5])
    scales = gamma / torch.sqrt(variance + cast("float", node.args[_EPSILON]))
    weight, name = tensor(fused.weight), str(fused.weight.target)
    shift = -mean if fused.bias is None else tensor(fused.bias) - mean
    _replace(module, name, weight * scales.reshape(-1, *[1] * (weight.dim() - 1)))
    _replace(module, bias_name(name), beta + shift * scales)
    with module.graph.inserting_before(fused.layer):
        bias = module.graph.get_attr(bias_name(name))
    fused.rounding.args = (fused.weight,)
    fused.layer.update_arg(2, bias)
    node.replace_all_uses_with(fused.layer)
    module.graph.erase_node(node)


def _replace(module: fx.GraphModule, target: str, tensor: Tensor) -> None:
    path, _, name = target.rpartition(".")
    holder = module.get_submodule(path)
    holder._parameters.pop(name, None)
    holder._buffers.pop(name, None)
    holder.register_buffer(name, tensor)
