"""Pruning methods for linear layers, and the functions of the same names."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from starfire_prune import masks
from starfire_prune.methods.base import MaskMethod, ModuleT, masked_parameter

__all__ = ["FCBlock", "FCFine", "FCStructured", "fc_block", "fc_fine", "fc_structured"]


Then = Literal["fine", "block"]


class FCBlock(MaskMethod):
    """Prune square blocks of a linear weight; see `masks.fc_block_mask`."""

    def __init__(self, amount: float, *, block_size: int = 4) -> None:
        super().__init__(amount)
        self.block_size = block_size

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.fc_block_mask(
            t, self.amount, mask=default_mask, block_size=(self.block_size, self.block_size)
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        rows, columns = (-(-length // self.block_size) for length in shape)
        blocks = rows * columns
        return ((min(masks.count(self.amount, blocks), blocks - rows), blocks),)


class FCFine(MaskMethod):
    """Prune single weights of a linear weight; see `masks.fc_fine_mask`."""

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.fc_fine_mask(t, self.amount, mask=default_mask)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        total = shape.numel()
        return ((min(masks.count(self.amount, total), total - shape[0]), total),)


class FCStructured(MaskMethod):
    """Prune the columns of a linear weight that read zeros; see `masks.fc_structure_mask`.

    With `flatten` the weight is that of a convolution that reads its whole input at once: as many
    columns to each input channel as a kernel has weights.
    """

    def __init__(
        self,
        amount: float,
        *,
        columns: Tensor | None = None,
        then: Then = "fine",
        block_size: int = 4,
        flatten: bool = False,
    ) -> None:
        super().__init__(amount)
        self.columns = columns
        self.then = then
        self.block_size = block_size
        self.flatten = flatten

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        if not self.flatten:
            return self._mask(t, self.columns, default_mask)
        size = math.prod(t.shape[2:])
        columns = None if self.columns is None else self.columns.repeat_interleave(size)
        mask = None if default_mask is None else default_mask.flatten(1)
        return self._mask(t.flatten(1), columns, mask).view(t.shape)

    def _mask(self, weight: Tensor, columns: Tensor | None, mask: Tensor | None) -> Tensor:
        return masks.fc_structure_mask(
            weight,
            self.amount,
            columns,
            mask=mask,
            then=self.then,
            block_size=(self.block_size, self.block_size),
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        total, most = shape.numel(), shape.numel() - shape[0]
        free = 0 if self.columns is None else shape[0] * int(self.columns.sum())
        return (
            (min(masks.count(self.amount, total), most), total),
            (min(free, most), total),
        )


def fc_block(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    block_size: int = 4,
) -> ModuleT:
    """Prune square blocks of a linear layer by their sum of magnitudes (Figure 2d).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says. The best block of
    each row of blocks is protected, so the total may stay below the count.

    Args:
        module: a linear layer.
        name: of the parameter, shape `(out_features, in_features)`.
        amount: the total share in [0, 1], or number, of the layer's blocks that is zero afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.
        block_size: the side of a block, in weights.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = fc_block(nn.Linear(16, 8), amount=0.5)
        >>> int(linear.weight_mask.sum())
        64
    """
    FCBlock.apply(module, name, amount, importance_scores=importance_scores, block_size=block_size)
    return module


def fc_fine(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
) -> ModuleT:
    """Prune single weights of a linear layer (Figure 2c).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says. The largest weight
    of each output neuron is protected, so the total may stay below the count.

    Args:
        module: a linear layer.
        name: of the parameter, shape `(out_features, in_features)`.
        amount: the total share in [0, 1], or number, of the layer's weights that is zero
            afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = fc_fine(nn.Linear(16, 8), amount=0.75)
        >>> int(linear.weight_mask.sum())
        32
    """
    FCFine.apply(module, name, amount, importance_scores=importance_scores)
    return module


def fc_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    previous: nn.Module,
    importance_scores: Tensor | None = None,
    then: Then = "fine",
    block_size: int = 4,
) -> ModuleT:
    """Prune what a linear layer reads from dead channels, then fine or in blocks (Figure 3).

    The columns that read an output channel of `previous` whose weights are all zero go at no
    cost and count towards the amount. It is for the caller to vouch that such a channel is zero
    where the linear layer reads it: `previous` must have no bias, or be followed by what makes a
    zero of it, and a batch norm in between gives a constant of its own, which a ReLU makes zero
    only if it is negative. `ChannelAnalysis.zero_inputs` finds that out for a whole model.

    Modifies module in place (and also returns it) as `MaskMethod.apply` says. Every output neuron
    keeps a weight, so the total may stay below the count.

    Args:
        module: a linear layer.
        name: of the parameter, shape `(out_features, in_features)`.
        amount: the total share in [0, 1], or number, of the layer's weights that is zero
            afterwards.
        previous: the layer whose output it reads, flattened if need be: `in_features` must be a
            multiple of its output channels.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.
        then: `"fine"` or `"block"`, how the rest goes.
        block_size: the side of a block, in weights.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`, and if the layers don't fit;
            nothing has changed then.

    Example:
        >>> conv = nn.Conv2d(3, 4, 3, bias=False)
        >>> with torch.no_grad():
        ...     conv.weight[1] = 0
        >>> linear = fc_structured(nn.Linear(36, 8), amount=0.5, previous=conv)
        >>> int(linear.weight_mask[:, 9:18].sum()), int(linear.weight_mask.sum())
        (0, 144)
    """
    FCStructured.apply(
        module,
        name,
        amount,
        importance_scores=importance_scores,
        columns=_dead_columns(module, name, previous),
        then=then,
        block_size=block_size,
    )
    return module


def _dead_columns(module: nn.Module, name: str, previous: nn.Module) -> Tensor | None:
    """The columns of a linear weight that read output channels without a weight."""
    weight = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    if weight is None or weight.ndim != 2:
        return None  # `apply` refuses it
    dead = ~masked_parameter(previous, "weight").flatten(1).any(1)
    if weight.shape[1] % len(dead):
        raise ValueError(
            f"`in_features` (={weight.shape[1]}) must be a multiple of the output channels of "
            f"`previous` (={len(dead)}): each feeds as many columns, as after flattening"
        )
    return dead.repeat_interleave(weight.shape[1] // len(dead))
