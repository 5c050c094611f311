"""Masks of convolutions: the weights inside kernels, whole kernels, and both."""

import math
import numbers

import torch
from torch import Tensor

from starfire_prune.masks.counts import at_most, check_positive, count, merge
from starfire_prune.masks.ranking import (
    check_finite,
    column_sums,
    magnitude_keys,
    sign_bits,
    smallest,
)

__all__ = ["ck_locale_size", "ck_mask", "intra_mask", "intra_shares", "window_mask"]


SCOPES = ("channel", "layer")


def window_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    max_nonzero: int | None = None,
    exact_layer_sparsity: bool = False,
) -> Tensor:
    """Prune the smallest weights inside each kernel (the paper's Algorithm 3, Figure 2a).

    The locale is one kernel `weight[k, c]` and each loses the same count, so that the sparsity
    moves in steps of 1 / (R·S). With `exact_layer_sparsity` the layer is the locale: every kernel
    loses the same count, and then as many kernels lose one more (the smallest next magnitude first)
    as the layer's total asks for. A kernel that holds a weight then keeps its largest.

    Args:
        weight: shape `(K, C, *kernel)`, kernel of at least two weights.
        amount: share in [0, 1] or number of weights of each kernel; of the layer with
            `exact_layer_sparsity`.
        mask: the earlier mask, of `weight`'s shape.
        max_nonzero: at most this many weights of each kernel stay, whatever the amount.
        spread: reach the layer's count exactly.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> window_mask(torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]]), 0.5)
        tensor([[[[ True, False],
                  [ True, False]]]])
    """
    keys = magnitude_keys(weight, mask, min_dims=3)
    size = _kernel_size(weight)
    if size == 1:
        raise ValueError(
            f"window pruning needs kernels of at least two weights, and `weight` of shape "
            f"{tuple(weight.shape)} has 1x1 kernels: prune it by ck (whole kernels)"
        )
    least = size - at_most(max_nonzero, size)
    total = count(amount, weight.numel() if exact_layer_sparsity else size)
    if not weight.numel():
        return merge(torch.ones_like(weight, dtype=torch.bool), mask)
    windows = _windows(keys)
    check_finite(windows.amax(0), weight)
    kept = (
        _spread(windows, total, least)
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
    group: int = 1,
    scope: str = "channel",
    max_nonzero: int | None = None,
) -> Tensor:
    """Prune whole kernels by their largest magnitude (the paper's Algorithm 1, Figure 2b).

    The locale is the K / groups kernels that read one input channel. All input kernels of an
    output channel may go.

    Args:
        weight: shape `(K, C / groups, *kernel)`.
        amount: share in [0, 1] or number of units of each locale.
        mask: the earlier mask, of `weight`'s shape.
        groups: the convolution's groups.
        group: this many neighbouring output channels share one kernel mask, so that a unit is
            `group` kernels; K / groups must be divisible by it.
        scope: `"channel"` or `"layer"`, the locale; `"layer"` lets all kernels compete.
        max_nonzero: at most this many units of each locale stay, whatever the amount.

    Returns:
        A bool mask of `weight`'s shape, constant over each kernel where `mask` is.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights; for a locale
            of one unit, as in a depthwise convolution, unless `scope="layer"`.

    Example:
        >>> ck_mask(torch.tensor([[[[1.0]]], [[[-3.0]]], [[[2.0]]]]), 2).flatten()
        tensor([False,  True, False])
    """
    kernels = _largest_of_kernels(magnitude_keys(weight, mask, min_dims=3))
    check_finite(kernels, weight)
    gone = _kernels_gone(kernels, amount, groups, group, scope, max_nonzero)
    if _kernel_size(weight) == 1:
        return merge((~gone).view(weight.shape), mask)
    merged = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone().bool()
    merged[(gone & (kernels >= 0)).nonzero(as_tuple=True)] = False  # of few, where a mask was
    return merged


