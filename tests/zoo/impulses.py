"""What a layer really computes, measured by unit impulses, and who reads its weight.

A layer reports zeros in its weight. These functions don't read the weight: they send impulses
through the layer in double precision, and watch which of them reach its output.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from starfire_prune.utils.modules import copied_module
from starfire_prune.utils.outputs import output_tensors

__all__ = ["Response", "UnmeasurableError", "foreign_readers", "response"]


class UnmeasurableError(Exception):
    """A layer has a response that impulses can't describe."""


@dataclasses.dataclass(frozen=True)
class Response:
    """Which weights of a layer act on its output.

    Attributes:
        acts: Whether each weight acts, of the weight's shape without the channels not measured.
        channels: Indices of the measured input channels, within a group, in the weight's second
            dimension.
    """

    acts: Tensor
    channels: Tensor

    def acting(self, pruned: Tensor) -> int:
        """The number of pruned weights, where `pruned` is True, that act all the same."""
        return int((pruned[:, self.channels] & self.acts).sum())

    @property
    def zeros(self) -> int:
        """The number of measured weights that don't act."""
        return int((~self.acts).sum())


@torch.no_grad()
def response(module: nn.Module, most_channels: int | None = None, seed: int = 0) -> Response:
    """Send an impulse into each input channel of a convolution or linear layer.

    An impulse is positive once and negative once, so that a ReLU within the layer hides nothing.

    Args:
        module: The layer, in any phase of pruning. It is not changed.
        most_channels: Number of input channels (of each group) that are measured, drawn at random;
            all by default.
        seed: Seed of this draw.

    Raises:
        UnmeasurableError: If the layer's output is not that of a convolution or linear layer.
    """
    twin: Any = copied_module(module).double().eval()
    shape = twin.weight.shape
    channels = torch.arange(shape[1])
    if most_channels is not None and most_channels < len(channels):
        generator = torch.Generator().manual_seed(seed)
        channels = torch.randperm(len(channels), generator=generator)[:most_channels].sort()[0]
    if isinstance(twin, _ConvNd):
        return Response(_conv_acts(twin, channels), channels)
    acts = _differences(twin, torch.eye(shape[1], dtype=torch.float64)[channels])
    if acts.shape != (len(channels), shape[0]):
        raise UnmeasurableError(f"its output has the shape {tuple(acts.shape)}")
    return Response(acts.T, channels)


def _differences(module: nn.Module, impulses: Tensor) -> Tensor:
    """Whether each output differs from the answer to zeros, for an impulse or its negative."""
    rest = module(torch.zeros_like(impulses))
    differs: Tensor = (module(impulses) != rest) | (module(-impulses) != rest)
    return differs


def _conv_acts(module: Any, channels: Tensor) -> Tensor:
    """Which weights of a convolution act, `(K, channels, *kernel)`."""
    if isinstance(module, _ConvTransposeNd):
        raise UnmeasurableError("it is transposed")
    groups, kernel = module.groups, module.kernel_size
    n_dims, per_group = len(kernel), module.in_channels // module.groups
    module.stride = module.dilation = (1,) * n_dims  # they move the weights, and cost memory
    if isinstance(module.padding, tuple) and module.padding_mode == "zeros":
        module.padding = (0,) * n_dims
    sizes = [2 * size + 1 for size in kernel]
    acts = torch.zeros(module.out_channels, len(channels), *kernel, dtype=torch.bool)
    filters = module.out_channels // groups
    for index, channel in enumerate(channels.tolist()):
        # one impulse for each group: groups don't see each other
        impulse = torch.zeros(1, module.in_channels, *sizes, dtype=torch.float64)
        for group in range(groups):
            impulse[(0, group * per_group + channel, *kernel)] = 1  # in the middle
        output = _differences(module, impulse)[0]
        if output.shape[0] != filters * groups or output.ndim != n_dims + 1:
            raise UnmeasurableError(f"its output has the shape {tuple(output.shape)}")
        pads = [(out - (size + 2)) // 2 for out, size in zip(output.shape[1:], kernel, strict=True)]
        for place in itertools.product(*map(range, kernel)):
            at = [size + pad - j for size, pad, j in zip(kernel, pads, place, strict=True)]
            here: Any = (slice(None), *at)
            there: Any = (slice(None), index, *place)
            acts[there] = output[here]
    if not acts.any() and not _is_silent(module):
        raise UnmeasurableError("it answers elsewhere than a convolution does")
    return acts


def _is_silent(module: Any) -> bool:
    """Whether a convolution answers nothing, for example because its gain is zero."""
    sizes = [2 * size + 1 for size in module.kernel_size]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, module.in_channels, *sizes, generator=generator, dtype=torch.float64)
    return not bool(_differences(module, images).any())


@torch.no_grad()
def foreign_readers(
    model: nn.Module, arguments: tuple[Any, ...], layers: Iterable[str]
) -> list[str]:
    """The layers whose weight is read by something else than a call of the layer.

    Each layer is replaced by a copy of itself, and its own weight filled with NaN: nothing changes
    unless somebody else reads it.

    Args:
        model: The model, in any phase of pruning, with reproducible outputs in eval mode.
        arguments: Arguments of a forward pass.
        layers: Names of the layers.
    """
    names = list(layers)
    expected = output_tensors(copied_module(model).eval()(*copy.deepcopy(arguments)))
    if _same(expected, _isolated(model, arguments, names)):
        return []
    if len(names) == 1:
        return names
    half = math.ceil(len(names) / 2)
    found = [foreign_readers(model, arguments, part) for part in (names[:half], names[half:])]
    return [name for part in found for name in part]


def _isolated(model: nn.Module, arguments: tuple[Any, ...], layers: list[str]) -> list[Tensor]:
    """The outputs of a model in which the weights of layers are NaN for everybody else."""
    twin = copied_module(model).eval()
    for name in layers:
        layer: Any = twin.get_submodule(name)
        layer.forward = copied_module(layer).__call__
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.fill_(torch.nan)
    try:
        return output_tensors(twin(*copy.deepcopy(arguments)))
    except Exception:  # NaN can stop a model
        return []


def _same(ones: list[Tensor], others: list[Tensor]) -> bool:
    pairs: Any = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in pairs
    )


def reported_zeros(masks: Mapping[str, Tensor], name: str) -> Tensor:
    """Where a pruner reports that a layer's weights are pruned."""
    return ~masks[f"{name}.weight" if name else "weight"].bool().cpu()
