"""Divides convolutions larger than 1x1 into work items, for floats and for bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from starfire_prune.sparse.ir import Convolution
from starfire_prune.sparse.layout import Geometry
from starfire_prune.sparse.pack_spatial import SpatialWeights, rows_per_register
from starfire_prune.sparse.program_format import LANES, MAX_ROWS, MAX_SPILLED
from starfire_prune.sparse.stored_values import StoredValues

__all__ = ["SpatialTiling", "spatial_fields", "spatial_tiling"]


MIN_WORK_ITEMS = 32  # per operation, so that threads have equal shares


class SpatialTiling(NamedTuple):
    """The work items of a convolution.

    Attributes:
        rows: Accumulators of 16 lanes in each.
        places: Number of places in the image.
    """

    rows: int
    places: int

    def output_tile(self, outputs: int, input_tiles: int) -> int:
        """Output channels in each work item, a multiple of 4 unless there are fewer."""
        tiles = min(-(-MIN_WORK_ITEMS // self.places), -(-outputs // 4))
        if input_tiles > 1:  # whose sums have to be kept for all of them
            tiles = max(tiles, -(-outputs // MAX_SPILLED))
        return 4 * -(-outputs // (4 * tiles))


def spatial_tiling(op: Convolution, geometry: Geometry) -> SpatialTiling:
    """The work items of a convolution whose input has that layout."""
    image_rows = rows_per_register(geometry)
    all_rows = -(-op.output.height // image_rows)
    row_tiles = -(-all_rows // MAX_ROWS)
    column_tiles = 1 if image_rows > 1 else -(-op.output.width // LANES)
    return SpatialTiling(-(-all_rows // row_tiles), row_tiles * column_tiles)


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
