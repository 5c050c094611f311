"""Masks of linear layers: blocks, single weights, and columns that read zeros."""

import torch
from torch import Tensor

from starfire_prune.masks.counts import check_positive, count, merge
from starfire_prune.masks.ranking import (
    check_finite,
    float_bits,
    magnitude_keys,
    magnitudes,
    sign_bits,
    smallest,
)

__all__ = ["fc_block_mask", "fc_fine_mask", "fc_structure_mask"]


THEN = ("fine", "block")


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
    check_positive("block_size", block_size)
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    gone = _smallest_but_protected(_block_keys(keys, block_size), amount)
    gone = gone.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return merge(~gone[: weight.shape[0], : weight.shape[1]], mask)


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
    return merge(~_smallest_but_protected(keys, amount), mask)


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
    check_positive("block_size", block_size)
    keys = magnitude_keys(weight, kept, min_dims=2)
    blocks = _block_keys(keys, block_size)
    held = _block_sums(keys >= 0, block_size)
    missing = number - int((~kept).sum())
    gone = _smallest_but_protected(blocks, _blocks_for(blocks, held, missing))
    gone = gone.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    blocked = ~gone[: weight.shape[0], : weight.shape[1]] & kept
    return merge(_with_a_weight(blocked, keys), kept)


def _linear_keys(weight: Tensor, mask: Tensor | None) -> Tensor:
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` of shape {tuple(weight.shape)} must have shape (out_features, in_features): "
            f"fc methods are for linear layers"
        )
    return magnitude_keys(weight, mask, min_dims=2)


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
