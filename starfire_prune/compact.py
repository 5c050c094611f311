"""Smaller dense models: the channels that nothing needs are cut out of the tensors.

Which channels go is decided on the weights, after `fold_constants`: one that no layer reads. How
they hang together through additions, concatenations and flattening is the dependency graph of
Torch-Pruning (`pip install "starfire-prune[compact]"`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from starfire_prune.folding import FoldReport, fold_in_place
from starfire_prune.layers import prunable_layers
from starfire_prune.reach import pinned_layers
from starfire_prune.report import format_columns
from starfire_prune.structure import ChannelAnalysis, dense_copy
from starfire_prune.surgery import Surgery

__all__ = ["CompactLayer", "CompactReport", "compact", "format_compaction"]

_TOLERANCE = 1e-3  # of the largest output; surgery gone wrong is off by far more than rounding


@dataclasses.dataclass(frozen=True)
class CompactLayer:
    """A convolution or linear layer before and after compaction.

    Attributes:
        name: of the module.
        inputs: input channels before and after.
        outputs: output channels before and after.
        parameters: of its weight and bias, before and after.
        macs: multiply-accumulates for one sample, before and after.
        stayed: output channels of nothing but zero kernels that are still there.
        reason: why they are; None where there are none.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    stayed: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class CompactReport:
    """What compaction did.

    Attributes:
        layers: each convolution and linear layer, in the model's order.
        parameters: of the whole model, before and after.
        deviation: the largest difference of the outputs on the example, as a share of the largest
            output.
        fold: what was folded first.
    """

    layers: tuple[CompactLayer, ...]
    parameters: tuple[int, int]
    deviation: float
    fold: FoldReport

    @property
    def macs(self) -> tuple[int, int]:
        """Of all convolutions and linear layers for one sample, before and after."""
        before, after = zip(*(layer.macs for layer in self.layers), strict=True)
        return sum(before), sum(after)

    def __getitem__(self, name: str) -> CompactLayer:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no convolution or linear layer {name!r}")


def compact(
    model: nn.Module, example_input: Tensor | tuple[Any, ...]
) -> tuple[nn.Module, CompactReport]:
    """A smaller dense model with the outputs of a sparse one, in eval mode.

    Constants are folded first (`fold_constants`). Under padding, which folding doesn't pass, one
    constant channel stands for all that a layer reads. Then the channels go that no layer reads,
    in all layers that share them. A grouped convolution loses as many channels in each of its
    groups as all groups can spare, a depthwise one follows what it reads, and each layer keeps a
    channel. The model's output, and channels that reach operations which mix them, stay.

    Args:
        model: in any phase of pruning; it is left as it is.
        example_input: a small batch, or the tuple of the model's arguments.

    Returns:
        The smaller model, in eval mode, and what was done.

    Raises:
        ModuleNotFoundError: without Torch-Pruning.
        RuntimeError: if the smaller model doesn't run or its outputs differ, as for a model that
            has numbers of channels written into its forward pass.

    Example:
        >>> conv = nn.Conv2d(1, 4, 3)
        >>> with torch.no_grad():
        ...     conv.weight[:2] = 0
        >>> model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))
        >>> smaller, report = compact(model, torch.rand(1, 1, 5, 5))
        >>> smaller[0].out_channels, smaller[3].in_features
        (2, 18)
    """
    pruning = _torch_pruning()
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    smaller = dense_copy(model).eval()
    analysis = ChannelAnalysis(smaller, example)
    before = _measured(smaller, example)
    fold = fold_in_place(smaller, analysis, merge=True)
    unfolded = {layer.name: layer.reason for layer in fold.layers if layer.reason is not None}
    pinned = pinned_layers(analysis.graph)
    after, stayed = _cut(pruning, smaller, example, pinned, unfolded)
    deviation = _deviation(before.output, after.output)
    layers = tuple(
        _compacted(name, old, after.layers[name], *stayed.get(name, (0, None)))
        for name, old in before.layers.items()
    )
    parameters = (before.parameters, after.parameters)
    return smaller, CompactReport(layers, parameters, deviation, fold)


