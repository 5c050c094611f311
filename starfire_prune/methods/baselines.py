"""Pruning methods that those of the paper are compared with."""

import torch
from torch import Tensor

from starfire_prune import masks
from starfire_prune.methods.base import MaskMethod, ModuleT

__all__ = [
    "FilterStructured",
    "MagnitudeUnstructured",
    "RandomUnstructured",
    "filter_structured",
    "magnitude_unstructured",
    "random_unstructured",
]


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
