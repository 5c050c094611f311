"""Chooses how the int8 weights of a convolution larger than 1x1 are stored."""

from __future__ import annotations

from typing import NamedTuple

from starfire_prune.sparse.ir import Convolution
from starfire_prune.sparse.layout import Geometry
from starfire_prune.sparse.pack_merged import MergedQuads, pack_merged
from starfire_prune.sparse.pack_quads import quads_of
from starfire_prune.sparse.pack_rectangles import pack_rectangles
from starfire_prune.sparse.pack_taps import KERNEL_ROWS, pack_taps
from starfire_prune.sparse.program_format import MAX_ROWS
from starfire_prune.sparse.spatial_tiling import SpatialTiling, SpatialWeights, spatial_tiling

__all__ = ["StoredWeights", "as_rectangles", "merged", "pack_byte_spatial", "shared"]


# Time of rectangles, relative to the estimate: shuffles of neighbouring columns take turns with
# products of bytes
RECTANGLES_COST = 1.25


class StoredWeights(NamedTuple):
    """Weights of a convolution, its work items, and the quads that are merged for them."""

    weights: SpatialWeights
    tiling: SpatialTiling
    merged: MergedQuads | None = None

    @property
    def cycles(self) -> float:
        """Estimate of the time of the convolution."""
        cost = 1.0 if self.weights.shared else RECTANGLES_COST
        return cost * self.weights.cycles * self.tiling.places


def as_rectangles(op: Convolution, geometry: Geometry) -> StoredWeights:
    """Rectangles of taps, for each output channel."""
    tiling = spatial_tiling(op, geometry, MAX_ROWS)
    quads = quads_of(op.weight, op.groups)
    return StoredWeights(pack_rectangles(quads, 1, geometry, op.window, tiling.rows), tiling)


def shared(op: Convolution, geometry: Geometry) -> StoredWeights:
    """Taps that four output channels share."""
    tiling = spatial_tiling(op, geometry, KERNEL_ROWS)
    quads = quads_of(op.weight, op.groups)
    return StoredWeights(pack_taps(quads, geometry, op.window, tiling.rows), tiling)


def merged(op: Convolution, geometry: Geometry) -> StoredWeights:
    """Taps that four output channels share, of quads of the input channels that they keep."""
    tiling = spatial_tiling(op, geometry, MAX_ROWS)
    packed, quads = pack_merged(op.weight, geometry, op.window, tiling.rows)
    return StoredWeights(packed, tiling, quads)


def pack_byte_spatial(op: Convolution, geometry: Geometry) -> StoredWeights:
    """The weights of a convolution of bytes in the way that takes the least time, by estimate.

    Args:
        op: The convolution.
        geometry: Layout of its input.
    """
    ways = [as_rectangles(op, geometry), shared(op, geometry)]
    if op.groups == 1:
        ways.append(merged(op, geometry))
    return min(ways, key=lambda way: way.cycles)
