"""Pruning methods for convolutions, and the functions of the same names."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from starfire_prune import masks
from starfire_prune.masks import Units
from starfire_prune.methods.base import CONVOLUTIONS, MaskMethod, ModuleT, of_layer
from starfire_prune.methods.options import BlockSize, Count, Fraction, Scope
from starfire_prune.methods.registry import register_method
from starfire_prune.methods.schedules import Schedule
from starfire_prune.utils.modules import is_depthwise

__all__ = [
    "CKStructured",
    "InterStructured",
    "IntraStructured",
    "WindowStructured",
    "ck_structured",
    "intra_structured",
    "window_structured",
]

_SCOPE = "where kernels compete: among those that read the same input channel, or in the layer"
_BLOCK_SIZE = "[out, in]: neighbouring output and input channels whose kernels are pruned together"
_WINDOW_FRACTION = "part of the amount that is pruned inside kernels, in [0, 1]"


@register_method("window")
@dataclasses.dataclass(eq=False, kw_only=True)
class WindowStructured(MaskMethod):
    """Prune the smallest weights inside each kernel; see `masks.window_mask`.

    In a model, 1x1 convolutions have no window: `pointwise` says how they are pruned, and `scope`
    and `block_size` are those of CK there.
    """

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    exact_layer_sparsity: Annotated[
        bool, Field(description="true: layers reach their amount exactly, not in steps of 1/(R·S)")
    ] = False
    max_nonzero: Annotated[
        Count | None, Field(description="most weights that each kernel keeps, from 1")
    ] = None
    pointwise: Annotated[
        Literal["ck", "none"], Field(description="how 1x1 kernels are pruned; none: not at all")
    ] = "ck"
    scope: Annotated[Scope, Field(description=f"for 1x1 kernels: {_SCOPE}")] = "channel"
    block_size: Annotated[BlockSize, Field(description=f"for 1x1 kernels: {_BLOCK_SIZE}")] = (1, 1)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.window_mask(
            t,
            self.amount,
            mask=default_mask,
            max_nonzero=self.max_nonzero,
            exact_layer_sparsity=self.exact_layer_sparsity,
        )

    def units(self, shape: torch.Size) -> Units:
        return masks.window_units(shape, exact_layer_sparsity=self.exact_layer_sparsity)

    def for_layer(self, name: str, module: nn.Module) -> MaskMethod | None:
        if not _is_pointwise(module):
            return self
        if self.pointwise == "none":
            return None
        ck = CKStructured(self.amount, scope=self.scope, block_size=self.block_size)
        return ck.for_layer(name, module)

    def at(self, progress: float, schedule: Schedule) -> MaskMethod:
        max_nonzero = self.max_nonzero if progress == 1.0 else None
        amount = self.amount_at(progress, schedule)
        return dataclasses.replace(self, amount=amount, max_nonzero=max_nonzero)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if options.get("pointwise") == "none":
            for option in ("scope", "block_size"):
                if option in options:
                    yield option, "has no effect with pointwise none"


@register_method("ck")
@dataclasses.dataclass(eq=False, kw_only=True)
class CKStructured(MaskMethod):
    """Prune whole kernels, or blocks of kernels; see `masks.ck_mask`."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    block_size: Annotated[BlockSize, Field(description=_BLOCK_SIZE)] = (1, 1)
    scope: Annotated[Scope, Field(description=_SCOPE)] = "channel"
    max_nonzero: Annotated[
        Count | None, Field(description="most kernels or blocks that each scope keeps, from 1")
    ] = None
    groups: int = of_layer(1)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.ck_mask(
            t,
            self.amount,
            mask=default_mask,
            groups=self.groups,
            block_size=self.block_size,
            scope=self.scope,
            max_nonzero=self.max_nonzero,
        )

    def units(self, shape: torch.Size) -> Units:
        return masks.ck_units(
            shape, groups=self.groups, block_size=self.block_size, scope=self.scope
        )

    def detail(self, shape: torch.Size) -> str:
        if self.block_size == (1, 1):
            return ""
        own = masks.effective_block_size(shape, self.groups, self.block_size)
        asked = list(self.block_size)
        return f"{asked}" if own == self.block_size else f"{list(own)} ({asked} doesn't fit)"

    def for_layer(self, name: str, module: nn.Module) -> MaskMethod:
        return dataclasses.replace(self, **_of_convolution(self.scope, module))

    def at(self, progress: float, schedule: Schedule) -> MaskMethod:
        max_nonzero = self.max_nonzero if progress == 1.0 else None
        amount = self.amount_at(progress, schedule)
        return dataclasses.replace(self, amount=amount, max_nonzero=max_nonzero)


