"""Divides convolutions larger than 1x1 into work items, for floats and for bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.ir import Convolution
from starfire_prune.sparse.layout import Geometry
from starfire_prune.sparse.program_format import LANES, MAX_SPILLED
from starfire_prune.sparse.stored_values import StoredValues

__all__ = [
    "L1_BYTES",
    "L2_LINE_CYCLES",
    "SpatialTiling",
    "SpatialWeights",
    "Weights",
    "rows_per_register",
    "spatial_fields",
    "spatial_tiling",
    "spill_cycles",
]


Weights = NDArray[Any]  # in lanes: float32, or the quads of int8 weights in int32
MIN_WORK_ITEMS = 32  # per operation, so that threads have equal shares
L1_BYTES = 28 << 10  # size of an input-channel tile, which stays in the L1 cache
L2_LINE_CYCLES = 2.0  # to load a cache line from the L2 cache


class SpatialWeights(NamedTuple):
    """Weights of a convolution: arrays and fields of the C++ structure `Spatial`.

    Attributes:
        starts: The first run of each input tile and output channel; or, if output channels share
            taps, the first tap of each input tile and quad of output channels. The end is last.
        runs: Uses of rectangles of one shape; none if output channels share taps.
        offsets: Offset of each rectangle or tap in the input.
        weights: Weights of each rectangle, or the four of each tap.
        input_tiles: Number of input-channel tiles.
        cycles: Estimate of the time of a work item with all output channels.
        shared: Whether four neighbouring output channels share their taps.
    """

    starts: NDArray[np.int32]
    runs: NDArray[Any]
    offsets: NDArray[np.int32]
    weights: Weights
    input_tiles: int
    cycles: float
    shared: bool = False


class SpatialTiling(NamedTuple):
    """The work items of a convolution.

    Attributes:
        rows: Accumulators of 16 lanes in each.
        places: Number of places in the image.
    """

    rows: int
    places: int

    def output_tile(self, outputs: int, input_tiles: int) -> int:
        """Output channels in each work item, a multiple of 4."""
        tiles = min(-(-MIN_WORK_ITEMS // self.places), -(-outputs // 4))
        if input_tiles > 1:  # whose sums have to be kept for all of them
            tiles = max(tiles, -(-outputs // MAX_SPILLED))
        return 4 * -(-outputs // (4 * tiles))


def spatial_tiling(op: Convolution, geometry: Geometry, most_rows: int) -> SpatialTiling:
    """The work items of a convolution whose input has that layout, of at most so many rows."""
    image_rows = rows_per_register(geometry)
    all_rows = -(-op.output.height // image_rows)
    row_tiles = -(-all_rows // most_rows)
    column_tiles = 1 if image_rows > 1 else -(-op.output.width // LANES)
    return SpatialTiling(-(-all_rows // row_tiles), row_tiles * column_tiles)


def rows_per_register(geometry: Geometry) -> int:
    """Image rows that fit in one register of 16 lanes."""
    return max(1, LANES // geometry.row)


def spill_cycles(rows: int, outputs: int, input_tiles: int) -> float:
    """Cycles of storing sums between input-channel tiles and loading them again."""
    return 4.0 * rows * outputs * input_tiles if input_tiles > 1 else 0.0


def spatial_fields(
    values: StoredValues,
    packed: SpatialWeights,
    tiling: SpatialTiling,
    geometry: Geometry,
    outputs: int,
) -> list[int]:
    """The fields of the C++ structure `Spatial` from `starts_at` to `image_rows`."""
    image_rows = rows_per_register(geometry)
    return [
        values.constant(packed.starts, np.int32),
        values.constant(packed.runs, packed.runs.dtype),
        values.constant(packed.offsets, np.int32),
        values.constant(packed.weights, packed.weights.dtype),
        *(outputs, tiling.output_tile(outputs, packed.input_tiles), packed.input_tiles),
        *(tiling.rows, image_rows * geometry.row, image_rows),
    ]
