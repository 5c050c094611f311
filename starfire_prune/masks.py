"""Pure mask functions: a weight tensor in, a bool mask of the same shape out (True = kept).

Each method of the paper is one function here, and so is each baseline. They share these rules:

- **Count.** A float `amount` is the share of each locale's units that is zero afterwards,
  `floor(amount * units + 0.5)` of them; an int is that many units of each locale. The amount is
  absolute: what `mask` has already taken counts towards it.
- **Ties.** Exactly that many units go. Of equal scores the lower index goes first, so that every
  rank and device finds the same mask.
- **Monotone.** What `mask` has taken stays taken; an amount below that changes nothing.

Any memory format and floating dtype is taken; half precision is compared in float32, which is
exact. Scores are magnitudes, so importance scores may be passed in place of the weight.
"""

import math
import numbers

import torch
from torch import Tensor

from starfire_prune.ranking import (
    check_finite,
    column_sums,
    float_bits,
    magnitude_keys,
    magnitudes,
    sign_bits,
    smallest,
)

__all__ = [
    "ck_locale_size",
    "ck_mask",
    "count",
    "fc_block_mask",
    "fc_fine_mask",
    "fc_structure_mask",
    "filter_mask",
    "intra_mask",
    "intra_shares",
    "magnitude_mask",
    "random_mask",
    "window_mask",
]

SCOPES = ("channel", "layer")
THEN = ("fine", "block")


def count(amount: float, units: int, *, name: str = "amount") -> int:
    """How many of `units` an `amount` stands for: `floor(amount * units + 0.5)`, or the int itself.

    Args:
        amount: a float in [0, 1], the share of the units; or an int in [0, units].
        units: the size of the locale.
        name: what the argument is called in errors.

    Raises:
        TypeError: if `amount` is not a real number (a bool is not one).
        ValueError: if it is out of its range or NaN.

    Example:
        >>> count(0.6, 9)
        5
    """
    value: object = amount
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` (={value!r}) must be a float in [0, 1], the share of each locale to prune, "
            f"or an int, the number of units; received {type(value).__name__}"
        )
    if isinstance(value, numbers.Integral):
        if not 0 <= amount <= units:
            raise ValueError(
                f"`{name}` (={amount}) is an int, so it counts units and must be in [0, {units}], "
                f"the units of a locale; a share is a float such as 0.6"
            )
        return int(amount)
    if not 0.0 <= amount <= 1.0:  # NaN fails this too
        raise ValueError(f"`{name}` (={amount}) is a share and must be in [0, 1]")
    return math.floor(float(amount) * units + 0.5)


def window_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    max_nonzero: int | None = None,
    spread: bool = False,
) -> Tensor:
    """Prune the smallest weights inside each kernel (the paper's Algorithm 3, Figure 2a).

    The locale is one kernel `weight[k, c]` and each loses the same count, so that the sparsity
    moves in steps of 1 / (R·S). With `spread` the layer is the locale: every kernel loses the
    same count, and then as many kernels lose one more (the smallest next magnitude first) as the
    layer's total asks for. A kernel that holds a weight keeps its largest under `spread`.

    Args:
        weight: shape `(K, C, *kernel)`, kernel of at least two weights.
        amount: share in [0, 1] or number of weights of each kernel (of the layer with `spread`).
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
    least = size - _at_most(max_nonzero, size)
    total = count(amount, weight.numel() if spread else size)
    if not weight.numel():
        return _merge(torch.ones_like(weight, dtype=torch.bool), mask)
    windows = _windows(keys)
    check_finite(windows.amax(0), weight)
    kept = _spread(windows, total, least) if spread else ~smallest(windows, max(total, least))
    return _merge(_unwindows(kept, weight), mask)


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
        return _merge((~gone).view(weight.shape), mask)
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
    _check_positive("groups", groups)
    _check_positive("group", group)
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


def intra_shares(amount: float, share: float) -> tuple[float, float]:
    """Split a combined amount: `(s, c)`, the shares that window and CK pruning stand for.

    `s = share * amount` of the weights go by window pruning and `c = (amount - s) / (1 - s)` of
    the kernels by CK, so that together `1 - (1 - s)(1 - c) = amount`.

    Raises:
        ValueError: if `share` is not in [0, 1].
    """
    value: object = share
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`share` (={value!r}) must be a float in [0, 1]")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` (={share}) must be in [0, 1]: the window part of the amount")
    windowed = share * amount
    return windowed, (1.0 if windowed == 1.0 else (amount - windowed) / (1.0 - windowed))


