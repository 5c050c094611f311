"""Packs the weights of 1x1 convolutions and linear layers in the order the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.program_format import LANES, MAX_OUTPUT_TILE, REGISTER_TILE

__all__ = ["LinearWeights", "PointwiseWeights", "pack_linear", "pack_pointwise"]


Floats = NDArray[np.float32]
INPUT_TILE_BYTES = 36 << 10  # size of an input-channel tile, which stays in the L1 cache
# Cost of a multiply-add where output channels share a load, relative to one where they don't
SHARED_COST = 0.85
DENSE_SHARE = 0.4  # share of nonzero weights above which a linear layer is stored as dense


class PointwiseWeights(NamedTuple):
    """Weights of a 1x1 convolution: fields and arrays of the C++ structure `Pointwise`."""

    tiles: NDArray[Any]
    indices: NDArray[np.uint16]
    weights: Floats
    output_tile_size: int
    input_tile_size: int
    index_lists: int
    outputs_per_list: int


def pack_pointwise(weight: Floats, tile: int) -> PointwiseWeights:
    """Pack a weight `(K, C)` for tiles of `tile` pixels.

    Each register tile is two output channels, or four where pixel tiles are small or four output
    channels share their masks. It has an index list of input channels for each of them, side by
    side and of one length, or one list that they share.
    """
    outputs = 4 if tile <= 4 * LANES or _is_shared(weight != 0, 4) else 2
    shared = _is_shared(weight != 0, outputs)
    input_tile = max(1, INPUT_TILE_BYTES // (4 * tile))
    output_tile = min(MAX_OUTPUT_TILE, outputs * -(-len(weight) // outputs))
    split = _split(weight, output_tile, input_tile)
    channels, rows = _sort_by_length(split, outputs if shared else 1)
    lists = (rows != 0).any(1) if shared else rows.reshape(-1, input_tile) != 0
    per_tile = 1 if shared else outputs
    tiles, indices, weights = _entries(rows.reshape(-1, outputs, input_tile), lists, per_tile)
    tiles["channel"][:, :outputs] = channels.reshape(-1, outputs)
    return PointwiseWeights(
        tiles=tiles,
        indices=(indices * (tile // LANES)).astype(np.uint16).reshape(-1),
        weights=weights.reshape(-1),
        output_tile_size=output_tile,
        input_tile_size=input_tile,
        index_lists=per_tile,
        outputs_per_list=outputs if shared else 1,
    )


def _is_shared(kept: NDArray[np.bool_], outputs: int) -> bool:
    """Whether neighbours are so similar that one list, the union of theirs, is faster."""
    rows = np.pad(kept, ((0, -len(kept) % outputs), (0, 0)))
    together = rows.reshape(-1, outputs, kept.shape[1]).any(1).sum() * outputs
    return bool(together * SHARED_COST <= kept.sum())


def _split(weight: Floats, output_tile: int, input_tile: int) -> Floats:
    """The weights of each pair of tiles, `(pairs, output_tile, input_tile)`, padded with zeros."""
    padding = ((0, -len(weight) % output_tile), (0, -weight.shape[1] % input_tile))
    filled = np.pad(weight, padding)
    split = filled.reshape(-1, output_tile, filled.shape[1] // input_tile, input_tile)
    return split.transpose(0, 2, 1, 3).reshape(-1, output_tile, input_tile)


def _sort_by_length(split: Floats, size: int) -> tuple[NDArray[np.int64], Floats]:
    """Output channels in sets of `size` neighbours, `(sets, size)`, and their weights.

    Within each pair of tiles the sets are sorted by the length of their index list, from long to
    short: the branch predictor foresees the end of a loop that is as long as the previous one, and
    lists side by side should have similar lengths. Weights are `(sets, size, input_tile)`.
    """
    sets = split.reshape(len(split), -1, size, split.shape[2])
    lengths = (sets != 0).any(2).sum(2)
    order = np.argsort(-lengths, axis=1, kind="stable")
    rows = np.take_along_axis(sets, order[:, :, None, None], axis=1)
    channels = order.reshape(-1, 1) * size + np.arange(size)
    return channels, rows.reshape(-1, size, split.shape[2])


def _entries(
    rows: Floats, lists: NDArray[np.bool_], per_tile: int
) -> tuple[NDArray[Any], NDArray[np.int64], Floats]:
    """Register tiles without their channels, and the input channels and weights of their lists.

    Args:
        rows: Weights of each register tile, `(tiles, outputs, input_tile)`.
        lists: Members of each index list, `(tiles * per_tile, input_tile)`.
        per_tile: Number of index lists per register tile.

    Returns:
        The register tiles, `(tiles,)`, input channels `(entries, per_tile)` and weights
        `(entries, outputs)`. Lists that are shorter than their neighbours are padded with zeros.
    """
    lengths = lists.sum(1)
    tiles = np.zeros(len(rows), REGISTER_TILE)
    tiles["count"] = lengths.reshape(-1, per_tile).max(1)
    tiles["start"] = tiles["count"].cumsum() - tiles["count"]
    row, column = lists.nonzero()
    tile, lane = np.divmod(row, per_tile)
    entry = tiles["start"][tile] + np.arange(len(row)) - (lengths.cumsum() - lengths)[row]
    entries = tiles["count"].sum()
    indices = np.zeros((entries, per_tile), np.int64)
    indices[entry, lane] = column
    if per_tile == 1:
        return tiles, indices, rows[tile, :, column]
    weights = np.zeros((entries, per_tile), np.float32)
    weights[entry, lane] = rows[tile, lane, column]
    return tiles, indices, weights


class LinearWeights(NamedTuple):
    """Weights of a linear layer: arrays of the C++ structure `Linear`, the first two if sparse."""

    starts: NDArray[np.int32] | None
    indices: NDArray[np.int32] | None
    weights: Floats


def pack_linear(weight: Floats) -> LinearWeights:
    """Pack a weight `(K, C)` as rows of (index, weight), or as dense."""
    kept = weight != 0
    if kept.mean() > DENSE_SHARE:
        return LinearWeights(None, None, weight)
    starts = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
    return LinearWeights(starts, kept.nonzero()[1].astype(np.int32), weight[kept])
