"""Packs weights of convolutions larger than 1x1 as rectangles for each output channel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Geometry, Window, offset_of
from starfire_prune.sparse.program_format import LANES, RECTANGLE_RUN
from starfire_prune.sparse.spatial_tiling import (
    L1_BYTES,
    L2_LINE_CYCLES,
    SpatialWeights,
    Weights,
    rows_per_register,
    spill_cycles,
)

__all__ = ["pack_rectangles", "rectangles"]


MAX_RECTANGLE_ROWS, MAX_RECTANGLE_COLUMNS = 4, 3  # the largest rectangle that has a kernel
RECTANGLE_CYCLES = 4.0  # constant overhead of each use of a rectangle
RUN_CYCLES = 40.0  # constant overhead of each run: sums are loaded and stored


class _Rectangle(NamedTuple):
    """A rectangle of filter taps that one kernel call handles.

    Attributes:
        taps: Indices of the taps in the window, `(rows, columns)`.
        offset: Offset of the first tap's input, in floats.
        row_stride: Floats from the input of a row to that of the next one.
    """

    taps: NDArray[np.int64]
    offset: int
    row_stride: int

    def crop(self, row: int, column: int, rows: int, columns: int) -> _Rectangle:
        """A smaller rectangle within this one."""
        taps = self.taps[row : row + rows, column : column + columns]
        return _Rectangle(taps, self.offset + row * self.row_stride + column, self.row_stride)


class _Entries(NamedTuple):
    """Uses of rectangles of one shape.

    Attributes:
        shape: Rows and columns of the rectangles.
        runs: The run of each use: input tile times output channels, plus output channel, `(n,)`.
        offsets: Offset of each input, `(n,)`.
        weights: Weights, `(n, rows * columns)`.
    """

    shape: tuple[int, ...]
    runs: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: Weights


class _PlacedRectangle(NamedTuple):
    """A rectangle, where it is used `(K, C)`, and the tiles of its input channels."""

    rectangle: _Rectangle
    used: NDArray[np.bool_]
    first_tile: int
    tile_size: int


class _Cover(NamedTuple):
    """Rectangles that cover all kept taps, their input-channel tiles and their cost in cycles."""

    rectangles: list[_PlacedRectangle]
    input_tiles: int
    cycles: float


def pack_rectangles(
    weight: Weights, groups: int, geometry: Geometry, window: Window, rows: int
) -> SpatialWeights:
    """Pack a weight `(K, C / groups, R, S)` for planes of that geometry.

    The nonzero taps of each kernel are covered by rectangles: by the largest one, by rows, or by
    columns, with single taps for the rest, whichever is fastest. Small rectangles do little work
    per load. Where many are needed, input channels are cut into tiles that stay in the L1 cache for
    all output channels of a work item, whose sums are spilled to memory between the tiles.

    Args:
        weight: The weight in lanes: in float32, or the quads of int8 weights in int32.
        groups: Groups of the convolution.
        geometry: Layout of its input.
        window: Window of its taps.
        rows: Accumulators of 16 floats per work item.
    """
    flat = weight.reshape(*weight.shape[:2], -1)
    candidates = rectangles(geometry, window)
    cover = _cheapest_cover(candidates, flat != 0, _Costs(geometry, rows, in_l1=False))
    if groups == 1:
        tiled = _cheapest_cover(candidates, flat != 0, _Costs(geometry, rows, in_l1=True))
        cover = min(cover, tiled, key=lambda each: each.cycles)
    inputs = np.arange(len(flat)) // (len(flat) // groups) * flat.shape[1]
    by_shape: dict[tuple[int, ...], list[_Entries]] = {}
    for rectangle, used, first_tile, tile_size in cover.rectangles:
        outputs, channels = used.nonzero()
        input_tiles = first_tile + channels // tile_size
        offsets = (inputs[outputs] + channels) * geometry.channel + rectangle.offset
        weights = flat[outputs, channels][:, rectangle.taps.reshape(-1)]
        runs = input_tiles * len(flat) + outputs
        entries = _Entries(rectangle.taps.shape, runs, offsets, weights)
        by_shape.setdefault(entries.shape, []).append(entries)
    merged = [_merge(entries) for entries in by_shape.values()]
    return _to_runs(merged, len(flat), cover)


def _merge(entries: Sequence[_Entries]) -> _Entries:
    """Entries of one shape, sorted by run and then by input offset."""
    runs, offsets = (np.concatenate([each[i] for each in entries]) for i in (1, 2))
    order = np.lexsort((offsets, runs))
    weights = np.concatenate([each.weights for each in entries])
    return _Entries(entries[0].shape, runs[order], offsets[order], weights[order])


def rectangles(geometry: Geometry, window: Window) -> list[_Rectangle]:
    """The window's taps as rectangles, each within one phase and of a size that has a kernel."""
    image_rows = rows_per_register(geometry)
    rows = _ranges(window, geometry, 0, image_rows, MAX_RECTANGLE_ROWS)
    columns = _ranges(window, geometry, 1, 1, MAX_RECTANGLE_COLUMNS)
    found = []
    for row_taps, column_taps in itertools.product(rows, columns):
        taps = np.add.outer(np.array(row_taps) * window.size[1], np.array(column_taps))
        offset = offset_of(geometry, (row_taps[0], column_taps[0]), window.dilation)
        found.append(_Rectangle(taps, offset, image_rows * geometry.row))
    return found


