"""Weights of convolutions that slide a window, in the order in which the kernels read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import LANES, Geometry, Window, offset_of

__all__ = ["BlockWeights", "pack_block", "rectangles", "rows_a_register"]


Floats = NDArray[np.float32]
RUN = np.dtype([("shape", "<i4", 2), ("count", "<i8"), ("offsets", "<i8"), ("weights", "<i8")])
TALLEST, WIDEST = 4, 3  # the largest rectangle that has a kernel
FIRST_CACHE_BYTES = 28 << 10  # of the input channels that stay there
LINE_CYCLES = 2.0  # to get a line from the second cache
USE_CYCLES = 4.0  # that a rectangle takes beside


class BlockWeights(NamedTuple):
    """Weights of a convolution: arrays of the program's `Block`, and into how many blocks its
    input channels fall."""

    starts: NDArray[np.int32]
    runs: NDArray[Any]
    offsets: NDArray[np.int32]
    weights: Floats
    blocks: int


class _Rectangle(NamedTuple):
    """Taps that one kernel does.

    Attributes:
        taps: their indices in the window, `(rows, columns)`.
        offset: of the first one's input, in floats.
        distance: from the input of a row to that of the next one, in floats.
    """

    taps: NDArray[np.int64]
    offset: int
    distance: int

    def part(self, row: int, column: int, rows: int, columns: int) -> _Rectangle:
        """A smaller one of it."""
        taps = self.taps[row : row + rows, column : column + columns]
        return _Rectangle(taps, self.offset + row * self.distance + column, self.distance)


class _Entries(NamedTuple):
    """Rectangles' uses: the run that each is of, input offsets, weights `(n, rows * columns)`."""

    shape: tuple[int, ...]
    outputs: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: Floats


class _Part(NamedTuple):
    """A rectangle, where it is used `(K, C)`, and how its input channels go in blocks."""

    rectangle: _Rectangle
    used: NDArray[np.bool_]
    first_block: int
    block_size: int


class _Cover(NamedTuple):
    """Rectangles that cover all taps, their blocks, and the cycles that they take."""

    parts: list[_Part]
    blocks: int
    cycles: float


def pack_block(
    weight: Floats, groups: int, geometry: Geometry, window: Window, rows: int
) -> BlockWeights:
    """Pack a weight `(K, C / groups, R, S)` for planes of that geometry.

    The taps of each kernel that are not zero are covered by rectangles: by the largest, by rows,
    or by columns, and these by single taps, whichever is fastest. Small rectangles do little with
    what they read. So where there are many of them, input channels go in blocks that stay in the
    first cache for all output channels of a chunk, whose sums are put aside meanwhile.

    Args:
        weight: float32.
        groups: of the convolution.
        geometry: of its input.
        window: of its taps.
        rows: accumulators of 16 floats that an item has.
    """
    flat = weight.reshape(*weight.shape[:2], -1)
    found = rectangles(geometry, window)
    cover = _covered(found, flat != 0, _Costs(geometry, rows, near=False))
    if groups == 1:
        near = _covered(found, flat != 0, _Costs(geometry, rows, near=True))
        cover = min(cover, near, key=lambda each: each.cycles)
    inputs = np.arange(len(flat)) // (len(flat) // groups) * flat.shape[1]
    alike: dict[tuple[int, ...], list[_Entries]] = {}
    for part in cover.parts:
        outputs, channels = part.used.nonzero()
        rectangle, blocks = part.rectangle, part.first_block + channels // part.block_size
        offsets = (inputs[outputs] + channels) * geometry.channel + rectangle.offset
        weights = flat[outputs, channels][:, rectangle.taps.reshape(-1)]
        entries = _Entries(rectangle.taps.shape, blocks * len(flat) + outputs, offsets, weights)
        alike.setdefault(entries.shape, []).append(entries)
    return _in_runs([_joined(entries) for entries in alike.values()], len(flat), cover.blocks)


def _joined(entries: Sequence[_Entries]) -> _Entries:
    """Entries of one shape in the order of their runs, and in these of what they read."""
    runs, offsets = (np.concatenate([each[i] for each in entries]) for i in (1, 2))
    order = np.lexsort((offsets, runs))
    weights = np.concatenate([each.weights for each in entries])
    return _Entries(entries[0].shape, runs[order], offsets[order], weights[order])


def rectangles(geometry: Geometry, window: Window) -> list[_Rectangle]:
    """The window's taps as rectangles, within a phase and of sizes that there are kernels for."""
    per_row = rows_a_register(geometry)
    rows = _ranges(window, geometry, 0, per_row, TALLEST)
    columns = _ranges(window, geometry, 1, 1, WIDEST)
    found = []
    for down, across in itertools.product(rows, columns):
        taps = np.add.outer(np.array(down) * window.size[1], np.array(across))
        offset = offset_of(geometry, (down[0], across[0]), window.dilation)
        found.append(_Rectangle(taps, offset, per_row * geometry.row))
    return found


