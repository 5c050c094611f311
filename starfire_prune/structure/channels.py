"""The results of the analysis: the constant channels at the inputs and outputs of each layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from starfire_prune.structure.abstract_values import VARYING

__all__ = ["ConstantChannels", "LayerChannels", "merged_layer"]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerChannels:
    """The constant channels around a convolution or linear layer.

    Attributes:
        name: Name of the module.
        kind: `"conv"` or `"linear"`.
        inputs: The constant of each input channel or feature, float64 of shape `(C,)`; NaN if it
            varies, or differs between calls of the layer.
        outputs: The constant of each output channel, float64 of shape `(K,)`; NaN if it varies.
        dead: Output channels whose weights are all zero, bool of shape `(K,)`.
        padded: Whether the layer pads its input by zeros, so that an output is not constant at the
            border if it reads a constant other than zero.
        shared: What else uses the layer's weight, so that its inputs don't show which weights are
            redundant; None if nothing does.
        reason: Why all inputs vary; if they don't, the same as `shared`.
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


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantChannels:
    """The result of an analysis.

    Attributes:
        layers: A `LayerChannels` for each convolution and linear layer, in the order of use.
        unknown: Operations that the analysis has no rule for, and their places; their outputs
            count as varying.
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
    """The constants that hold in both of two calls of a layer."""
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