def _ranges(window: Window, geometry: Geometry, axis: int, step: int, most: int) -> list[list[int]]:
    """Ranges of at most `most` taps of an axis whose inputs are `step` apart within a phase."""
    places = {}
    for tap in range(window.size[axis]):
        at, phase = divmod(tap * window.dilation[axis], geometry.phases[axis])
        places[phase, at] = tap
    found = []
    for phase, at in places:
        if (phase, at - step) not in places:
            line = []
            while (phase, at) in places:
                line.append(places[phase, at])
                at += step
            found += [taps.tolist() for taps in np.array_split(line, -(-len(line) // most))]
    return found


class _Costs(NamedTuple):
    """The cost model of rectangles.

    Attributes:
        geometry: Layout of the input.
        rows: Number of accumulators.
        in_l1: Whether inputs come from the L1 cache, rather than from L2.
    """

    geometry: Geometry
    rows: int
    in_l1: bool

    def cycles(self, rectangle: _Rectangle) -> float:
        """Cycles of one use: for multiplying, or for loading if that takes longer."""
        height, width = rectangle.taps.shape
        inputs = self.rows + height - 1
        splits = rectangle.offset % LANES + width > 1
        if self.in_l1:
            loading = inputs * (width - 1 if width > 1 else 1.0 if splits else 0.5)
        else:
            adjacent = self.geometry.row <= LANES
            loading = L2_LINE_CYCLES * (inputs + splits if adjacent else inputs * (1 + splits))
        multiplying = self.rows * height * width / 2
        return float(max(multiplying, loading) + RECTANGLE_CYCLES)

    def tile_size(self, rectangle: _Rectangle, channels: int) -> int:
        """Input channels per tile; all of them without tiles."""
        if not self.in_l1:
            return channels
        lines = (self.rows + len(rectangle.taps)) * (1 if self.geometry.row <= LANES else 2)
        if not self.tiles_per_rectangle:
            lines *= math.prod(self.geometry.phases)
        return min(channels, max(1, L1_BYTES // (4 * LANES * lines)))

    @property
    def tiles_per_rectangle(self) -> bool:
        """Whether each rectangle, which reads one phase of its channels, has its own tiles.

        Where several image rows share a register, there are few accumulators, and it is cheaper to
        spill them once for all rectangles.
        """
        return self.in_l1 and rows_per_register(self.geometry) == 1


def _cheapest_cover(
    candidates: Sequence[_Rectangle], kept: NDArray[np.bool_], costs: _Costs
) -> _Cover:
    """Cover the kept taps, `(K, C, taps)`, by the cheapest rectangles."""
    placed, input_tiles, cycles = [], 0, 0.0
    outputs, channels, _ = kept.shape
    smallest = min(costs.tile_size(rectangle, channels) for rectangle in candidates)
    for candidate in candidates:
        own_tiles = costs.tiles_per_rectangle
        size = costs.tile_size(candidate, channels) if own_tiles else smallest
        first = input_tiles if own_tiles else 0
        input_tiles = first + -(-channels // size)
        for rectangle, used in _cover_within(candidate, kept, costs):
            placed.append(_PlacedRectangle(rectangle, used, first, size))
            cycles += costs.cycles(rectangle) * float(used.sum())
    return _Cover(placed, input_tiles, cycles + spill_cycles(costs.rows, outputs, input_tiles))


def _cover_within(
    rectangle: _Rectangle, kept: NDArray[np.bool_], costs: _Costs
) -> Iterator[tuple[_Rectangle, NDArray[np.bool_]]]:
    """Rectangles that cover the kept taps of a rectangle, and where each is used, `(K, C)`."""
    taps = kept[:, :, rectangle.taps]
    rows, columns = rectangle.taps.shape
    singles = [[rectangle.crop(r, c, 1, 1) for c in range(columns)] for r in range(rows)]
    single_cycles = np.array([[costs.cycles(each) for each in line] for line in singles]) * taps
    lines = {
        2: [rectangle.crop(r, 0, 1, columns) for r in range(rows)],
        3: [rectangle.crop(0, c, rows, 1) for c in range(columns)],
    }
    # By rows and by columns: one line for all its taps, or single taps
    joined, total = {}, {}
    for axis, along in lines.items():
        as_singles = single_cycles.sum(5 - axis)
        as_line = np.array([costs.cycles(line) for line in along])
        joined[axis] = as_singles > as_line
        total[axis] = np.where(joined[axis], as_line, as_singles).sum(2)
    cheapest = np.minimum(total[2], total[3])
    covered = taps.any((2, 3)) & (cheapest >= costs.cycles(rectangle))
    yield rectangle, covered
    left = taps & ~covered[..., None, None]
    for axis, along in lines.items():
        chosen = (total[2] <= total[3]) == (axis == 2)
        for index, line in enumerate(along):
            used = ~covered & chosen & joined[axis][..., index]
            yield line, used
            left[(..., index, slice(None)) if axis == 2 else (..., index)] &= ~used[..., None]
    for r, row in enumerate(singles):
        for c, single in enumerate(row):
            yield single, left[..., r, c]


def _to_runs(merged: list[_Entries], outputs: int, cover: _Cover) -> SpatialWeights:
    """Sort entries by input tile and output channel, with a run for each shape of rectangle."""
    runs, offsets, weights, at, size = [], [], [], 0, 0
    input_tiles = cover.input_tiles
    for entries in merged:
        counts = np.bincount(entries.runs, minlength=outputs * input_tiles)
        first = counts.cumsum() - counts
        area = entries.weights.shape[1]
        for index in counts.nonzero()[0]:
            start = (at + first[index], size + first[index] * area)
            runs.append((index, (*entries.shape, counts[index], *start)))
        offsets.append(entries.offsets)
        weights.append(entries.weights.reshape(-1))
        at, size = at + len(entries.offsets), size + entries.weights.size
    runs.sort(key=lambda run: run[0])
    starts = np.bincount([index for index, _ in runs], minlength=outputs * input_tiles).cumsum()
    return SpatialWeights(
        starts=np.concatenate([[0], starts]).astype(np.int32),
        runs=np.array([run for _, run in runs], RECTANGLE_RUN),
        offsets=np.concatenate(offsets).astype(np.int32),
        weights=np.concatenate(weights),
        input_tiles=input_tiles,
        cycles=cover.cycles + RUN_CYCLES * len(runs),
    )
