"""Pruning methods in the image of `torch.nn.utils.prune`, and the functions of the same names.

A method is its mask function (`starfire_prune.masks`) and its options, on top of `MaskMethod`: a
`torch.nn.utils.prune.BasePruningMethod`, so that `prune.is_pruned`, `prune.remove` and
`prune.PruningContainer` work on it.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from starfire_prune import masks
from starfire_prune.mask_method import MaskMethod, masked_parameter

__all__ = [
    "METHODS",
    "CKStructured",
    "FCBlock",
    "FCFine",
    "FCStructured",
    "FilterStructured",
    "IntraStructured",
    "MagnitudeUnstructured",
    "RandomUnstructured",
    "WindowStructured",
    "ck_structured",
    "fc_block",
    "fc_fine",
    "fc_structured",
    "filter_structured",
    "intra_structured",
    "magnitude_unstructured",
    "random_unstructured",
    "window_structured",
]

Scope = Literal["channel", "layer"]
Then = Literal["fine", "block"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WindowStructured(MaskMethod):
    """Prune the smallest weights inside each kernel; see `masks.window_mask`."""

    def __init__(
        self, amount: float, *, max_nonzero: int | None = None, spread: bool = False
    ) -> None:
        super().__init__(amount)
        self.max_nonzero = max_nonzero
        self.spread = spread

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.window_mask(
            t, self.amount, mask=default_mask, max_nonzero=self.max_nonzero, spread=self.spread
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        size = math.prod(shape if self.spread else shape[2:])
        return ((masks.count(self.amount, size), size),)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.spread else math.prod(shape[:2])


class CKStructured(MaskMethod):
    """Prune whole kernels by their largest magnitude; see `masks.ck_mask`."""

    def __init__(
        self,
        amount: float,
        *,
        groups: int = 1,
        group: int = 1,
        scope: Scope = "channel",
        max_nonzero: int | None = None,
    ) -> None:
        super().__init__(amount)
        self.groups = groups
        self.group = group
        self.scope = scope
        self.max_nonzero = max_nonzero

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.ck_mask(
            t,
            self.amount,
            mask=default_mask,
            groups=self.groups,
            group=self.group,
            scope=self.scope,
            max_nonzero=self.max_nonzero,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        size = masks.ck_locale_size(
            *shape[:2], groups=self.groups, group=self.group, scope=self.scope
        )
        return ((masks.count(self.amount, size), size),)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.scope == "layer" else shape[1] * self.groups


class IntraStructured(MaskMethod):
    """Prune kernels and the weights inside those that stay; see `masks.intra_mask`."""

    def __init__(
        self,
        amount: float,
        *,
        share: float = 0.5,
        groups: int = 1,
        scope: Scope = "channel",
    ) -> None:
        super().__init__(amount)
        self.share = share
        self.groups = groups
        self.scope = scope

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.intra_mask(
            t,
            self.amount,
            mask=default_mask,
            share=self.share,
            groups=self.groups,
            scope=self.scope,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        size = masks.ck_locale_size(*shape[:2], groups=self.groups, scope=self.scope)
        if math.prod(shape[2:]) == 1:
            return ((masks.count(self.amount, size), size),)
        _, kernel_amount = masks.intra_shares(self.amount, self.share)
        total = shape.numel()
        return (masks.count(kernel_amount, size), size), (masks.count(self.amount, total), total)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.scope == "layer" else shape[1] * self.groups


class FCBlock(MaskMethod):
    """Prune square blocks of a linear weight; see `masks.fc_block_mask`."""

    def __init__(self, amount: float, *, block_size: int = 4) -> None:
        super().__init__(amount)
        self.block_size = block_size

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.fc_block_mask(t, self.amount, mask=default_mask, block_size=self.block_size)

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
            block_size=self.block_size,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        total, most = shape.numel(), shape.numel() - shape[0]
        free = 0 if self.columns is None else shape[0] * int(self.columns.sum())
        return (
            (min(masks.count(self.amount, total), most), total),
            (min(free, most), total),
        )


class MagnitudeUnstructured(MaskMethod):
    """Prune the smallest single weights of the layer; see `masks.magnitude_mask`."""

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.magnitude_mask(t, self.amount, mask=default_mask)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        total = shape.numel()
        return ((masks.count(self.amount, total), total),)


class RandomUnstructured(MaskMethod):
    """Prune single weights in a fixed random order; see `masks.random_mask`."""

    def __init__(self, amount: float, *, seed: int = 0) -> None:
        super().__init__(amount)
        self.seed = seed

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.random_mask(t, self.amount, mask=default_mask, seed=self.seed)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        total = shape.numel()
        return ((masks.count(self.amount, total), total),)


class FilterStructured(MaskMethod):
    """Prune whole output channels by their L1 norm; see `masks.filter_mask`."""

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.filter_mask(t, self.amount, mask=default_mask)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        return ((masks.count(self.amount, shape[0]), shape[0]),)


METHODS: Mapping[str, type[MaskMethod]] = MappingProxyType(
    {
        "window": WindowStructured,
        "ck": CKStructured,
        "intra": IntraStructured,
        "block": FCBlock,
        "fine": FCFine,
        "structure": FCStructured,
        "magnitude": MagnitudeUnstructured,
        "random": RandomUnstructured,
        "filter": FilterStructured,
    }
)
"""The methods by the names that recipes use."""


def window_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    max_nonzero: int | None = None,
    spread: bool = False,
) -> ModuleT:
    """Prune the smallest weights inside each kernel of a convolution (Algorithm 3, Figure 2a).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: a convolution with kernels of two weights or more.
        name: of the parameter, shape `(K, C / groups, *kernel)`.
        amount: the total share in [0, 1], or number, of weights of each kernel that is zero
            afterwards; of the layer with `spread`.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.
        max_nonzero: at most this many weights of each kernel stay.
        spread: reach the layer's count exactly, instead of in steps of a weight of each kernel.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> conv = window_structured(nn.Conv2d(8, 16, 3), amount=5)
        >>> int(conv.weight_mask[0, 0].sum())
        4
    """
    WindowStructured.apply(
        module,
        name,
        amount,
        importance_scores=importance_scores,
        max_nonzero=max_nonzero,
        spread=spread,
    )
    return module


def ck_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    group: int = 1,
    scope: Scope = "channel",
    max_nonzero: int | None = None,
) -> ModuleT:
    """Prune whole kernels of a convolution by their largest magnitude (Algorithm 1, Figure 2b).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: a convolution.
        name: of the parameter, shape `(K, C / groups, *kernel)`.
        amount: the total share in [0, 1], or number, of the kernels reading each input channel
            that is zero afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.
        group: this many neighbouring output channels share one kernel mask.
        scope: `"channel"`: the kernels that read one input channel compete; `"layer"`: all do,
            which depthwise convolutions need.
        max_nonzero: at most this many units of each locale stay.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> conv = ck_structured(nn.Conv2d(8, 10, 3), amount=0.6)
        >>> int(conv.weight_mask[:, 0].any((1, 2)).sum())
        4
    """
    CKStructured.apply(
        module,
        name,
        amount,
        importance_scores=importance_scores,
        groups=_groups(module),
        group=group,
        scope=scope,
        max_nonzero=max_nonzero,
    )
    return module


def intra_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    share: float = 0.5,
    scope: Scope = "channel",
) -> ModuleT:
    """Prune kernels, then the smallest weights of those that stay (Algorithm 4).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: a convolution; 1x1 kernels are pruned by CK alone.
        name: of the parameter, shape `(K, C / groups, *kernel)`.
        amount: the total share of the layer's weights, a float in [0, 1], that is zero afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.
        share: share in [0, 1] of the amount that goes inside of kernels.
        scope: the locale of the kernels, as in `ck_structured`.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> conv = intra_structured(nn.Conv2d(8, 10, 3), amount=0.5)
        >>> int(conv.weight_mask.sum())
        360
    """
    IntraStructured.apply(
        module,
        name,
        amount,
        importance_scores=importance_scores,
        share=share,
        groups=_groups(module),
        scope=scope,
    )
    return module


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


def magnitude_unstructured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
) -> ModuleT:
    """Prune the smallest single weights of the layer, in no structure: a baseline.

    `prune.l1_unstructured` with this package's rules: absolute amounts, updated in place.
    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: any module.
        name: of the parameter, any shape.
        amount: the total share in [0, 1], or number, of weights that is zero afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = magnitude_unstructured(nn.Linear(16, 8), amount=0.75)
        >>> int(linear.weight_mask.sum())
        32
    """
    MagnitudeUnstructured.apply(module, name, amount, importance_scores=importance_scores)
    return module


def random_unstructured(
    module: ModuleT, name: str = "weight", amount: float | None = None, *, seed: int = 0
) -> ModuleT:
    """Prune single weights of the layer in the random order that `seed` fixes: a baseline.

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: any module.
        name: of the parameter, any shape.
        amount: the total share in [0, 1], or number, of weights that is zero afterwards.
        seed: of the order.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = random_unstructured(nn.Linear(16, 8), amount=0.75)
        >>> int(linear.weight_mask.sum())
        32
    """
    RandomUnstructured.apply(module, name, amount, seed=seed)
    return module


def filter_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
) -> ModuleT:
    """Prune whole output channels by their L1 norm: the coarse baseline.

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: any module.
        name: of the parameter, shape `(K, ...)`.
        amount: the total share in [0, 1], or number, of output channels that is zero afterwards.
        importance_scores: ranked by magnitude in the parameter's place, of its shape.

    Raises:
        AttributeError, TypeError, ValueError: as `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> conv = filter_structured(nn.Conv2d(8, 10, 3), amount=0.5)
        >>> int(conv.weight_mask.any((1, 2, 3)).sum())
        5
    """
    FilterStructured.apply(module, name, amount, importance_scores=importance_scores)
    return module


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


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
