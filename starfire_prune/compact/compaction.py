"""Compaction: a smaller dense model without the channels that no layer reads.

These channels are found from the weights, after `fold_constants`. Which of them are coupled, so
that they must be removed together, through additions, concatenations and flattening, is given by
the dependency graph of Torch-Pruning (`pip install "starfire-prune[compact]"`).
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from starfire_prune.compact.coupling import required_outputs
from starfire_prune.compact.folding import FoldReport, fold_in_place
from starfire_prune.compact.surgery import Surgery
from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.marks import check_finished
from starfire_prune.utils.modules import prunable_layers
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.outputs import compare_outputs, output_tensors
from starfire_prune.utils.text import format_columns

__all__ = ["CompactLayer", "CompactReport", "compact", "format_compaction"]


_TOLERANCE = 1e-3  # of the largest output; a wrong removal differs by far more than rounding
_EPSILONS = 16  # the tolerance for dtypes of low precision, whose rounding errors add up
_SEEDS = (1, 2)


@dataclasses.dataclass(frozen=True)
class CompactLayer:
    """A convolution or linear layer before and after compaction.

    Attributes:
        name: Name of the module.
        inputs: Numbers of input channels before and after.
        outputs: Numbers of output channels before and after.
        parameters: Sizes of weight and bias together, before and after.
        macs: Multiply-accumulates for one sample, before and after.
        dead_kept: Number of output channels whose kernels are all zero but that were not removed.
        reason: Why they were not removed; None if there are none.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    dead_kept: int
    reason: str | None


@dataclasses.dataclass(frozen=True)
class CompactReport:
    """What compaction did.

    Attributes:
        layers: A `CompactLayer` for each convolution and linear layer, in the model's order.
        parameters: Numbers of the model's parameters before and after.
        deviation: Largest difference of the outputs, on the example and on random arguments of
            its shapes, as a share of the largest output.
        fold: Report of the folding that came first.
    """

    layers: tuple[CompactLayer, ...]
    parameters: tuple[int, int]
    deviation: float
    fold: FoldReport

    def __repr__(self) -> str:
        return (
            f"CompactReport({len(self.layers)} layers, parameters={self.parameters}, "
            f"macs={self.macs}, deviation={self.deviation:.1e})"
        )

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of all these layers for one sample, before and after."""
        before, after = zip(*(layer.macs for layer in self.layers), strict=True)
        return sum(before), sum(after)

    def __getitem__(self, name: str) -> CompactLayer:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no convolution or linear layer {name!r}")


def compact(
    model: nn.Module, example_input: Tensor | tuple[Any, ...], *, unfinished: bool = False
) -> tuple[nn.Module, CompactReport]:
    """A smaller dense model that has the outputs of a sparse one in eval mode.

    1. Constants are folded (`fold_constants`). Where a layer pads its input by zeros, so that they
       can't be folded, its weights are moved to one of the constant channels that it reads.
    2. The channels that no layer reads are removed, in all layers that they are coupled with. A
       grouped convolution loses equally many channels in each of its groups, a depthwise one the
       channels that its input loses, and each layer keeps at least one channel. Channels of the
       model's output, and those that operations mix with others, are kept.
    3. The outputs are compared on the example, and on random arguments of its shapes.

    Parameters that modules share remain shared if they are still equal.

    Args:
        model: A model in any phase of pruning; it is not changed.
        example_input: A small batch, or the tuple of the model's arguments.
        unfinished: Whether the pruning may be unfinished.

    Returns:
        The smaller model, in eval mode, and what was done.

    Raises:
        PruningError: If a pruner of the model has not finished (`Pruner.check_finished`).
        ModuleNotFoundError: If Torch-Pruning is not installed.
        RuntimeError: If Torch-Pruning can't cut the model, or the smaller model does not run or
            has other outputs, for example because its forward pass contains numbers of channels.

    Example:
        >>> conv = nn.Conv2d(1, 4, 3)
        >>> with torch.no_grad():
        ...     conv.weight[:2] = 0
        >>> model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))
        >>> smaller, report = compact(model, torch.rand(1, 1, 5, 5))
        >>> smaller[0].out_channels, smaller[3].in_features
        (2, 18)
    """
    check_finished(model, unfinished=unfinished)
    pruning = import_optional("torch_pruning", "compact", "compact()")
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    trials = [example, *(_random_like(example, seed) for seed in _SEEDS)]
    smaller = dense_copy(model).eval()
    before, parameters = _sizes(smaller, example), _count(smaller)
    shared = _unshare(smaller)
    analysis = ChannelAnalysis(smaller, example)
    expected = [_output(smaller, trial) for trial in trials]
    fold = fold_in_place(smaller, analysis, merge=True)
    unfolded = {layer.name: layer.reason for layer in fold.layers if layer.reason is not None}
    required = required_outputs(analysis.graph, prunable_layers(smaller))
    surgery = _cut(pruning, smaller, example, required, unfolded)
    _share_again(shared)
    after, outputs = _run(smaller, example, trials)
    deviation = _deviation(expected, outputs, _tolerance(smaller, expected))
    dead_kept = surgery.dead_kept()
    layers = tuple(_layer(name, before[name], after[name], *dead_kept[name]) for name in before)
    return smaller, CompactReport(layers, (parameters, _count(smaller)), deviation, fold)


def format_compaction(report: CompactReport) -> str:
    """A table of layers: channels, parameters and MACs before and after, and dead channels kept."""
    header = ("layer", "in", "out", "parameters", "MACs", "dead channels kept")
    rows = [
        (
            layer.name,
            _change(layer.inputs),
            _change(layer.outputs),
            _change(layer.parameters),
            _change(layer.macs),
            f"{layer.dead_kept}: {layer.reason}" if layer.dead_kept else "",
        )
        for layer in report.layers
    ]
    rows.append(("total", "", "", _change(report.parameters), _change(report.macs), ""))
    lines = [format_columns(header, rows, left=(0, 5))]
    lines.append(f"largest difference of the outputs: {report.deviation:.1e} of the largest output")
    return "\n".join(lines)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


class _Sizes(NamedTuple):
    """Sizes of a layer, as in `CompactLayer`."""

    inputs: int
    outputs: int
    parameters: int
    macs: int


def _layer(
    name: str, before: _Sizes, after: _Sizes, dead_kept: int, reason: str | None
) -> CompactLayer:
    inputs, outputs, parameters, macs = zip(before, after, strict=True)
    return CompactLayer(name, inputs, outputs, parameters, macs, dead_kept, reason)


def _random_like(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """The arguments, with normally distributed values in their float tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return tree_map(random, example)  # type: ignore[no-any-return]


