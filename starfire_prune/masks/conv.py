"""Masks of convolutions: the weights inside kernels, kernels or blocks of them, and both."""

import math
import numbers

import torch
from torch import Tensor

from starfire_prune.masks.blocks import from_blocks, to_blocks
from starfire_prune.masks.counts import (
    Units,
    at_most,
    ck_units,
    effective_block_size,
    merge,
    weight_units,
    window_units,
)
from starfire_prune.masks.ranking import (
    check_finite,
    column_sums,
    magnitude_keys,
    sign_bits,
    smallest,
)

__all__ = [
    "ck_mask",
    "intra_mask",
    "intra_shares",
    "window_mask",
]


def window_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    max_nonzero: int | None = None,
    exact_layer_sparsity: bool = False,
) -> Tensor:
    """Prune the smallest weights inside each kernel (the paper's Algorithm 3, Figure 2a).

    A unit is a weight and the scope is one kernel `weight[k, c]`. The same number is pruned in
    each, so that the sparsity moves in steps of 1 / (R·S). With `exact_layer_sparsity` the scope is
    the layer: the same number is pruned in every kernel, and then one more in as many kernels as
    the layer's total needs, those with the smallest next magnitude first. A kernel that holds a
    weight then keeps its largest.

    Args:
        weight: Weight of shape `(K, C, *kernel)`, with kernels of at least two weights.
        amount: Share in [0, 1] or number of the weights of each kernel to prune; of those of the
            layer with `exact_layer_sparsity`.
        mask: Earlier mask, of `weight`'s shape.
        max_nonzero: Largest number of weights that each kernel keeps, whatever the amount.
        exact_layer_sparsity: Whether the layer reaches its amount exactly.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> window_mask(torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]]), 0.5)
        tensor([[[[ True, False],
                  [ True, False]]]])
    """
    keys = magnitude_keys(weight, mask, min_dims=3)
    total = window_units(weight.shape, exact_layer_sparsity=exact_layer_sparsity).pruned(amount)
    size = _kernel_size(weight.shape)
    least = size - at_most(max_nonzero, size)
    if not weight.numel():
        return merge(torch.ones_like(weight, dtype=torch.bool), mask)
    windows = _windows(keys)
    check_finite(windows.amax(0), weight)
    kept = (
        _prune_evenly(windows, total, least)
        if exact_layer_sparsity
        else ~smallest(windows, max(total, least))
    )
    return merge(_unwindows(kept, weight), mask)


def ck_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    groups: int = 1,
    block_size: tuple[int, int] = (1, 1),
    scope: str = "channel",
    max_nonzero: int | None = None,
) -> Tensor:
    """Prune kernels, or blocks of them, by their largest magnitude (Algorithm 1, Figure 2b).

    A unit is a block of neighbouring output and input channels, with all the weights of their
    kernels. Units compete with those that read the same block of input channels. With the default
    block size a unit is a kernel, as in the paper, and the K / groups kernels that read one input
    channel compete. All the units of an output channel may be pruned.

    Blocks never cross the groups of a convolution, and what doesn't fill a block at the edge of a
    group is a smaller one. A layer that is too small for blocks isn't blocked in that dimension:
    see `effective_block_size`.

    Args:
        weight: Weight of shape `(K, C / groups, *kernel)`.
        amount: Share in [0, 1] or number of the units of each scope to prune.
        mask: Earlier mask, of `weight`'s shape.
        groups: Groups of the convolution.
        block_size: Output and input channels of a block, `(out, in)`.
        scope: Which units compete: `"channel"`, or `"layer"` for all of them.
        max_nonzero: Largest number of units that each scope keeps, whatever the amount.

    Returns:
        A bool mask of `weight`'s shape, constant over each unit where `mask` is.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or block size or non-finite weights;
            for a scope of one unit, as in a depthwise convolution, unless `scope="layer"`.

    Example:
        >>> ck_mask(torch.tensor([[[[1.0]]], [[[-3.0]]], [[[2.0]]]]), 2).flatten()
        tensor([False,  True, False])
    """
    kernels = _largest_of_kernels(magnitude_keys(weight, mask, min_dims=3))
    check_finite(kernels, weight)
    units = ck_units(weight.shape, groups=groups, block_size=block_size, scope=scope)
    number = max(units.pruned(amount), units.size - at_most(max_nonzero, units.size))
    block_size = effective_block_size(weight.shape, groups, block_size)
    pruned = _smallest_kernels(kernels, units, number, groups, block_size)
    if _kernel_size(weight.shape) == 1:
        return merge((~pruned).view(weight.shape), mask)
    merged = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone().bool()
    # Kernels that `mask` has pruned are left out: few are new between two updates.
    merged[(pruned & (kernels >= 0)).nonzero(as_tuple=True)] = False
    return merged


