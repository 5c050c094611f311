"""Weights of 1x1 convolutions and linear layers in the order in which the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import LANES

__all__ = ["LinearWeights", "PointWeights", "pack_linear", "pack_point"]


Floats = NDArray[np.float32]
CHUNK = 64  # output channels an item, whose sums stay in the cache
BLOCK_BYTES = 36 << 10  # of the input channels that stay in the first cache
UNIT = np.dtype([("channel", "<i4", 4), ("count", "<i8"), ("start", "<i8")])
# A multiply-add where output channels share a load takes this share of one where they don't.
SHARED_COST = 0.85
DENSE_SHARE = 0.4  # of a linear layer's weights, from which on all of them are kept


class PointWeights(NamedTuple):
    """Weights of a 1x1 convolution: fields and arrays of the program's `Point`."""

    units: NDArray[Any]
    indices: NDArray[np.uint16]
    weights: Floats
    chunk: int
    block: int
    lists: int
    shared: int


def pack_point(weight: Floats, tile: int) -> PointWeights:
    """Pack a weight `(K, C)` for tiles of so many pixels.

    Each unit is two output channels (four, where tiles are small or four share their masks): lists
    of the input channels that each has weights for, side by side and of one length, or one list
    where they share it.
    """
    outputs = 4 if tile <= 4 * LANES or _is_shared(weight != 0, 4) else 2
    shared = _is_shared(weight != 0, outputs)
    block = max(1, BLOCK_BYTES // (4 * tile))
    chunk = min(CHUNK, outputs * -(-len(weight) // outputs))
    channels, rows = _in_order(_parts(weight, chunk, block), outputs if shared else 1)
    lists = (rows != 0).any(1) if shared else rows.reshape(-1, block) != 0
    number = 1 if shared else outputs  # of lists a unit
    units, indices, weights = _entries(rows.reshape(-1, outputs, block), lists, number)
    units["channel"][:, :outputs] = channels.reshape(-1, outputs)
    return PointWeights(
        units=units,
        indices=(indices * (tile // LANES)).astype(np.uint16).reshape(-1),
        weights=weights.reshape(-1),
        chunk=chunk,
        block=block,
        lists=number,
        shared=outputs if shared else 1,
    )


def _is_shared(kept: NDArray[np.bool_], outputs: int) -> bool:
    """Whether neighbours are so alike that one list, of what any of them has, is faster."""
    rows = np.pad(kept, ((0, -len(kept) % outputs), (0, 0)))
    together = rows.reshape(-1, outputs, kept.shape[1]).any(1).sum() * outputs
    return bool(together * SHARED_COST <= kept.sum())


def _parts(weight: Floats, chunk: int, block: int) -> Floats:
    """The weights of each chunk and block, `(parts, chunk, block)`; zeros fill the last ones."""
    filled = np.pad(weight, ((0, -len(weight) % chunk), (0, -weight.shape[1] % block)))
    split = filled.reshape(-1, chunk, filled.shape[1] // block, block)
    return split.transpose(0, 2, 1, 3).reshape(-1, chunk, block)


def _in_order(parts: Floats, size: int) -> tuple[NDArray[np.int64], Floats]:
    """Output channels of each part, `(groups, size)`, and their weights, `(groups, size, block)`.

    Groups of neighbours come by the length of their list: the end of a loop is foreseen if it is
    that of the last one, and lists side by side are to be as long as each other.
    """
    groups = parts.reshape(len(parts), -1, size, parts.shape[2])
    lengths = (groups != 0).any(2).sum(2)
    order = np.argsort(-lengths, axis=1, kind="stable")
    rows = np.take_along_axis(groups, order[:, :, None, None], axis=1)
    channels = order.reshape(-1, 1) * size + np.arange(size)
    return channels, rows.reshape(-1, size, parts.shape[2])


def _entries(
    rows: Floats, lists: NDArray[np.bool_], number: int
) -> tuple[NDArray[Any], NDArray[np.int64], Floats]:
    """Units but for their channels, and their entries' input channels and weights.

    Args:
        rows: weights of each unit, `(units, outputs, block)`.
        lists: what is in each list, `(units * number, block)`.
        number: of lists a unit.

    Returns:
        The units, `(units,)`, input channels `(entries, number)` and weights `(entries, outputs)`.
        Lists that are shorter than their neighbours end in zeros.
    """
    lengths = lists.sum(1)
    units = np.zeros(len(rows), UNIT)
    units["count"] = lengths.reshape(-1, number).max(1)
    units["start"] = units["count"].cumsum() - units["count"]
    row, column = lists.nonzero()
    unit, lane = np.divmod(row, number)
    entry = units["start"][unit] + np.arange(len(row)) - (lengths.cumsum() - lengths)[row]
    entries = units["count"].sum()
    indices = np.zeros((entries, number), np.int64)
    indices[entry, lane] = column
    if number == 1:
        return units, indices, rows[unit, :, column]
    weights = np.zeros((entries, number), np.float32)
    weights[entry, lane] = rows[unit, lane, column]
    return units, indices, weights


class LinearWeights(NamedTuple):
    """Weights of a linear layer: arrays of the program's `Linear`, the first two if sparse."""

    starts: NDArray[np.int32] | None
    indices: NDArray[np.int32] | None
    weights: Floats


def pack_linear(weight: Floats) -> LinearWeights:
    """Pack a weight `(K, C)`: as rows of (index, weight), or all of it."""
    kept = weight != 0
    if kept.mean() > DENSE_SHARE:
        return LinearWeights(None, None, weight)
    starts = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
    return LinearWeights(starts, kept.nonzero()[1].astype(np.int32), weight[kept])