def intra_mask(
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    share: float = 0.5,
    groups: int = 1,
    scope: str = "channel",
) -> Tensor:
    """Prune kernels, then the smallest weights of those that stay (the paper's Algorithm 4).

    Kernels go by CK up to `intra_shares(amount, share)[1]`; the layer's remaining zeros are spread
    over the surviving kernels as in `window_mask(..., spread=True)`. CK looks at the largest
    weight of a kernel and window pruning takes that one last, so the paper's order, window first,
    picks the same kernels; this one reaches a single total. 1x1 kernels are pruned by CK alone.
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
    _, kernel_amount = intra_shares(amount, share)
    if _kernel_size(weight) == 1:
        return ck_mask(weight, amount, mask=mask, groups=groups, scope=scope)
    windows = _windows(magnitude_keys(weight, mask, min_dims=3))
    kernels = windows.amax(0) if weight.numel() else windows.new_empty(windows.shape[1:])
    check_finite(kernels, weight)
    gone = _kernels_gone(kernels.view(weight.shape[:2]), kernel_amount, groups, 1, scope, None)
    windows |= sign_bits(gone.flatten(), windows.dtype)
    return _merge(_unwindows(_spread(windows, total, 0), weight), mask)


def fc_block_mask(
    weight: Tensor, amount: float, *, mask: Tensor | None = None, block_size: int = 4
) -> Tensor:
    """Prune square blocks of a linear weight by their sum of magnitudes (the paper's Figure 2d).

    The locale is the layer. In each row of blocks the one with the highest sum is protected, so
    that every output neuron keeps a weight: `min(count, blocks - protected)` blocks go. What is
    left over at the right and lower edges forms smaller blocks of their own.

    Args:
        weight: shape `(out_features, in_features)`.
        amount: share in [0, 1] or number of blocks.
        mask: the earlier mask, of `weight`'s shape.
        block_size: the side of a block, in weights; 2 to 4 in the paper.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> fc_block_mask(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), 0.5, block_size=2)
        tensor([[False, False,  True,  True]])
    """
    _check_positive("block_size", block_size)
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    gone = _smallest_but_protected(_block_keys(keys, block_size), amount)
    gone = gone.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return _merge(~gone[: weight.shape[0], : weight.shape[1]], mask)


def fc_fine_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune single weights of a linear weight (the paper's Figure 2c).

    The locale is the layer. The largest kept weight of each output neuron is protected:
    `min(count, weights - protected)` weights go.

    Args:
        weight: shape `(out_features, in_features)`.
        amount: share in [0, 1] or number of weights.
        mask: the earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> fc_fine_mask(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 1.0)
        tensor([[False,  True],
                [ True, False]])
    """
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    return _merge(~_smallest_but_protected(keys, amount), mask)