def ck_locale_size(
    out_channels: int, in_channels: int, *, groups: int = 1, group: int = 1, scope: str = "channel"
) -> int:
    """How many units compete in a locale of `ck_mask`.

    Args:
        out_channels: K.
        in_channels: C / groups, as in the weight's shape.
        groups, group, scope: as in `ck_mask`.

    Raises:
        ValueError: if they don't fit each other, or the locale would hold a single unit.

    Example:
        >>> ck_locale_size(64, 16, group=4)
        16
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` (={scope!r}) must be one of {', '.join(map(repr, SCOPES))}")
    check_positive("groups", groups)
    check_positive("group", group)
    if out_channels % groups or (out_channels // groups) % group:
        raise ValueError(
            f"the {out_channels} output channels in `groups` (={groups}) must be divisible by "
            f"`group` (={group}), the neighbouring output channels that share a kernel mask"
        )
    if scope == "layer":
        return out_channels // group * in_channels
    size = out_channels // groups // group
    if size == 1:
        raise ValueError(
            f"each locale would hold a single unit (out_channels (={out_channels}) / groups "
            f"(={groups}) / group (={group})): a depthwise convolution, or one output channel; "
            f'use scope="layer" to let all kernels of the layer compete'
        )
    return size


def intra_shares(amount: float, window_fraction: float) -> tuple[float, float]:
    """Split a combined amount: `(s, c)`, the shares that window and CK pruning stand for.

    `s = window_fraction * amount` of the weights are pruned by window pruning and
    `c = (amount - s) / (1 - s)` of the kernels by CK, so that together
    `1 - (1 - s)(1 - c) = amount`.

    Raises:
        ValueError: if `window_fraction` is not in [0, 1].
    """
    value: object = window_fraction
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`window_fraction` (={value!r}) must be a float in [0, 1]")
    if not 0.0 <= window_fraction <= 1.0:
        raise ValueError(
            f"`window_fraction` (={window_fraction}) must be in [0, 1], the part of the amount "
            f"that window pruning stands for"
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
    """Prune kernels, then the smallest weights of those that stay (the paper's Algorithm 4).

    Kernels go by CK up to `intra_shares(amount, window_fraction)[1]`; the layer's remaining zeros
    are spread over the surviving kernels as in `window_mask(..., exact_layer_sparsity=True)`. CK
    looks at the largest weight of a kernel and window pruning takes that one last, so the paper's
    order, window first, picks the same kernels; this one reaches a single total. 1x1 kernels are
    pruned by CK alone.
    Falls short of the total only where each surviving kernel is down to one weight. Under an
    amount that rises from call to call it may exceed it a little, by less than numel / K as a
    rule, since a kernel that leaves takes its earlier zeros along.

    Args:
        weight: shape `(K, C / groups, *kernel)`.
        amount: share in [0, 1]; floats only.
        mask: the earlier mask, of `weight`'s shape.
        share: share in [0, 1] of the amount that goes by window pruning.
        groups: the convolution's groups.
        scope: `"channel"` or `"layer"`, the locale of CK.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: as `ck_mask`; and for an int amount.

    Example:
        >>> intra_mask(torch.rand(4, 2, 3, 3), 0.5).logical_not().sum()
        tensor(36)
    """
    value: object = amount
    if isinstance(value, numbers.Integral):
        raise TypeError(f"`amount` (={value!r}) must be a float in [0, 1] for intra pruning")
    total = count(amount, weight.numel())
    _, kernel_amount = intra_shares(amount, window_fraction)
    if _kernel_size(weight) == 1:
        return ck_mask(weight, amount, mask=mask, groups=groups, scope=scope)
    windows = _windows(magnitude_keys(weight, mask, min_dims=3))
    kernels = windows.amax(0) if weight.numel() else windows.new_empty(windows.shape[1:])
    check_finite(kernels, weight)
    gone = _kernels_gone(kernels.view(weight.shape[:2]), kernel_amount, groups, 1, scope, None)
    windows |= sign_bits(gone.flatten(), windows.dtype)
    return merge(_unwindows(_spread(windows, total, 0), weight), mask)


def _kernel_size(weight: Tensor) -> int:
    return math.prod(weight.shape[2:])


def _largest_of_kernels(keys: Tensor) -> Tensor:
    """The largest key of each kernel, shape `(K, C)`."""
    if _kernel_size(keys) == 1:
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


def _kernels_gone(
    kernels: Tensor,
    amount: float,
    groups: int,
    group: int,
    scope: str,
    max_nonzero: int | None,
) -> Tensor:
    """Which kernels CK takes, bool `(K, C)`, given their keys of that shape."""
    n_out, n_in = kernels.shape
    size = ck_locale_size(n_out, n_in, groups=groups, group=group, scope=scope)
    # A column of `locales` is a locale; a unit is ranked by the best of its `group` kernels.
    units = kernels.view(n_out // group, group, n_in).amax(1) if group > 1 else kernels
    if scope == "layer":
        locales = units.reshape(-1, 1)
    else:
        locales = units.reshape(groups, size, n_in).transpose(0, 1).reshape(size, -1)
    gone = smallest(locales, max(count(amount, size), size - at_most(max_nonzero, size)))
    if scope != "layer":
        gone = gone.view(size, groups, n_in).transpose(0, 1)
    gone = gone.reshape(units.shape)
    return gone.repeat_interleave(group, 0) if group > 1 else gone


def _spread(windows: Tensor, total: int, least: int) -> Tensor:
    """Kept weights `(n, kernels)` such that the layer has `total` zeros, evenly over its kernels.

    `windows` are keys; each kernel that still holds a weight loses at least `least`.
    """
    n, n_kernels = windows.shape
    taken = column_sums(windows < 0)
    alive = taken < n
    n_alive = int(alive.sum())
    if not n_alive:
        return torch.zeros_like(windows, dtype=torch.bool)
    need = max(0, total - n * (n_kernels - n_alive))
    base = max(min(need // n_alive, n - 1), least)
    gone = smallest(windows, base) | (windows < 0)
    rest = need - int((taken.clamp(min=base) * alive).sum())
    if rest > 0 and base + 1 < n:
        following = smallest(windows, base + 1) & ~gone
        candidates = (following.to(windows.dtype).neg_() & windows).amax(0)  # its key, else 0
        candidates.masked_fill_((taken > base) | ~alive, torch.iinfo(windows.dtype).max)
        gone |= following & smallest(candidates[:, None], rest)[:, 0]
    return ~gone
