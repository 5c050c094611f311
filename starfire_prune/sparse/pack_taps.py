"""Packs weights of convolutions larger than 1x1 as taps that four output channels share."""

from __future__ import annotations

import math

import numpy as np

from starfire_prune.sparse.layout import Geometry, Window, offset_of
from starfire_prune.sparse.program_format import LANES, RECTANGLE_RUN, SHARED_OUTPUTS
from starfire_prune.sparse.spatial_tiling import (
    L1_BYTES,
    SpatialWeights,
    Weights,
    spill_cycles,
)

__all__ = ["KERNEL_ROWS", "LIST_CYCLES", "TAP_CYCLES", "pack_taps", "tap_tile_size"]


KERNEL_ROWS = 6  # accumulators of the largest kernel, for each of the four output channels
TAP_CYCLES = 1.0  # constant overhead of each use of a tap
LIST_CYCLES = 20.0  # constant overhead of each list, whose end is not foreseen


def pack_taps(weight: Weights, geometry: Geometry, window: Window, rows: int) -> SpatialWeights:
    """Pack a weight `(K, C, R, S)`, without groups, for planes of that geometry.

    Each list has the taps and input channels that any of the four output channels keeps, with four
    weights for each of them. Input channels are cut into tiles that stay in the L1 cache for all
    output channels of a work item.

    Args:
        weight: The quads of the int8 weight, in int32.
        geometry: Layout of its input.
        window: Window of its taps.
        rows: Accumulators of 16 lanes per work item, at most `KERNEL_ROWS`.
    """
    outputs, channels = weight.shape[:2]
    filled = np.pad(
        weight.reshape(outputs, channels, -1), ((0, -outputs % SHARED_OUTPUTS), *2 * [(0, 0)])
    )
    quads = filled.reshape(-1, SHARED_OUTPUTS, *filled.shape[1:])
    tile_size = tap_tile_size(geometry, window, rows, channels)
    input_tiles = -(-channels // tile_size)
    quad, channel, tap = (quads != 0).any(1).nonzero()
    lists = channel // tile_size * len(quads) + quad
    order = np.argsort(lists, kind="stable")  # then by input channel and tap
    quad, channel, tap = (each[order] for each in (quad, channel, tap))
    taps = np.ndindex(*window.size)
    tap_offsets = np.array([offset_of(geometry, each, window.dilation) for each in taps])
    counts = np.bincount(lists, minlength=len(quads) * input_tiles)
    cycles = len(lists) * (SHARED_OUTPUTS * rows / 2 + TAP_CYCLES) + len(counts) * LIST_CYCLES
    cycles += spill_cycles(rows, outputs, input_tiles)
    return SpatialWeights(
        starts=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        runs=np.zeros(0, RECTANGLE_RUN),
        offsets=(channel * geometry.channel + tap_offsets[tap]).astype(np.int32),
        weights=quads[quad, :, channel, tap].reshape(-1),
        input_tiles=input_tiles,
        cycles=cycles,
        shared=True,
    )


def tap_tile_size(geometry: Geometry, window: Window, rows: int, channels: int) -> int:
    """Input channels of a tile: as many as stay in the L1 cache, in tiles of about one size."""
    reach = (window.size[0] - 1) * window.dilation[0] // geometry.phases[0]
    lines = (rows + reach) * (1 if geometry.row <= LANES else 2) * math.prod(geometry.phases)
    most = max(1, L1_BYTES // (4 * LANES * lines))
    return -(-channels // -(-channels // most))