def rows_a_register(geometry: Geometry) -> int:
    """Image rows that one register of 16 floats holds."""
    return max(1, LANES // geometry.row)


def _ranges(window: Window, geometry: Geometry, axis: int, step: int, most: int) -> list[list[int]]:
    """Taps of one axis whose inputs are `step` apart within a phase, at most so many together."""
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
            found += [part.tolist() for part in np.array_split(line, -(-len(line) // most))]
    return found


class _Costs(NamedTuple):
    """What rectangles cost.

    Attributes:
        geometry: of the input.
        rows: accumulators.
        near: whether inputs come from the first cache, not from the second one.
    """

    geometry: Geometry
    rows: int
    near: bool

    def cycles(self, part: _Rectangle) -> float:
        """Of one use: those of multiplying, or of reading where that takes longer."""
        height, width = part.taps.shape
        inputs = self.rows + height - 1
        splits = part.offset % LANES + width > 1
        if self.near:
            reading = inputs * (width - 1 if width > 1 else 1.0 if splits else 0.5)
        else:
            next_to = self.geometry.row <= LANES
            reading = LINE_CYCLES * (inputs + splits if next_to else inputs * (1 + splits))
        multiplying = self.rows * height * width / 2
        return float(max(multiplying, reading) + USE_CYCLES)

    def block_size(self, rectangle: _Rectangle, channels: int) -> int:
        """Input channels that a block has; all of them where they are far."""
        if not self.near:
            return channels
        lines = (self.rows + len(rectangle.taps)) * (1 if self.geometry.row <= LANES else 2)
        if not self.apart:
            lines *= math.prod(self.geometry.phases)
        return min(channels, max(1, FIRST_CACHE_BYTES // (4 * LANES * lines)))

    @property
    def apart(self) -> bool:
        """Whether blocks are a rectangle's, which reads one phase of its channels.

        Where several image rows fill a register, accumulators are few, and to put them aside once
        for all rectangles takes less.
        """
        return self.near and rows_a_register(self.geometry) == 1

    def putting_aside(self, blocks: int, outputs: int) -> float:
        """Cycles of putting sums aside and taking them again."""
        return 4.0 * self.rows * outputs * blocks if blocks > 1 else 0.0


def _covered(found: Sequence[_Rectangle], kept: NDArray[np.bool_], costs: _Costs) -> _Cover:
    """Cover the taps kept, `(K, C, taps)`, by the cheapest rectangles."""
    parts, blocks, cycles = [], 0, 0.0
    outputs, channels, _ = kept.shape
    smallest = min(costs.block_size(rectangle, channels) for rectangle in found)
    for rectangle in found:
        size = costs.block_size(rectangle, channels) if costs.apart else smallest
        first = blocks if costs.apart else 0
        blocks = first + -(-channels // size)
        for part, used in _covers(rectangle, kept, costs):
            parts.append(_Part(part, used, first, size))
            cycles += costs.cycles(part) * float(used.sum())
    return _Cover(parts, blocks, cycles + costs.putting_aside(blocks, outputs))


def _covers(
    rectangle: _Rectangle, kept: NDArray[np.bool_], costs: _Costs
) -> Iterator[tuple[_Rectangle, NDArray[np.bool_]]]:
    """Rectangles that cover the taps kept, and where each is used, `(K, C)`."""
    taps = kept[:, :, rectangle.taps]
    rows, columns = rectangle.taps.shape
    singles = [[rectangle.part(r, c, 1, 1) for c in range(columns)] for r in range(rows)]
    alone = np.array([[costs.cycles(part) for part in line] for line in singles]) * taps
    lines = {
        2: [rectangle.part(r, 0, 1, columns) for r in range(rows)],
        3: [rectangle.part(0, c, rows, 1) for c in range(columns)],
    }
    # By rows and by columns: a line for all its taps, or each by itself
    joined, total = {}, {}
    for axis, along in lines.items():
        apart = alone.sum(5 - axis)
        whole = np.array([costs.cycles(part) for part in along])
        joined[axis] = apart > whole
        total[axis] = np.where(joined[axis], whole, apart).sum(2)
    cheapest = np.minimum(total[2], total[3])
    covered = taps.any((2, 3)) & (cheapest >= costs.cycles(rectangle))
    yield rectangle, covered
    left = taps & ~covered[..., None, None]
    for axis, along in lines.items():
        chosen = (total[2] <= total[3]) == (axis == 2)
        for index, part in enumerate(along):
            used = ~covered & chosen & joined[axis][..., index]
            yield part, used
            left[(..., index, slice(None)) if axis == 2 else (..., index)] &= ~used[..., None]
    for r, line in enumerate(singles):
        for c, part in enumerate(line):
            yield part, left[..., r, c]


def _in_runs(entries: list[_Entries], outputs: int, blocks: int) -> BlockWeights:
    """Sort the entries by block and output channel: a run for each of its rectangles."""
    runs, offsets, weights, at, size = [], [], [], 0, 0
    for entry in entries:
        counts = np.bincount(entry.outputs, minlength=outputs * blocks)
        first = counts.cumsum() - counts
        area = entry.weights.shape[1]
        for output in counts.nonzero()[0]:
            run = (entry.shape, counts[output], at + first[output], size + first[output] * area)
            runs.append((output, run))
        offsets.append(entry.offsets)
        weights.append(entry.weights.reshape(-1))
        at, size = at + len(entry.offsets), size + entry.weights.size
    runs.sort(key=lambda run: run[0])
    starts = np.bincount([output for output, _ in runs], minlength=outputs * blocks).cumsum()
    return BlockWeights(
        starts=np.concatenate([[0], starts]).astype(np.int32),
        runs=np.array([run for _, run in runs], RUN),
        offsets=np.concatenate(offsets).astype(np.int32),
        weights=np.concatenate(weights),
        blocks=blocks,
    )