def fc_structure_mask(
    weight: Tensor,
    amount: float,
    columns: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    then: str = "fine",
    block_size: int = 4,
) -> Tensor:
    """Prune the input columns that always read zero, then fine or in blocks (Figure 3).

    The columns go at no cost, whatever the amount, and count towards it; weights elsewhere make
    up the rest. By blocks, the smallest go until the layer's total is as near to the amount as
    whole blocks allow. Every output neuron that holds a weight keeps one, its largest.

    Args:
        weight: shape `(out_features, in_features)`.
        amount: share in [0, 1], or number, of the layer's weights.
        columns: the columns to go, bool of shape `(in_features,)`; none by default.
        mask: the earlier mask, of `weight`'s shape.
        then: `"fine"` or `"block"`, how the rest goes, as in `fc_fine_mask` and `fc_block_mask`.
        block_size: the side of a block, in weights.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0, 9.0], [4.0, 3.0, 9.0]])
        >>> fc_structure_mask(weight, 0.5, torch.tensor([False, False, True]))
        tensor([[False,  True, False],
                [ True,  True, False]])
    """
    if then not in THEN:
        raise ValueError(f"`then` (={then!r}) must be one of {', '.join(map(repr, THEN))}")
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    number = count(amount, keys.numel())
    kept = _without_columns(keys, _columns(columns, weight))
    if then == "fine":
        return fc_fine_mask(weight, number, mask=kept)
    _check_positive("block_size", block_size)
    keys = magnitude_keys(weight, kept, min_dims=2)
    blocks = _block_keys(keys, block_size)
    held = _block_sums(keys >= 0, block_size)
    missing = number - int((~kept).sum())
    gone = _smallest_but_protected(blocks, _blocks_for(blocks, held, missing))
    gone = gone.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    blocked = ~gone[: weight.shape[0], : weight.shape[1]] & kept
    return _merge(_with_a_weight(blocked, keys), kept)


def magnitude_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune the smallest weights of the layer, in no structure: the usual baseline.

    Args:
        weight: any shape.
        amount: share in [0, 1] or number of weights.
        mask: the earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, dtype or non-finite weights.
    """
    keys = magnitude_keys(weight, mask, min_dims=0)
    check_finite(keys, weight)
    return _single_weights(keys, amount, mask)


def random_mask(
    weight: Tensor, amount: float, *, mask: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Prune weights of the layer in a random order that `seed` and the size fix: a baseline.

    Args:
        weight: any shape; its values don't matter.
        amount: share in [0, 1] or number of weights.
        mask: the earlier mask, of `weight`'s shape.
        seed: of the order; the same seed prunes the same weights first on every device.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount or dtype.
    """
    gone = magnitude_keys(weight, mask, min_dims=0) < 0
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    order = order.to(weight.device).view(weight.shape)
    return _single_weights(order | sign_bits(gone, order.dtype), amount, mask)


def filter_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune whole output channels by their L1 norm (Li et al., 2016): the coarse baseline.

    Args:
        weight: shape `(K, ...)`.
        amount: share in [0, 1] or number of output channels.
        mask: the earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: for a bad amount, shape, dtype or non-finite weights.
    """
    keys = magnitude_keys(weight, mask, min_dims=2).flatten(1)
    check_finite(keys, weight)
    norms = float_bits(magnitudes(keys).sum(1, dtype=torch.float64))
    norms |= sign_bits((keys < 0).all(1), norms.dtype)
    gone = smallest(norms[:, None], count(amount, len(norms)))[:, 0]
    return _merge((~gone).view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape), mask)


def _linear_keys(weight: Tensor, mask: Tensor | None) -> Tensor:
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` of shape {tuple(weight.shape)} must have shape (out_features, in_features): "
            f"fc methods are for linear layers"
        )
    return magnitude_keys(weight, mask, min_dims=2)


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


def _single_weights(keys: Tensor, amount: float, mask: Tensor | None) -> Tensor:
    gone = smallest(keys.reshape(-1, 1), count(amount, keys.numel()))
    return _merge((~gone).view(keys.shape), mask)


def _smallest_but_protected(keys: Tensor, amount: float) -> Tensor:
    """The smallest units of `(rows, columns)`, but for the largest living one of each row.

    Of equal largest ones the last is protected, since of equals the lower index goes first. `keys`
    are overwritten.
    """
    number = count(amount, keys.numel())
    if not keys.numel():
        return torch.zeros_like(keys, dtype=torch.bool)
    guarded, protected = _guarded(keys)
    number = min(number, keys.numel() - protected)
    return smallest(guarded.view(-1, 1), number).view(keys.shape)


def _guarded(keys: Tensor) -> tuple[Tensor, int]:
    """Keys with the largest living unit of each row above all others, and how many these are."""
    largest, index = keys.flip(1).max(1)
    rows = (largest >= 0).nonzero().squeeze(1)
    guarded = keys.contiguous()
    guarded[rows, keys.shape[1] - 1 - index[rows]] = torch.iinfo(keys.dtype).max
    return guarded, len(rows)


def _columns(columns: Tensor | None, weight: Tensor) -> Tensor:
    """Checked columns, bool of shape `(in_features,)` on the weight's device."""
    if columns is None:
        return torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    if columns.dtype != torch.bool or columns.shape != weight.shape[1:]:
        raise ValueError(
            f"`columns` of shape {tuple(columns.shape)} and {columns.dtype} must be bool of shape "
            f"{tuple(weight.shape[1:])}, an entry for each input feature of `weight`"
        )
    return columns.to(weight.device)


