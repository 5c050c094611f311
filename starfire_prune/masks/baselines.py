"""Masks of baselines, with which the methods of the paper are compared."""

import torch
from torch import Tensor

from starfire_prune.masks.counts import filter_units, merge, weight_units
from starfire_prune.masks.ranking import (
    check_finite,
    float_bits,
    magnitude_keys,
    magnitudes,
    sign_bits,
    smallest,
)

__all__ = ["filter_mask", "magnitude_mask", "random_mask"]


def magnitude_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune the smallest weights of the layer, in no structure: the usual baseline.

    Args:
        weight: Weight of any shape.
        amount: Share in [0, 1] or number of the weights to prune.
        mask: Earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, dtype or non-finite weights.
    """
    keys = magnitude_keys(weight, mask, min_dims=0)
    check_finite(keys, weight)
    return _single_weights(keys, amount, mask)


def random_mask(
    weight: Tensor, amount: float, *, mask: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Prune weights of the layer in a random order that `seed` and the size fix: a baseline.

    Args:
        weight: Weight of any shape; its values don't matter.
        amount: Share in [0, 1] or number of the weights to prune.
        mask: Earlier mask, of `weight`'s shape.
        seed: Seed of the order; the same one prunes the same weights first on every device.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount or dtype.
    """
    pruned = magnitude_keys(weight, mask, min_dims=0) < 0
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    order = order.to(weight.device).view(weight.shape)
    return _single_weights(order | sign_bits(pruned, order.dtype), amount, mask)


def filter_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune complete output channels by their L1 norm (Li et al., 2016): the coarse baseline.

    Args:
        weight: Weight of shape `(K, ...)`.
        amount: Share in [0, 1] or number of the output channels to prune.
        mask: Earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or non-finite weights.
    """
    keys = magnitude_keys(weight, mask, min_dims=2).flatten(1)
    check_finite(keys, weight)
    norms = float_bits(magnitudes(keys).sum(1, dtype=torch.float64))
    norms |= sign_bits((keys < 0).all(1), norms.dtype)
    pruned = smallest(norms[:, None], filter_units(weight.shape).pruned(amount))[:, 0]
    return merge((~pruned).view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape), mask)


def _single_weights(keys: Tensor, amount: float, mask: Tensor | None) -> Tensor:
    pruned = smallest(keys.reshape(-1, 1), weight_units(keys.shape).pruned(amount))
    return merge((~pruned).view(keys.shape), mask)
