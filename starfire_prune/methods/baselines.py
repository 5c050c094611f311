"""Pruning methods that those of the paper are compared with."""

import dataclasses
import zlib
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from starfire_prune import masks
from starfire_prune.masks import Units
from starfire_prune.methods.base import CONVOLUTIONS, MaskMethod, ModuleT
from starfire_prune.methods.options import Seed
from starfire_prune.methods.registry import register_method

__all__ = [
    "FilterStructured",
    "MagnitudeUnstructured",
    "RandomUnstructured",
    "filter_structured",
    "magnitude_unstructured",
    "random_unstructured",
]


@register_method("magnitude")
@dataclasses.dataclass(eq=False, kw_only=True)
class MagnitudeUnstructured(MaskMethod):
    """Prune the smallest single weights of the layer; see `masks.magnitude_mask`."""

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.magnitude_mask(t, self.amount, mask=default_mask)


@register_method("random")
@dataclasses.dataclass(eq=False, kw_only=True)
class RandomUnstructured(MaskMethod):
    """Prune single weights in a fixed random order; see `masks.random_mask`."""

    seed: Annotated[
        Seed, Field(description="seed of the order, from 0 to 2**32 - 1; each layer has its own")
    ] = 0

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.random_mask(t, self.amount, mask=default_mask, seed=self.seed)

    def for_layer(self, name: str, module: nn.Module) -> MaskMethod:
        return dataclasses.replace(self, seed=self.seed ^ zlib.crc32(name.encode()))


@register_method("filter")
@dataclasses.dataclass(eq=False, kw_only=True)
class FilterStructured(MaskMethod):
    """Prune whole output channels by their L1 norm; see `masks.filter_mask`."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.filter_mask(t, self.amount, mask=default_mask)

    def units(self, shape: torch.Size) -> Units:
        return masks.filter_units(shape)


def magnitude_unstructured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
) -> ModuleT:
    """Prune the smallest single weights of the layer, in no structure: a baseline.

    `prune.l1_unstructured` with this package's rules: absolute amounts, updated in place.
    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: Any module.
        name: Name of the parameter, of any shape.
        amount: Total share in [0, 1], or number, of weights that is zero afterwards.
            Zeros of earlier methods count.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

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

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: Any module.
        name: Name of the parameter, of any shape.
        amount: Total share in [0, 1], or number, of weights that is zero afterwards.
            Zeros of earlier methods count.
        seed: Seed of the order.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

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

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes.

    Args:
        module: Any module.
        name: Name of the parameter, of shape `(K, ...)`.
        amount: Total share in [0, 1], or number, of output channels that is zero afterwards.
            A channel of which an earlier method has pruned a part only doesn't count.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> conv = filter_structured(nn.Conv2d(8, 10, 3), amount=0.5)
        >>> int(conv.weight_mask.any((1, 2, 3)).sum())
        5
    """
    FilterStructured.apply(module, name, amount, importance_scores=importance_scores)
    return module