def _without_columns(keys: Tensor, columns: Tensor) -> Tensor:
    """What is kept of `(rows, columns)` keys when columns go, at least a weight of each row."""
    return _with_a_weight((keys >= 0) & ~columns, keys)


def _with_a_weight(kept: Tensor, keys: Tensor) -> Tensor:
    """`kept` with the largest weight of each row that has lost all it held."""
    if not keys.numel():
        return kept
    largest, index = keys.max(1)
    rows = ((largest >= 0) & ~kept.any(1)).nonzero().squeeze(1)
    kept[rows, index[rows]] = True
    return kept


def _block_sums(values: Tensor, size: int) -> Tensor:
    """The sum of `(rows, columns)` values in each block."""
    rows, columns = (-(-length // size) for length in values.shape)
    padded = torch.zeros(rows * size, columns * size, dtype=torch.int64, device=values.device)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.view(rows, size, columns, size).sum((1, 3))


def _blocks_for(keys: Tensor, held: Tensor, missing: int) -> int:
    """How many blocks are to be gone so that `missing` more weights are, or nearest to it.

    Args:
        keys: of the blocks, negative where one is gone.
        held: the weights that each still holds.
        missing: weights that are to go.
    """
    already = int((keys < 0).sum())
    if missing <= 0 or not keys.numel():
        return already
    guarded = _guarded(keys.clone())[0].flatten()
    order = guarded.sort(stable=True).indices[already:]
    totals = held.flatten()[order].cumsum(0)
    fewer = int((totals <= missing).sum())
    short = missing - (int(totals[fewer - 1]) if fewer else 0)
    one_more = fewer < len(totals) and int(totals[fewer]) - missing <= short and short > 0
    return already + fewer + int(one_more)


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
    gone = smallest(locales, max(count(amount, size), size - _at_most(max_nonzero, size)))
    if scope != "layer":
        gone = gone.view(size, groups, n_in).transpose(0, 1)
    gone = gone.reshape(units.shape)
    return gone.repeat_interleave(group, 0) if group > 1 else gone


def _at_most(max_nonzero: int | None, size: int) -> int:
    if max_nonzero is None:
        return size
    _check_positive("max_nonzero", max_nonzero)
    return min(max_nonzero, size)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` (={value!r}) must be an int of at least 1, received {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"`{name}` (={value}) must be an int of at least 1")


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


def _block_keys(keys: Tensor, size: int) -> Tensor:
    """The keys of the blocks' sums of magnitudes in float64; a block is gone if all of it is.

    Added weight by weight in row-major order, so that every device rounds alike.
    """
    rows, columns = (-(-length // size) for length in keys.shape)
    padded = keys.new_full((rows * size, columns * size), torch.iinfo(keys.dtype).min)
    padded[: keys.shape[0], : keys.shape[1]] = keys
    sums = torch.zeros(rows, columns, dtype=torch.float64, device=keys.device)
    gone = torch.ones(rows, columns, dtype=torch.bool, device=keys.device)
    for i in range(size):
        for j in range(size):
            part = padded[i::size, j::size].contiguous()
            sums += magnitudes(part)
            gone &= part < 0
    return float_bits(sums) | sign_bits(gone, torch.int64)


def _merge(kept: Tensor, mask: Tensor | None) -> Tensor:
    """`kept` without what `mask` had already taken, in memory of its own."""
    kept = kept.contiguous()
    return kept if mask is None else kept & mask.bool()
