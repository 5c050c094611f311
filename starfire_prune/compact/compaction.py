"""Smaller dense models: the channels that nothing needs are cut out of the tensors.

Which channels go is decided on the weights, after `fold_constants`: one that no layer reads. How
they hang together through additions, concatenations and flattening is the dependency graph of
Torch-Pruning (`pip install "starfire-prune[compact]"`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from starfire_prune.compact.coupling import pinned_layers
from starfire_prune.compact.folding import FoldReport, fold_in_place
from starfire_prune.compact.surgery import Surgery
from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.modules import prunable_layers
from starfire_prune.utils.text import format_columns

__all__ = ["CompactLayer", "CompactReport", "compact", "format_compaction"]


_TOLERANCE = 1e-3  # of the largest output; surgery gone wrong is off by far more than rounding
_EPSILONS = 16  # the tolerance of types of low precision, whose rounding adds up
_SEEDS = (1, 2)


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
        deviation: the largest difference of the outputs, on the example and on random arguments
            like it, as a share of the largest output.
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
    channel. The model's output, and channels that reach operations which mix them, stay. The
    outputs are compared on the example, and on normally distributed arguments in place of its
    floating ones. Parameters that modules share stay shared where they still are the same.

    Args:
        model: in any phase of pruning; it is left as it is.
        example_input: a small batch, or the tuple of the model's arguments.

    Returns:
        The smaller model, in eval mode, and what was done.

    Raises:
        ModuleNotFoundError: without Torch-Pruning.
        RuntimeError: if Torch-Pruning can't cut the model, or the smaller model doesn't run or its
            outputs differ, as for a model that has numbers of channels written into its forward
            pass.

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
    trials = [example, *(_random_like(example, seed) for seed in _SEEDS)]
    smaller = dense_copy(model).eval()
    before, parameters = _sizes(smaller, example), _count(smaller)
    shared = _unshare(smaller)
    analysis = ChannelAnalysis(smaller, example)
    expected = [_output(smaller, trial) for trial in trials]
    fold = fold_in_place(smaller, analysis, merge=True)
    unfolded = {layer.name: layer.reason for layer in fold.layers if layer.reason is not None}
    surgery = _cut(pruning, smaller, example, pinned_layers(analysis.graph), unfolded)
    _share_again(shared)
    after, outputs = _run(smaller, example, trials)
    deviation = _deviation(expected, outputs, _tolerance(smaller, expected))
    stayed = surgery.stayed()
    layers = tuple(_layer(name, before[name], after[name], *stayed[name]) for name in before)
    return smaller, CompactReport(layers, (parameters, _count(smaller)), deviation, fold)


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


class _Sizes(NamedTuple):
    """Of a layer, as in `CompactLayer`."""

    inputs: int
    outputs: int
    parameters: int
    macs: int


def _layer(
    name: str, before: _Sizes, after: _Sizes, stayed: int, reason: str | None
) -> CompactLayer:
    inputs, outputs, parameters, macs = zip(before, after, strict=True)
    return CompactLayer(name, inputs, outputs, parameters, macs, stayed, reason)


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "compact() needs Torch-Pruning: pip install 'starfire-prune[compact]'"
        ) from error


def _random_like(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """The arguments with normally distributed values in the floating ones."""
    generator = torch.Generator().manual_seed(seed)

    def random(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return tree_map(random, example)  # type: ignore[no-any-return]


def _unshare(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Give each module parameters of its own, to be cut apart; the places of each shared one."""
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
    """Share parameters that are still the same."""
    for (first, first_name), *others in shared:
        parameter = first.get_parameter(first_name)
        for module, name in others:
            if torch.equal(parameter, module.get_parameter(name)):
                module.register_parameter(name, parameter)


def _cut(
    pruning: Any,
    model: nn.Module,
    example: tuple[Any, ...],
    pinned: Mapping[str, str],
    unfolded: Mapping[str, str],
) -> Surgery:
    """Cut the model in place."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)  # the dependency graph follows gradients
    try:
        with torch.enable_grad():
            surgery = Surgery(pruning, model, _copied(example), pinned, unfolded)
            surgery.run()
    except Exception as error:  # Torch-Pruning raises whatever its assumptions run into
        raise RuntimeError(
            f"Torch-Pruning can't cut the model ({type(error).__name__}: {error}); "
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
    except Exception as error:  # whatever the forward pass raises
        raise RuntimeError(
            f"the compacted model does not run ({error}): numbers of channels may be written into "
            f"its forward pass; use fold_constants, which keeps all shapes"
        ) from error


@torch.no_grad()
def _output(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return model(*_copied(arguments))


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for one run of a model that may change them."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(copied, arguments)  # type: ignore[no-any-return]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(model: nn.Module, example: tuple[Any, ...]) -> dict[str, _Sizes]:
    """Sizes of the layers, with MACs counted in a forward pass of the example."""
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
    """The share of the largest output that rounding may change, in the lowest precision used."""
    tensors = [*model.parameters(), *_tensors(outputs)]
    epsilons = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    return max(_TOLERANCE, _EPSILONS * max(epsilons, default=0.0))


def _deviation(expected: list[Any], outputs: list[Any], tolerance: float) -> float:
    """The largest difference of two models' outputs, as a share of the largest output in a trial.

    Raises:
        RuntimeError: if it is beyond `tolerance`.
    """
    return max(
        _checked(_tensors(one), _tensors(other), tolerance)
        for one, other in zip(expected, outputs, strict=True)
    )


def _checked(expected: list[Tensor], outputs: list[Tensor], tolerance: float) -> float:
    """The deviation of one trial, if it is within `tolerance`."""
    shapes, others = ([tuple(tensor.shape) for tensor in side] for side in (expected, outputs))
    if shapes != others:
        raise _refusal(f"have the shapes {others}, not {shapes} as the sparse model's")
    pairs = list(zip(expected, outputs, strict=True))
    floating = [(one, other) for one, other in pairs if one.is_floating_point()]
    if not all(torch.equal(one, other) for one, other in pairs if not one.is_floating_point()):
        raise _refusal("differ from the sparse model's in integers or bools")
    largest = max((_largest(one[one.isfinite()]) for one, _ in floating), default=0.0) or 1.0
    deviation = max((_largest(_difference(one, other)) for one, other in floating), default=0.0)
    if not deviation <= tolerance * largest:
        raise _refusal(
            f"differ by {deviation:.2g} from the sparse model's, whose largest is {largest:.2g}"
        )
    return deviation / largest


def _refusal(difference: str) -> RuntimeError:
    return RuntimeError(
        f"the compacted model's outputs {difference}: its channels hang together in a way that "
        f"the dependency graph does not show; use fold_constants, which keeps all shapes"
    )


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """The distance of two tensors; infinite where one alone is NaN, or infinite."""
    same = (one == other) | (one.isnan() & other.isnan())
    return (one - other).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
