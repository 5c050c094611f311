"""Pruning methods for convolutions, and the functions of the same names."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from starfire_prune import masks
from starfire_prune.methods.base import MaskMethod, ModuleT

__all__ = [
    "CKStructured",
    "IntraStructured",
    "WindowStructured",
    "ck_structured",
    "intra_structured",
    "window_structured",
]


Scope = Literal["channel", "layer"]


class WindowStructured(MaskMethod):
    """Prune the smallest weights inside each kernel; see `masks.window_mask`."""

    def __init__(
        self, amount: float, *, max_nonzero: int | None = None, exact_layer_sparsity: bool = False
    ) -> None:
        super().__init__(amount)
        self.max_nonzero = max_nonzero
        self.exact_layer_sparsity = exact_layer_sparsity

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.window_mask(
            t,
            self.amount,
            mask=default_mask,
            max_nonzero=self.max_nonzero,
            exact_layer_sparsity=self.exact_layer_sparsity,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        size = math.prod(shape if self.exact_layer_sparsity else shape[2:])
        return ((masks.count(self.amount, size), size),)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.exact_layer_sparsity else math.prod(shape[:2])


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
            block_size=(self.group, 1),
            scope=self.scope,
            max_nonzero=self.max_nonzero,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        units = masks.ck_units(
            shape, groups=self.groups, block_size=(self.group, 1), scope=self.scope
        )
        return ((units.pruned(self.amount), units.size),)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.scope == "layer" else shape[1] * self.groups


class IntraStructured(MaskMethod):
    """Prune kernels and the weights inside those that stay; see `masks.intra_mask`."""

    def __init__(
        self,
        amount: float,
        *,
        window_fraction: float = 0.5,
        groups: int = 1,
        scope: Scope = "channel",
    ) -> None:
        super().__init__(amount)
        self.window_fraction = window_fraction
        self.groups = groups
        self.scope = scope

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.intra_mask(
            t,
            self.amount,
            mask=default_mask,
            window_fraction=self.window_fraction,
            groups=self.groups,
            scope=self.scope,
        )

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        size = masks.ck_units(shape, groups=self.groups, scope=self.scope).size
        if math.prod(shape[2:]) == 1:
            return ((masks.count(self.amount, size), size),)
        _, kernel_amount = masks.intra_shares(self.amount, self.window_fraction)
        total = shape.numel()
        return (masks.count(kernel_amount, size), size), (masks.count(self.amount, total), total)

    def locales(self, shape: torch.Size) -> int:
        return 1 if self.scope == "layer" else shape[1] * self.groups


def window_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    max_nonzero: int | None = None,
    exact_layer_sparsity: bool = False,
) -> ModuleT:
    """Prune the smallest weights inside each kernel of a convolution (Algorithm 3, Figure 2a).

    Modifies module in place (and also returns it) as `MaskMethod.apply` says.

    Args:
        module: a convolution with kernels of two weights or more.
        name: of the parameter, shape `(K, C / groups, *kernel)`.
        amount: the total share in [0, 1], or number, of weights of each kernel that is zero
            afterwards; of the layer with `exact_layer_sparsity`.
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
        exact_layer_sparsity=exact_layer_sparsity,
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
    window_fraction: float = 0.5,
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
        window_fraction=window_fraction,
        groups=_groups(module),
        scope=scope,
    )
    return module


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1
