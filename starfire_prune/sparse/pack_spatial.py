"""Chooses how the weights of a convolution larger than 1x1 are stored."""

from __future__ import annotations

from starfire_prune.sparse.ir import Convolution
from starfire_prune.sparse.layout import Geometry
from starfire_prune.sparse.pack_rectangles import pack_rectangles
from starfire_prune.sparse.pack_taps import KERNEL_ROWS, pack_taps
from starfire_prune.sparse.program_format import MAX_ROWS
from starfire_prune.sparse.spatial_tiling import (
    SpatialTiling,
    SpatialWeights,
    Weights,
    spatial_tiling,
)

__all__ = ["RECTANGLES_COST", "pack_spatial"]


# Time of rectangles, relative to the estimate: the shuffles of neighbouring columns also use units
# that multiply
RECTANGLES_COST = 1.15


def pack_spatial(
    op: Convolution, weight: Weights, groups: int, geometry: Geometry
) -> tuple[SpatialWeights, SpatialTiling]:
    """Pack the weight of a convolution, and divide it into work items.

    Four neighbouring output channels share a list of taps if their masks are so similar that this
    is faster. Otherwise, each output channel has rectangles of its own.

    Args:
        op: The convolution.
        weight: Its weight in lanes, `(K, C / groups, R, S)`: in float32, or the quads of int8
            weights in int32.
        groups: Groups of that weight.
        geometry: Layout of the convolution's input.
    """
    tiling = spatial_tiling(op, geometry, MAX_ROWS)
    separate = pack_rectangles(weight, groups, geometry, op.window, tiling.rows)
    if groups > 1:
        return separate, tiling
    low_tiling = spatial_tiling(op, geometry, KERNEL_ROWS)
    shared = pack_taps(weight, geometry, op.window, low_tiling.rows)
    if shared.cycles * low_tiling.places < RECTANGLES_COST * separate.cycles * tiling.places:
        return shared, low_tiling
    return separate, tiling
