"""Packs int8 weights: those of four neighbouring input channels share 32 bits (a quad)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.pack_pointwise import INPUT_TILE_BYTES, SHARED_COST
from starfire_prune.sparse.program_format import LANES, MAX_OUTPUT_TILE, QUAD_TILE

__all__ = ["QuadWeights", "is_narrow", "pack_byte_rows", "pack_quads", "quads_of"]


ROW_BYTES = 64  # rows of a matrix are a multiple of this
MAX_INT16 = 2**15 - 1
Integers = NDArray[np.int8]
Quads = NDArray[np.int32]


class QuadWeights(NamedTuple):
    """Weights of a 1x1 convolution: fields and arrays of the C++ structure `BytePointwise`."""

    tiles: NDArray[Any]
    indices: NDArray[np.uint16]
    weights: Quads
    output_tile_size: int
    input_tile_size: int


def quads_of(weight: Integers, groups: int) -> Quads:
    """The quads of a weight `(K, C / groups, ...)`: `(K, ceil(C / 4), ...)`.

    The first of four channels is in the lowest bits. Channels of other groups are zero.
    """
    outputs, per_group = weight.shape[:2]
    channels = per_group * groups
    filled = np.zeros((outputs, channels + -channels % 4, *weight.shape[2:]), np.int8)
    first = np.arange(outputs) // (outputs // groups) * per_group
    filled[np.arange(outputs)[:, None], first[:, None] + np.arange(per_group)] = weight
    split = filled.reshape(outputs, -1, 4, *weight.shape[2:])
    quads: Quads = np.ascontiguousarray(np.moveaxis(split, 2, -1)).view("<i4")[..., 0]
    return quads


def is_narrow(quads: NDArray[np.integer[Any]], largest: int) -> bool:
    """Whether no sum of two products exceeds int16, at which AVX2's products of bytes saturate.

    Args:
        quads: Weights as the kernels read them: in int32, quads of four int8 weights.
        largest: The largest byte of the input.
    """
    packed = np.ascontiguousarray(quads, "<i4")
    sizes = np.abs(packed.reshape(-1, 1).view(np.int8).astype(np.int64))
    pairs = sizes[:, 0::2] + sizes[:, 1::2]
    return bool(pairs.max(initial=0) * largest <= MAX_INT16)


def pack_quads(quads: Quads, tile: int) -> QuadWeights:
    """Pack the quads `(K, Q)` of a 1x1 convolution for tiles of `tile` pixels.

    Each quad tile computes four neighbouring output channels. They share one list of input quads if
    their masks are so similar that the union of their lists is faster. Other lists are filled up
    with zeros to an even number of entries, which the kernels take two at a time.
    """
    input_tile = max(1, INPUT_TILE_BYTES // (4 * tile))
    output_tile = min(MAX_OUTPUT_TILE, 4 * -(-len(quads) // 4))
    filled = np.pad(quads, ((0, -len(quads) % output_tile), (0, -quads.shape[1] % input_tile)))
    split = filled.reshape(-1, output_tile // 4, 4, filled.shape[1] // input_tile, input_tile)
    rows = split.transpose(0, 3, 1, 2, 4).reshape(-1, 4, input_tile)
    tiles = np.zeros(len(rows), QUAD_TILE)
    indices: list[NDArray[Any]] = []
    weights: list[Quads] = []
    at, weights_at = 0, 0
    for tile_fields, row in zip(tiles, rows, strict=True):
        kept = row != 0
        union = kept.any(0)
        shared = 4 * union.sum() * SHARED_COST <= kept.sum()
        lists = [union.nonzero()[0]] if shared else [_even(each.nonzero()[0]) for each in kept]
        packed = row[:, lists[0]].T if shared else _taken(row, kept, lists)
        counts = [len(each) for each in lists]
        tile_fields["indices"], tile_fields["weights"] = at, weights_at
        tile_fields["counts"][: len(counts)] = counts
        tile_fields["shared"] = shared
        weights.append(packed.reshape(-1))
        indices += lists
        at, weights_at = at + sum(counts), weights_at + packed.size
    return QuadWeights(
        tiles=tiles,
        indices=(np.concatenate(indices) * (tile // LANES)).astype(np.uint16),
        weights=np.concatenate(weights),
        output_tile_size=output_tile,
        input_tile_size=input_tile,
    )


def _even(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """A list with an even number of entries; one that is added repeats the first index."""
    return np.append(indices, indices[:1]) if len(indices) % 2 else indices


def _taken(row: Quads, kept: NDArray[np.bool_], lists: list[NDArray[np.int64]]) -> Quads:
    """The weights of four lists, one after the other, with zeros for entries that are added."""
    parts = []
    for weights, mask, indices in zip(row, kept, lists, strict=True):
        values = weights[mask]
        parts += [values, np.zeros(len(indices) - len(values), np.int32)]
    return np.concatenate(parts)


def pack_byte_rows(weight: Integers) -> Integers:
    """The rows of a matrix `(K, C)`, filled up with zeros to a multiple of 64 bytes."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % ROW_BYTES)))