@register_method("intra")
@dataclasses.dataclass(eq=False, kw_only=True)
class IntraStructured(MaskMethod):
    """Prune kernels, and weights inside the kernels that are kept; see `masks.intra_mask`."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    window_fraction: Annotated[Fraction, Field(description=_WINDOW_FRACTION)] = 0.5
    scope: Annotated[Scope, Field(description=_SCOPE)] = "channel"
    groups: int = of_layer(1)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.intra_mask(
            t,
            self.amount,
            mask=default_mask,
            window_fraction=self.window_fraction,
            groups=self.groups,
            scope=self.scope,
        )

    def units(self, shape: torch.Size) -> Units:
        return masks.ck_units(shape, groups=self.groups, scope=self.scope)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        if math.prod(shape[2:]) == 1:
            return super().counts(shape)
        kernels, weights = self.units(shape), masks.weight_units(shape)
        _, kernel_amount = masks.intra_shares(self.amount, self.window_fraction)
        return (
            (kernels.pruned(kernel_amount), kernels.size),
            (weights.pruned(self.amount), weights.size),
        )

    def for_layer(self, name: str, module: nn.Module) -> MaskMethod:
        return dataclasses.replace(self, **_of_convolution(self.scope, module))


@register_method("inter")
@dataclasses.dataclass(eq=False, kw_only=True)
class InterStructured(MaskMethod):
    """Prune kernels first, and later the weights inside the kernels that are kept.

    This is the paper's inter-epoch method (appendix 7.1): CK up to the kernel amount of
    `masks.intra_shares` during the first part of the era, then window pruning, spread evenly over
    the remaining kernels, up to the total. 1x1 kernels are pruned by CK throughout.
    """

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    ck_fraction_of_era: Annotated[
        float, Field(gt=0, lt=1, description="part of the era in which kernels are pruned, (0, 1)")
    ] = 0.5
    window_fraction: Annotated[Fraction, Field(description=_WINDOW_FRACTION)] = 0.5
    scope: Annotated[Scope, Field(description=_SCOPE)] = "channel"
    groups: int = of_layer(1)
    kernel_amount: float | None = of_layer(None)
    kernels_only: bool = of_layer(False)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        amount = self.amount if self.kernels_only else self._kernel_amount
        mask = masks.ck_mask(t, amount, mask=default_mask, groups=self.groups, scope=self.scope)
        if self.kernels_only:
            return mask
        return masks.window_mask(t, self.amount, mask=mask, exact_layer_sparsity=True)

    @property
    def _kernel_amount(self) -> float:
        """The share of the kernels that is pruned before the weights inside of kernels."""
        if self.kernel_amount is not None:
            return self.kernel_amount
        return masks.intra_shares(self.amount, self.window_fraction)[1]

    def units(self, shape: torch.Size) -> Units:
        return masks.ck_units(shape, groups=self.groups, scope=self.scope)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        if self.kernels_only:
            return super().counts(shape)
        kernels, weights = self.units(shape), masks.weight_units(shape)
        return (
            (kernels.pruned(self._kernel_amount), kernels.size),
            (weights.pruned(self.amount), weights.size),
        )

    def for_layer(self, name: str, module: nn.Module) -> MaskMethod:
        if _is_pointwise(module):
            return CKStructured(self.amount, scope=self.scope).for_layer(name, module)
        return dataclasses.replace(self, **_of_convolution(self.scope, module))

    def amount_at(self, progress: float, schedule: Schedule) -> float:
        first = self._kernel_amount
        if progress <= self.ck_fraction_of_era:
            return first * schedule(progress / self.ck_fraction_of_era)
        if progress == 1.0:
            return self.amount
        rest = schedule((progress - self.ck_fraction_of_era) / (1.0 - self.ck_fraction_of_era))
        return first + (self.amount - first) * rest

    def at(self, progress: float, schedule: Schedule) -> MaskMethod:
        return dataclasses.replace(
            self,
            amount=self.amount_at(progress, schedule),
            kernel_amount=self._kernel_amount,
            kernels_only=progress <= self.ck_fraction_of_era,
        )


def _is_pointwise(module: nn.Module) -> bool:
    return math.prod(getattr(module, "kernel_size", (2,))) == 1


def _of_convolution(scope: Scope, module: nn.Module) -> dict[str, Any]:
    """The groups of a convolution, and the scope: a depthwise one has one kernel a channel."""
    return {
        "groups": _groups(module),
        "scope": "layer" if is_depthwise(module) else scope,
    }


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

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: A convolution with kernels of two weights or more.
        name: Name of the parameter, of shape `(K, C / groups, *kernel)`.
        amount: Total share in [0, 1], or number, of weights of each kernel that is zero
            afterwards; of the layer with `exact_layer_sparsity`. Zeros of earlier methods count.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.
        max_nonzero: Most weights that each kernel keeps.
        exact_layer_sparsity: Whether the layer's count is reached exactly instead of in steps of
            a weight of each kernel.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

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
    block_size: tuple[int, int] = (1, 1),
    scope: Scope = "channel",
    max_nonzero: int | None = None,
) -> ModuleT:
    """Prune whole kernels of a convolution by their largest magnitude (Algorithm 1, Figure 2b).

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: A convolution.
        name: Name of the parameter, of shape `(K, C / groups, *kernel)`.
        amount: Total share in [0, 1], or number, of the kernels reading each input channel
            that is zero afterwards. A kernel of which an earlier method has pruned single weights
            only doesn't count, so that more of the layer's weights may be zero.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.
        block_size: Numbers of neighbouring `(output, input)` channels whose kernels are pruned
            together; `(1, 1)` is the paper's CK.
        scope: `"channel"`: the kernels that read one input channel compete; `"layer"`: all kernels
            do, which depthwise convolutions need.
        max_nonzero: Most kernels or blocks that each scope keeps.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

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
        block_size=block_size,
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
    """Prune kernels, then the smallest weights of the kernels that are kept (Algorithm 4).

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: A convolution; 1x1 kernels are only pruned by CK.
        name: Name of the parameter, of shape `(K, C / groups, *kernel)`.
        amount: Total share of the layer's weights, a float in [0, 1], that is zero afterwards.
            Zeros of earlier methods count, but its kernels are pruned beside them.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.
        window_fraction: Part of the amount that is pruned inside kernels, in [0, 1].
        scope: The kernels that compete, as in `ck_structured`.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

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
    groups: int = getattr(module, "groups", 1)
    return groups