def intra_shares(amount: float, window_fraction: float) -> tuple[float, float]:
    """Split a combined amount into those of window and of CK pruning, `(s, c)`.

    Window pruning removes the share `s = window_fraction * amount` of the weights of a kernel, and
    CK the share `c = (amount - s) / (1 - s)` of the kernels: together `1 - (1 - s)(1 - c)` is the
    amount.

    Raises:
        TypeError, ValueError: If `window_fraction` is not a float in [0, 1].

    Example:
        >>> intra_shares(0.75, 2 / 3)
        (0.5, 0.5)
    """
    value: object = window_fraction
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`window_fraction` (={value!r}) must be a float in [0, 1]")
    if not 0.0 <= window_fraction <= 1.0:
        raise ValueError(
            f"`window_fraction` (={window_fraction}) is the part of the amount that is pruned "
            f"inside kernels and must be in [0, 1]"
        )
    windowed = window_fraction * amount
    return windowed, (1.0 if windowed == 1.0 else (amount - windowed) / (1.0 - windowed))


def intra_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    window_fraction: float = 0.5,
    groups: int = 1,
    scope: str = "channel",
) -> Tensor:
    """Prune kernels, then the smallest weights of those that are kept (Algorithm 4).

    CK prunes kernels up to `intra_shares(amount, window_fraction)[1]`; the layer's remaining zeros
    are distributed over the other kernels as in `window_mask(..., exact_layer_sparsity=True)`. CK
    compares the largest weights of kernels and window pruning removes those last, so the paper's
    order, window first, selects the same kernels; this one reaches a single total. 1x1 kernels are
    pruned by CK only.

    The total isn't reached only where each kernel that is kept is down to one weight. Under an
    amount that rises from call to call the total may be exceeded a little, usually by less than
    numel / K, since a kernel that is pruned already contains earlier zeros.

    Args:
        weight: Weight of shape `(K, C / groups, *kernel)`.
        amount: Share of the layer's weights to prune, a float in [0, 1].
        mask: Earlier mask, of `weight`'s shape.
        window_fraction: Part in [0, 1] of the amount that is pruned inside kernels.
        groups: Groups of the convolution.
        scope: Which kernels compete in CK: `"channel"`, or `"layer"` for all of them.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: As `ck_mask`, and for an int amount.

    Example:
        >>> intra_mask(torch.rand(4, 2, 3, 3), 0.5).logical_not().sum()
        tensor(36)
    """
    value: object = amount
    if isinstance(value, numbers.Integral):
        raise TypeError(f"`amount` (={value!r}) must be a float in [0, 1] for intra pruning")
    total = weight_units(weight.shape).pruned(amount)
    _, kernel_amount = intra_shares(amount, window_fraction)
    if _kernel_size(weight.shape) == 1:
        return ck_mask(weight, amount, mask=mask, groups=groups, scope=scope)
    windows = _windows(magnitude_keys(weight, mask, min_dims=3))
    kernels = windows.amax(0) if weight.numel() else windows.new_empty(windows.shape[1:])
    check_finite(kernels, weight)
    units = ck_units(weight.shape, groups=groups, scope=scope)
    number = units.pruned(kernel_amount)
    pruned = _smallest_kernels(kernels.view(weight.shape[:2]), units, number, groups, (1, 1))
    windows |= sign_bits(pruned.flatten(), windows.dtype)
    return merge(_unwindows(_prune_evenly(windows, total, 0), weight), mask)


