"""Masks of linear layers: blocks, single weights, and columns that read zeros."""

import dataclasses

import torch
from torch import Tensor

from starfire_prune.masks.blocks import check_block_size, from_blocks, to_blocks
from starfire_prune.masks.counts import Units, count, fc_block_units, fc_fine_units, merge
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
    weight: Tensor,
    amount: float,
    *,
    mask: Tensor | None = None,
    block_size: tuple[int, int] = (4, 4),
) -> Tensor:
    """Prune blocks of a linear weight by their sum of magnitudes (the paper's Figure 2d).

    A unit is a block of neighbouring output and input features; the scope is the layer. In each
    row of blocks the one with the highest sum is protected: `min(count, blocks - protected)` blocks
    are pruned. An output neuron that an earlier mask leaves without a weight in that block keeps
    its largest one, so that every neuron that holds a weight keeps one. What doesn't fill a block
    at the right and lower edges is a smaller one, also in a layer smaller than a block.

    Args:
        weight: Weight of shape `(out_features, in_features)`.
        amount: Share in [0, 1] or number of the blocks to prune.
        mask: Earlier mask, of `weight`'s shape.
        block_size: Output and input features of a block, `(out, in)`; squares of 2 to 4 in the
            paper.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or block size or non-finite weights.

    Example:
        >>> fc_block_mask(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), 0.5, block_size=(2, 2))
        tensor([[False, False,  True,  True]])
    """
    block_size = check_block_size(block_size)
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    units = fc_block_units(weight.shape, block_size=block_size)
    pruned = _smallest_unprotected(_block_keys(keys, block_size), units, amount)
    kept = ~from_blocks(pruned, block_size, *weight.shape) & (keys >= 0)
    return merge(_with_a_weight(kept, keys), mask)


def fc_fine_mask(weight: Tensor, amount: float, *, mask: Tensor | None = None) -> Tensor:
    """Prune single weights of a linear weight (the paper's Figure 2c).

    The scope is the layer. The largest kept weight of each output neuron is protected:
    `min(count, weights - protected)` weights are pruned.

    Args:
        weight: Weight of shape `(out_features, in_features)`.
        amount: Share in [0, 1] or number of the weights to prune.
        mask: Earlier mask, of `weight`'s shape.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or non-finite weights.

    Example:
        >>> fc_fine_mask(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 1.0)
        tensor([[False,  True],
                [ True, False]])
    """
    keys = _linear_keys(weight, mask)
    check_finite(keys, weight)
    return merge(~_smallest_unprotected(keys, fc_fine_units(weight.shape), amount), mask)


def fc_structure_mask(
    weight: Tensor,
    amount: float,
    columns: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    then: str = "fine",
    block_size: tuple[int, int] = (4, 4),
) -> Tensor:
    """Prune the input columns that always read zero, then fine or in blocks (Figure 3).

    These columns are pruned at no cost, whatever the amount, and count towards it; weights
    elsewhere make up the rest. With blocks, the smallest ones are pruned until the layer's total
    is as near to the amount as complete blocks allow. Every output neuron that holds a weight
    keeps one, its largest.

    Args:
        weight: Weight of shape `(out_features, in_features)`.
        amount: Share in [0, 1] or number of the layer's weights to prune.
        columns: Columns that always read zero, bool of shape `(in_features,)`; none by default.
        mask: Earlier mask, of `weight`'s shape.
        then: How the rest is pruned: `"fine"` as by `fc_fine_mask` or `"block"` as by
            `fc_block_mask`.
        block_size: Output and input features of a block, `(out, in)`.

    Returns:
        A bool mask of `weight`'s shape.

    Raises:
        TypeError, ValueError: For a bad amount, shape, dtype or option or non-finite weights.

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
    block_size = check_block_size(block_size)
    keys = magnitude_keys(weight, kept, min_dims=2)
    blocks = _block_keys(keys, block_size)
    n_kept = to_blocks((keys >= 0).long(), block_size, 0).sum((1, 3))
    number = _n_blocks_for(blocks, n_kept, number - int((~kept).sum()))
    units = fc_block_units(weight.shape, block_size=block_size)
    pruned = _smallest_unprotected(blocks, units, number)
    blocked = ~from_blocks(pruned, block_size, *weight.shape) & kept
    return merge(_with_a_weight(blocked, keys), kept)


def _linear_keys(weight: Tensor, mask: Tensor | None) -> Tensor:
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` of shape {tuple(weight.shape)} must have shape (out_features, in_features): "
            f"fc methods are for linear layers; for convolutions there are ck_structured and "
            f"window_structured"
        )
    return magnitude_keys(weight, mask, min_dims=2)


def _smallest_unprotected(keys: Tensor, units: Units, amount: float) -> Tensor:
    """The smallest units `(rows, columns)` of the layer, but not the largest one of each row.

    A row whose units are all pruned already has none to protect. Of equal largest units the last
    is protected, since of equals the lower index is pruned first. `keys` are overwritten.
    """
    if not keys.numel():
        units.pruned(amount)  # checks the amount
        return torch.zeros_like(keys, dtype=torch.bool)
    guarded, protected = _guarded(keys)
    number = dataclasses.replace(units, protected=protected).pruned(amount)
    return smallest(guarded.view(-1, 1), number).view(keys.shape)


def _guarded(keys: Tensor) -> tuple[Tensor, int]:
    """Keys with the largest kept unit of each row above all others, and the number of these."""
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
    """What `(rows, columns)` keys keep when columns are pruned, at least a weight of each row."""
    return _with_a_weight((keys >= 0) & ~columns, keys)


def _with_a_weight(kept: Tensor, keys: Tensor) -> Tensor:
    """`kept` with the largest weight of each row in which it has none, if `keys` hold one."""
    if not keys.numel():
        return kept
    largest, index = keys.max(1)
    rows = ((largest >= 0) & ~kept.any(1)).nonzero().squeeze(1)
    kept[rows, index[rows]] = True
    return kept


def _n_blocks_for(keys: Tensor, n_kept: Tensor, missing: int) -> int:
    """How many blocks must be pruned so that `missing` more weights are, or nearest to it.

    Args:
        keys: Keys of the blocks, negative where one is pruned.
        n_kept: Number of weights that each block still holds.
        missing: Number of weights to prune.
    """
    already = int((keys < 0).sum())
    if missing <= 0 or not keys.numel():
        return already
    guarded = _guarded(keys.clone())[0].flatten()
    order = guarded.sort(stable=True).indices[already:]
    totals = n_kept.flatten()[order].cumsum(0)
    fewer = int((totals <= missing).sum())
    short = missing - (int(totals[fewer - 1]) if fewer else 0)
    one_more = fewer < len(totals) and int(totals[fewer]) - missing <= short and short > 0
    return already + fewer + int(one_more)


def _block_keys(keys: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The keys of the blocks' sums of magnitudes in float64; negative if all weights are pruned.

    Added weight by weight in row-major order, so that every device rounds alike.
    """
    blocks = to_blocks(keys, block_size, torch.iinfo(keys.dtype).min)
    rows, columns = blocks.shape[0], blocks.shape[2]
    sums = torch.zeros(rows, columns, dtype=torch.float64, device=keys.device)
    pruned = torch.ones(rows, columns, dtype=torch.bool, device=keys.device)
    for i in range(block_size[0]):
        for j in range(block_size[1]):
            part = blocks[:, i, :, j].contiguous()
            sums += magnitudes(part)
            pruned &= part < 0
    return float_bits(sums) | sign_bits(pruned, torch.int64)