def format_compaction(report: CompactReport) -> str:
    """The table of layers: channels, parameters and MACs before and after, and what stayed."""
    header = ("layer", "in", "out", "parameters", "MACs", "dead channels that stayed")
    rows = [
        (
            layer.name,
            _change(layer.inputs),
            _change(layer.outputs),
            _change(layer.parameters),
            _change(layer.macs),
            f"{layer.stayed}: {layer.reason}" if layer.stayed else "",
        )
        for layer in report.layers
    ]
    rows.append(("total", "", "", _change(report.parameters), _change(report.macs), ""))
    lines = [format_columns(header, rows, left=(0, 5))]
    lines.append(f"largest deviation of the outputs: {report.deviation:.1e} of the largest output")
    return "\n".join(lines)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


@dataclasses.dataclass(frozen=True)
class _Sizes:
    inputs: int
    outputs: int
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model's sizes, and its outputs on the example."""

    layers: dict[str, _Sizes]
    parameters: int
    output: Any


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "compact() needs Torch-Pruning: pip install 'starfire-prune[compact]'"
        ) from error


def _cut(
    pruning: Any,
    model: nn.Module,
    example: tuple[Any, ...],
    pinned: Mapping[str, str],
    unfolded: Mapping[str, str],
) -> tuple[_Measured, dict[str, tuple[int, str | None]]]:
    """Cut the model in place: its sizes then, and the dead channels that stayed, with reasons."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)  # the dependency graph follows gradients
    with torch.enable_grad():
        surgery = Surgery(pruning, model, example, pinned, unfolded)
        surgery.run()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    stayed = {
        name: (number, surgery.reasons.get(name, "it is not in the dependency graph"))
        for name, number in surgery.dead_outputs().items()
        if number
    }
    try:
        return _measured(model, example), dict(stayed)
    except RuntimeError as error:
        raise RuntimeError(
            f"the compacted model does not run ({error}): numbers of channels may be written into "
            f"its forward pass; use fold_constants, which keeps all shapes"
        ) from error


@torch.no_grad()
def _measured(model: nn.Module, example: tuple[Any, ...]) -> _Measured:
    """Sizes of the layers, with MACs counted in a forward pass of the example."""
    macs: dict[str, int] = {}
    layers = prunable_layers(model)

    def count(name: str, module: Any, output: Tensor) -> None:
        per_output = module.weight[0].numel()
        macs[name] = macs.get(name, 0) + output.numel() // len(output) * per_output

    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: count(name, m, output))
        for name, module in layers.items()
    ]
    try:
        output = model(*example)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: _sizes(module, macs.get(name, 0)) for name, module in layers.items()}
    return _Measured(sizes, sum(p.numel() for p in model.parameters()), output)


def _sizes(module: Any, macs: int) -> _Sizes:
    weight = module.weight
    inputs = weight.shape[1] * getattr(module, "groups", 1)
    bias = 0 if module.bias is None else module.bias.numel()
    return _Sizes(inputs, len(weight), weight.numel() + bias, macs)


def _compacted(
    name: str, old: _Sizes, new: _Sizes, stayed: int, reason: str | None
) -> CompactLayer:
    return CompactLayer(
        name=name,
        inputs=(old.inputs, new.inputs),
        outputs=(old.outputs, new.outputs),
        parameters=(old.parameters, new.parameters),
        macs=(old.macs, new.macs),
        stayed=stayed,
        reason=reason,
    )


def _deviation(expected: Any, output: Any) -> float:
    """The largest difference of two outputs, as a share of the largest value.

    Raises:
        RuntimeError: if it is beyond rounding.
    """
    pairs = list(zip(_tensors(expected), _tensors(output), strict=True))
    largest = max((float(one.abs().max()) for one, _ in pairs), default=0.0) or 1.0
    deviation = max((float((one - other).abs().max()) for one, other in pairs), default=0.0)
    if not deviation <= _TOLERANCE * largest:  # NaN fails this too
        raise RuntimeError(
            f"the compacted model's outputs differ by {deviation:.2g} from the sparse model's, "
            f"whose largest is {largest:.2g}: its channels hang together in a way that the "
            f"dependency graph does not show; use fold_constants, which keeps all shapes"
        )
    return deviation / largest


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