def _kernel_size(shape: tuple[int, ...]) -> int:
    return math.prod(shape[2:])


def _largest_of_kernels(keys: Tensor) -> Tensor:
    """The largest key of each kernel, shape `(K, C)`."""
    if _kernel_size(keys.shape) == 1:
        return keys.flatten(2).squeeze(2)
    if not keys.numel():
        return keys.new_zeros(keys.shape[:2])
    return keys.amax(tuple(range(2, keys.ndim)))


def _windows(keys: Tensor) -> Tensor:
    """Keys `(K, C, *kernel)` as `(R·S, K·C)`: a kernel is a column, which is fast to reduce."""
    return torch.stack(keys.flatten(2).flatten(0, 1).unbind(1))


def _unwindows(kept: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_windows`."""
    return torch.stack(kept.unbind(), 1).view(weight.shape)


def _smallest_kernels(
    kernels: Tensor, units: Units, number: int, groups: int, block_size: tuple[int, int]
) -> Tensor:
    """Which kernels are in the `number` smallest units of each scope, bool `(K, C)`.

    Args:
        kernels: Keys of the kernels, shape `(K, C)`.
        units: Units of the layer, as `ck_units` counts them.
        number: Number of units.
        groups: Groups of the convolution.
        block_size: Block size of this layer, as `effective_block_size` gives it.
    """
    n_out, n_in = kernels.shape
    grouped = kernels.reshape(groups, n_out // groups, n_in)
    if block_size != (1, 1):
        lowest = torch.iinfo(kernels.dtype).min
        grouped = to_blocks(grouped, block_size, lowest).amax((2, 4))
    rows, columns = grouped.shape[1:]
    if units.scopes == 1:
        pruned = smallest(grouped.reshape(-1, 1), number).view(grouped.shape)
    else:  # a column of what is selected from is a scope
        columnwise = grouped.transpose(0, 1).reshape(units.size, units.scopes)
        pruned = smallest(columnwise, number).view(rows, groups, columns).transpose(0, 1)
    if block_size != (1, 1):
        pruned = from_blocks(pruned, block_size, n_out // groups, n_in)
    return pruned.reshape(n_out, n_in)


def _prune_evenly(windows: Tensor, total: int, least: int) -> Tensor:
    """Kept weights `(n, kernels)` such that the layer has `total` zeros, evenly over its kernels.

    `windows` are keys. In each kernel that still holds a weight, at least `least` are pruned.
    """
    n, n_kernels = windows.shape
    n_pruned = column_sums(windows < 0)
    nonempty = n_pruned < n
    n_nonempty = int(nonempty.sum())
    if not n_nonempty:
        return torch.zeros_like(windows, dtype=torch.bool)
    need = max(0, total - n * (n_kernels - n_nonempty))
    base = max(min(need // n_nonempty, n - 1), least)
    pruned = smallest(windows, base) | (windows < 0)
    rest = need - int((n_pruned.clamp(min=base) * nonempty).sum())
    if rest > 0 and base + 1 < n:
        following = smallest(windows, base + 1) & ~pruned
        candidates = (following.to(windows.dtype).neg_() & windows).amax(0)  # its key, else 0
        candidates.masked_fill_((n_pruned > base) | ~nonempty, torch.iinfo(windows.dtype).max)
        pruned |= following & smallest(candidates[:, None], rest)[:, 0]
    return ~pruned