def _unshare(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Give modules that share a parameter a copy each, since each is cut by itself.

    Returns:
        For each shared parameter, the modules that have it and its name there.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    for parameter, (_, *others) in places.items():
        for module, name in others:
            twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module.register_parameter(name, twin)
    return [shared for shared in places.values() if len(shared) > 1]


def _share_again(shared: list[list[tuple[nn.Module, str]]]) -> None:
    """Share parameters again that are still equal."""
    for (first, first_name), *others in shared:
        parameter = first.get_parameter(first_name)
        for module, name in others:
            if torch.equal(parameter, module.get_parameter(name)):
                module.register_parameter(name, parameter)


def _cut(
    pruning: Any,
    model: nn.Module,
    example: tuple[Any, ...],
    required: Mapping[str, str],
    unfolded: Mapping[str, str],
) -> Surgery:
    """Cut the model in place."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)  # the dependency graph follows gradients
    surgery = None
    try:
        with torch.enable_grad():
            surgery = Surgery(pruning, model, _copied(example), required, unfolded)
            surgery.run()
    except Exception as error:  # Torch-Pruning raises errors of every kind
        place = f" at layer {surgery.place}" if surgery and surgery.place else ""
        raise RuntimeError(
            f"Torch-Pruning can't cut the model{place} ({type(error).__name__}: {error}); "
            f"use fold_constants, which keeps all shapes"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    return surgery


def _run(
    model: nn.Module, example: tuple[Any, ...], trials: list[tuple[Any, ...]]
) -> tuple[dict[str, _Sizes], list[Any]]:
    """The compacted model's sizes and outputs."""
    try:
        return _sizes(model, example), [_output(model, trial) for trial in trials]
    except Exception as error:  # the forward pass may raise errors of every kind
        raise RuntimeError(
            f"the compacted model does not run in {_failing_module(model, error)} ({error}): its "
            f"forward pass may contain numbers of channels; use fold_constants, which keeps all "
            f"shapes"
        ) from error


def _failing_module(model: nn.Module, error: BaseException) -> str:
    """The innermost module in whose forward pass an error was raised."""
    names = {id(module): name for name, module in model.named_modules() if name}
    frames = traceback.walk_tb(error.__traceback__)
    found = [names.get(id(frame.f_locals.get("self"))) for frame, _ in frames]
    inner = [name for name in found if name is not None]
    return f"module {inner[-1]}" if inner else "the model"


@torch.no_grad()
def _output(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return model(*_copied(arguments))


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments, which a model may change."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(copied, arguments)  # type: ignore[no-any-return]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(model: nn.Module, example: tuple[Any, ...]) -> dict[str, _Sizes]:
    """Sizes of the layers; MACs are counted in a forward pass of the example."""
    layers: dict[str, Any] = prunable_layers(model)
    macs = dict.fromkeys(layers, 0)

    def count(name: str, module: Any, output: Tensor) -> None:
        macs[name] += output.numel() // len(output) * module.weight[0].numel()

    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: count(name, m, output))
        for name, module in layers.items()
    ]
    try:
        _output(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _sizes_of(module, macs[name]) for name, module in layers.items()}


def _sizes_of(module: Any, macs: int) -> _Sizes:
    weight = module.weight
    inputs = weight.shape[1] * getattr(module, "groups", 1)
    bias = 0 if module.bias is None else module.bias.numel()
    return _Sizes(inputs, len(weight), weight.numel() + bias, macs)


def _tolerance(model: nn.Module, outputs: list[Any]) -> float:
    """Share of the largest output by which rounding may change outputs in the lowest precision."""
    tensors = [*model.parameters(), *output_tensors(outputs)]
    epsilons = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    return max(_TOLERANCE, _EPSILONS * max(epsilons, default=0.0))


def _deviation(expected: list[Any], outputs: list[Any], tolerance: float) -> float:
    """The largest difference of two models' outputs, as a share of the largest output in a trial.

    Raises:
        RuntimeError: If it is larger than `tolerance`.
    """
    try:
        pairs = zip(expected, outputs, strict=True)
        found = [compare_outputs(one, other, tolerance) for one, other in pairs]
    except ValueError as error:
        raise RuntimeError(
            f"the compacted model's outputs {error} in the sparse model: its channels are coupled "
            f"in a way that the dependency graph does not show; use fold_constants, which keeps "
            f"all shapes"
        ) from error
    return max(deviation / (largest or 1.0) for deviation, largest in found)
