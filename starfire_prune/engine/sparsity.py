"""Sparsity of a model, measured on the weights themselves, and its table.

Other packages count the zeros of a pruned module's stale `weight`, or none. The functions here read
the weights that a forward pass would use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from starfire_prune.utils.modules import counted_weights, effective_weight, other_weights
from starfire_prune.utils.text import format_columns

__all__ = [
    "LayerSparsity",
    "LeftOut",
    "Sparsity",
    "format_table",
    "left_out_text",
    "measure_sparsity",
    "weights_left_out",
]


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """The zeros of a layer's weight.

    Attributes:
        name: Name of the module, or of the parameter for an input projection of
            `nn.MultiheadAttention`.
        kind: `"conv"` or `"linear"`.
        shape: Shape `(K, C / groups, *kernel)`, also of a transposed convolution, or
            `(out_features, in_features)`.
        zeros: Number of weights that are zero.
        total: Number of weights.
        pruned_kernels: Number of kernels with only zeros; 0 for a linear layer.
        dead_outputs: Number of output channels or neurons with only zeros.
        selected: Whether the layer is one of those that are pruned.
        dead_input_zeros: Number of weights that were pruned because they only read zeros, beyond
            the amount asked for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    zeros: int
    total: int
    pruned_kernels: int
    dead_outputs: int
    selected: bool
    dead_input_zeros: int = 0

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return self.zeros / self.total if self.total else 0.0


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A weight matrix that the sparsity doesn't count, such as an embedding.

    Attributes:
        name: Name of the parameter.
        module: Class name of the module that holds it.
        total: Number of weights.
    """

    name: str
    module: str
    total: int


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The sparsity of a model.

    Attributes:
        layers: All convolutions, also transposed ones, and all linear layers, with the input
            projections of `nn.MultiheadAttention`.
        left_out: The other parameters with two dimensions or more, which no share counts.
    """

    layers: tuple[LayerSparsity, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Sparsity({len(self.layers)} layers, selected={self.selected:.4f}, "
            f"network={self.network:.4f})"
        )

    @property
    def selected(self) -> float:
        """Share of zeros over the layers that are pruned, in [0, 1]."""
        return _share(layer for layer in self.layers if layer.selected)

    @property
    def network(self) -> float:
        """Share of zeros over all convolutions and linear layers, in [0, 1], not of `left_out`."""
        return _share(self.layers)

    @property
    def dead_input_zeros(self) -> int:
        """Weights that were pruned because they only read zeros, beyond the amounts asked for."""
        return sum(layer.dead_input_zeros for layer in self.layers)

    def __getitem__(self, name: str) -> LayerSparsity:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no convolution or linear layer {name!r}")


@torch.no_grad()
def measure_sparsity(
    model: nn.Module,
    selected: Iterable[str] | None = None,
    dead_input_zeros: Mapping[str, int] | None = None,
) -> Sparsity:
    """Count the zeros of a model's convolutions and linear layers.

    Args:
        model: A model that is pruned by hooks, permanently or not at all, also wrapped by DDP or
            compiled.
        selected: Names of the layers that are pruned; all by default.
        dead_input_zeros: Number of weights of each layer that were pruned because they only read
            zeros.

    Example:
        >>> measure_sparsity(nn.Sequential(nn.Linear(4, 2))).network
        0.0
    """
    names = None if selected is None else set(selected)
    layers = tuple(
        _measured(
            name,
            _effective(module, key),
            names is None or name in names,
            (dead_input_zeros or {}).get(name, 0),
        )
        for name, module, key in counted_weights(model)
    )
    return Sparsity(layers, weights_left_out(model))


def weights_left_out(model: nn.Module) -> tuple[LeftOut, ...]:
    """The weight matrices of a model that are neither convolutions nor linear layers."""
    return tuple(
        LeftOut(name, type(module).__name__, total) for name, module, total in other_weights(model)
    )


def left_out_text(left_out: Iterable[LeftOut]) -> str:
    """The numbers of weights that are left out, by class of the module that holds them.

    Example:
        >>> left_out_text([LeftOut("a.weight", "CondConv2d", 1200), LeftOut("pos", "Vit", 40)])
        '1,200 weights of CondConv2d and 40 of Vit (pos)'
    """
    groups: dict[str, list[LeftOut]] = {}
    for weight in left_out:
        groups.setdefault(weight.module, []).append(weight)
    totals = {kind: sum(weight.total for weight in own) for kind, own in groups.items()}
    parts: list[str] = []
    for kind in sorted(groups, key=lambda kind: -totals[kind]):
        (first, *others) = groups[kind]
        of = kind if others or first.name.endswith(".weight") else f"{kind} ({first.name})"
        parts.append(f"{totals[kind]:,}{'' if parts else ' weights'} of {of}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def format_table(sparsity: Sparsity) -> str:
    """The table of layers: kind, shape, zeros, pruned kernels, dead channels; totals at the end."""
    header = ("layer", "kind", "shape", "zeros", "sparsity", "pruned kernels", "dead outputs")
    rows = [
        (
            layer.name + ("" if layer.selected else " (dense)"),
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.zeros:,} / {layer.total:,}",
            f"{layer.sparsity:.2%}",
            f"{layer.pruned_kernels:,} / {math.prod(layer.shape[:2]):,}"
            if layer.kind == "conv"
            else "",
            f"{layer.dead_outputs} / {layer.shape[0]}",
        )
        for layer in sparsity.layers
    ]
    lines = [format_columns(header, rows, left=range(3))]
    if any(layer.dead_outputs for layer in sparsity.layers):
        lines.append(
            "dead outputs: channels whose weights are all zero, so that their value is constant"
        )
    lines.append(
        f"sparsity: {sparsity.selected:.2%} of the pruned layers' weights, "
        f"{sparsity.network:.2%} of all convolution and linear weights"
        + (f", without {left_out_text(sparsity.left_out)}" if sparsity.left_out else "")
    )
    if sparsity.dead_input_zeros:
        zeros = sum(layer.zeros for layer in sparsity.layers)
        lines.append(
            f"dead inputs: {sparsity.dead_input_zeros:,} of the {zeros:,} zeros were pruned "
            f"because they only read zeros, beyond the amount asked for"
        )
    return "\n".join(lines)


def _effective(module: nn.Module, key: str) -> Tensor:
    """A weight of shape `(K, C / groups, …)`, whose order transposed convolutions change."""
    weight = effective_weight(module, key)
    if not isinstance(module, _ConvTransposeNd):
        return weight
    groups = module.groups
    grouped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)  # from (groups, C / groups, K / groups, …)


def _measured(name: str, weight: Tensor, selected: bool, dead_input_zeros: int) -> LayerSparsity:
    kept = weight != 0
    is_conv = kept.ndim > 2
    kernels = kept.flatten(2).any(2) if is_conv else kept
    return LayerSparsity(
        name=name,
        kind="conv" if is_conv else "linear",
        shape=tuple(kept.shape),
        zeros=kept.numel() - int(kept.sum()),
        total=kept.numel(),
        pruned_kernels=kernels.numel() - int(kernels.sum()) if is_conv else 0,
        dead_outputs=len(kernels) - int(kernels.any(1).sum()),
        selected=selected,
        dead_input_zeros=dead_input_zeros,
    )


def _share(layers: Iterable[LayerSparsity]) -> float:
    counted = [(layer.zeros, layer.total) for layer in layers]
    total = sum(total for _, total in counted)
    return sum(zeros for zeros, _ in counted) / total if total else 0.0
