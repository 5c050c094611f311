"""What the analysis of constant channels finds: the constants around each layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from starfire_prune.structure.lattice import VARYING

__all__ = ["ConstantChannels", "LayerChannels", "merged_layer"]


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


def merged_layer(one: LayerChannels, other: LayerChannels) -> LayerChannels:
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
