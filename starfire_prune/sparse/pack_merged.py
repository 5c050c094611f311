"""Packs int8 weights of convolutions larger than 1x1 whose outputs share single input channels."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Geometry, Window, offset_of
from starfire_prune.sparse.pack_quads import quads_of
from starfire_prune.sparse.pack_taps import LIST_CYCLES, TAP_CYCLES, tap_tile_size
from starfire_prune.sparse.program_format import LANES, RECTANGLE_RUN, SHARED_OUTPUTS
from starfire_prune.sparse.spatial_tiling import SpatialWeights, rows_per_register, spill_cycles

__all__ = ["MergedQuads", "pack_merged"]


QUAD = 4  # channels
MERGE_CYCLES = 4.0  # to load, merge and store a vector


class MergedQuads(NamedTuple):
    """Quads of any four input channels, which the kernels merge before they use them.

    Attributes:
        sources: Position of each channel of each merged quad, `(quads, 4)`: four times the offset
            of its quad in the input, plus its byte.
        starts: The first merged quad of each list of taps, and the end.
        vectors: Offsets, within a channel, of the vectors of which a merged quad has copies.
        row_stride: Lanes from the input of one accumulator to that of the next one, in the copies.
        most: Largest number of merged quads of a list.
    """

    sources: NDArray[np.int32]
    starts: NDArray[np.int32]
    vectors: NDArray[np.int32]
    row_stride: int
    most: int


class _Copies(NamedTuple):
    """The vectors of a channel that are copied, and where a tap's input is in the copy."""

    vectors: NDArray[np.int64]
    tap_offsets: NDArray[np.int64]
    row_stride: int


def pack_merged(
    weight: NDArray[np.int8], geometry: Geometry, window: Window, rows: int
) -> tuple[SpatialWeights, MergedQuads]:
    """Pack a weight `(K, C, R, S)`, without groups, for planes of that geometry.

    Where four neighbouring output channels keep the same input channels, but not the same quads of
    them, most products of a quad would be with zeros. Instead, the input channels that any of the
    four outputs keeps are merged into new quads, which are used by all their taps.

    Args:
        weight: The weight.
        geometry: Layout of its input.
        window: Window of its taps.
        rows: Accumulators of 16 lanes per work item.
    """
    outputs, channels = weight.shape[:2]
    padding = ((0, -outputs % SHARED_OUTPUTS), (0, 0), (0, 0))
    filled = np.pad(weight.reshape(outputs, channels, -1), padding)
    split = filled.reshape(-1, SHARED_OUTPUTS, channels, filled.shape[2])
    tile_size = QUAD * tap_tile_size(geometry, window, rows, -(-channels // QUAD))
    tiles = range(0, channels, tile_size)
    copies = _copies(geometry, window, rows)
    kept = np.any(split != 0, axis=(1, 3))
    sources, offsets, weights, taps, groups = [], [], [], [], []
    for first, quad in itertools.product(tiles, range(len(split))):
        merged = _in_fours(first + np.flatnonzero(kept[quad, first : first + tile_size]))
        sources.append(merged // QUAD * (QUAD * geometry.channel) + merged % QUAD)
        found = _merged_weights(split[quad], merged)  # (groups, taps, outputs)
        group, tap = np.nonzero(np.any(found, axis=2))
        offsets.append(group * len(copies.vectors) * LANES + copies.tap_offsets[tap])
        weights.append(found[group, tap].reshape(-1))
        taps.append(len(group))
        groups.append(len(merged))
    cycles = sum(taps) * (SHARED_OUTPUTS * rows / 2 + TAP_CYCLES) + len(taps) * LIST_CYCLES
    cycles += sum(groups) * len(copies.vectors) * MERGE_CYCLES
    packed = SpatialWeights(
        starts=_starts(taps),
        runs=np.zeros(0, RECTANGLE_RUN),
        offsets=np.concatenate(offsets).astype(np.int32),
        weights=np.concatenate(weights),
        input_tiles=len(tiles),
        cycles=cycles + spill_cycles(rows, outputs, len(tiles)),
        shared=True,
    )
    return packed, MergedQuads(
        sources=np.concatenate(sources).astype(np.int32),
        starts=_starts(groups),
        vectors=copies.vectors.astype(np.int32),
        row_stride=copies.row_stride,
        most=max(groups),
    )


def _starts(counts: list[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _in_fours(channels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Channels in groups of four, `(groups, 4)`; the last one stands for those that are missing."""
    missing = -len(channels) % QUAD
    return np.concatenate([channels, channels[-1:].repeat(missing)]).reshape(-1, QUAD)


def _merged_weights(weight: NDArray[np.int8], merged: NDArray[np.int64]) -> NDArray[np.int32]:
    """The quads of weights for merged channels, `(groups, taps, outputs)`."""
    taken = weight[:, merged]  # (outputs, groups, 4, taps)
    repeated = merged[:, 1:] == merged[:, :-1]
    taken[:, :, 1:] *= ~repeated[None, :, :, None]
    flat = taken.reshape(len(weight), -1, taken.shape[3])
    quads: NDArray[np.int32] = quads_of(flat, 1).transpose(1, 2, 0)
    return quads


def _copies(geometry: Geometry, window: Window, rows: int) -> _Copies:
    """What is copied of each channel: for each phase, all lines that its taps read."""
    image_rows = rows_per_register(geometry)
    is_wide = geometry.row > LANES
    reached = [offset_of(geometry, tap, window.dilation) for tap in np.ndindex(*window.size)]
    phases = sorted({offset // geometry.plane for offset in reached})
    within = np.array(reached) % geometry.plane
    line, column = np.divmod(within, geometry.row)
    width = LANES * (1 + -(-int(column.max()) // LANES))  # of the columns that taps reach
    if is_wide:
        lines = rows + int(line.max())
        one = np.add.outer(np.arange(lines) * geometry.row, np.arange(0, width, LANES)).reshape(-1)
        in_phase = line * width + column
    else:
        lanes = (rows - 1) * image_rows * geometry.row + int(within.max()) + LANES
        one = np.arange(-(-lanes // LANES)) * LANES
        in_phase = within
    place = np.array([phases.index(offset // geometry.plane) for offset in reached])
    return _Copies(
        vectors=np.concatenate([phase * geometry.plane + one for phase in phases]),
        tap_offsets=place * len(one) * LANES + in_phase,
        row_stride=width if is_wide else image_rows * geometry.row,
    )
