"""Programs from steps: layouts chosen, conversions put in, weights packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from starfire_prune.sparse.ir import (
    Convolution,
    Copy,
    Flatten,
    Layer,
    Linear,
    Mean,
    Pooling,
    Step,
    Value,
)
from starfire_prune.sparse.layout import LANES, Geometry, Window, offset_of, padded, plain, tiles
from starfire_prune.sparse.pack_pointwise import pack_linear, pack_point
from starfire_prune.sparse.pack_spatial import pack_block, rows_a_register
from starfire_prune.sparse.program import INPUT, OUTPUT, Buffer, Code, Program

__all__ = ["plan"]


MOST_ROWS = 14  # accumulators of the block kernel
MOST_PUT_ASIDE = 16  # output channels whose sums are, where input channels go in blocks
ITEMS = 32  # that an operation falls into at least, so that threads have equal shares
NONE = -1
INF = math.inf


def plan(steps: Sequence[Step], inputs: Sequence[Value], outputs: Sequence[Value]) -> Program:
    """The program that runs the steps.

    Args:
        steps: in an order in which they can run.
        inputs: values that the caller gives.
        outputs: values that the caller gets.
    """
    planner = _Planner(_geometries(steps, outputs))
    for index, value in enumerate(inputs):
        planner.give(value, index)
    for step in steps:
        PLANS[type(step)](planner, step)
    for index, value in enumerate(outputs):
        planner.take(value, index)
    return planner.program


# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------


def _wanted(step: Step) -> Geometry | None:
    """How a step wants its source; None where it takes any."""
    size = step.source.size
    if isinstance(step, Convolution) and step.is_point and not step.is_linear:
        return tiles(*size)
    if isinstance(step, (Layer, Flatten)) and not _is_block(step):
        return plain(*size)
    if isinstance(step, Convolution):
        return padded(*size, step.window)
    if isinstance(step, Pooling):
        return padded(*size, _in_place(step.window), step.fill)
    return None


def _is_block(step: Step) -> bool:
    return isinstance(step, Convolution) and not step.is_point


def _geometries(steps: Sequence[Step], outputs: Sequence[Value]) -> Mapping[Value, Geometry]:
    """A layout for each value that a step makes: what its first reader wants.

    Additions and copies want that of what they make, which is chosen before that of what they
    read, from the last step on.
    """
    wishes: dict[Value, list[Geometry]] = {value: [plain(*value.size)] for value in outputs}
    weak: dict[Value, Geometry] = {}
    chosen: dict[Value, Geometry] = {}
    for step in reversed(steps):
        value = step.output
        if value not in chosen:
            default = weak.get(value, plain(*value.size))
            chosen[value] = wishes.get(value, [default])[-1]
        wanted = _wanted(step)
        if wanted is not None:
            wishes.setdefault(step.source, []).append(wanted)
        elif isinstance(step, Mean):
            weak[step.source] = tiles(*step.source.size)
        elif step.source.size == value.size:
            weak[step.source] = chosen[value]
        if step.residual is not None:
            weak[step.residual] = chosen[value]
    return chosen


class _Planner:
    """Appends to a program what each step needs."""

    def __init__(self, geometries: Mapping[Value, Geometry]) -> None:
        self.program = Program()
        self._geometries = geometries
        self._buffers: dict[Value, dict[Geometry, Buffer]] = {}

    def give(self, value: Value, index: int) -> None:
        """Take a tensor of the caller for a value."""
        geometry = plain(*value.size)
        self._buffers[value] = {geometry: Buffer(geometry, value.channels, INPUT, index)}
        self.any_view(value)

    def take(self, value: Value, index: int) -> None:
        """Give a value to the caller."""
        geometry = plain(*value.size)
        buffer = Buffer(geometry, value.channels, OUTPUT, index)
        self._copy(self.any_view(value), self.program.view(buffer, geometry, value.channels))

    def any_view(self, value: Value) -> int:
        """A view of a value in any layout."""
        geometry, buffer = next(iter(self._buffers[value].items()))
        return self.program.view(buffer, geometry, value.channels)

    def prepare(self, value: Value, geometry: Geometry) -> None:
        """Convert a value to a layout in the arena if it isn't there in that layout."""
        buffers = self._buffers[value]
        if geometry not in buffers or buffers[geometry].place == INPUT:
            source = self.any_view(value)
            buffer = Buffer(geometry, value.channels)
            self._copy(source, self.program.view(buffer, geometry, value.channels))
            buffers[geometry] = buffer

    def views(self, step: Step, geometry: Geometry | None) -> tuple[int, int, int]:
        """Views of a step's source, in a layout or in any, its output and what it adds."""
        target = self._geometries[step.output]
        if geometry is not None:
            self.prepare(step.source, geometry)
        if step.residual is not None:
            self.prepare(step.residual, target)
        source = self._view(step.source, geometry)
        residual = NONE if step.residual is None else self._view(step.residual, target)
        return source, self._output(step, target), residual

    def alias(self, step: Flatten) -> None:
        """Let a value be another one, read in another shape."""
        geometry = plain(*step.source.size)
        self.prepare(step.source, geometry)
        self._buffers[step.output] = {plain(1, 1): self._buffers[step.source][geometry]}

    def constant(self, values: Any, dtype: Any = np.float32) -> int:
        """The position of constants of the program."""
        return self.program.constants.add(np.asarray(values, dtype))

    def _view(self, value: Value, geometry: Geometry | None) -> int:
        if geometry is None:
            return self.any_view(value)
        return self.program.view(self._buffers[value][geometry], geometry, value.channels)

    def _output(self, step: Step, geometry: Geometry) -> int:
        value = step.output
        buffers = self._buffers.setdefault(value, {})
        buffer = buffers.setdefault(geometry, Buffer(geometry, value.channels))
        if isinstance(step, Copy):
            return self.program.view(buffer, geometry, step.source.channels, step.first)
        return self.program.view(buffer, geometry, value.channels)

    def _copy(self, source: int, destination: int) -> None:
        self.program.add(Code.COPY, source, destination, NONE, 1, 1, NONE, NONE, -INF, INF)


# ---------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------


def _copy(planner: _Planner, step: Copy) -> None:
    views = planner.views(step, None)
    scale, shift = NONE, NONE
    if step.scale is not None:
        scale, shift = planner.constant(step.scale), planner.constant(step.shift)
    planner.program.add(Code.COPY, *views, *step.stride, scale, shift, step.low, step.high)


def _convolution(planner: _Planner, step: Convolution) -> None:
    if step.is_linear:
        _linear(planner, step)
    elif step.is_point:
        _point(planner, step)
    else:
        _block(planner, step)


def _point(planner: _Planner, step: Convolution) -> None:
    geometry = tiles(*step.source.size)
    views = planner.views(step, geometry)
    packed = pack_point(step.weight[:, :, 0, 0].astype(np.float32), geometry.tile)
    bias = np.pad(step.bias, (0, -len(step.bias) % packed.chunk))
    planner.program.add(
        Code.POINT,
        *views,
        planner.constant(bias),
        planner.constant(packed.units, packed.units.dtype),
        planner.constant(packed.indices, np.uint16),
        planner.constant(packed.weights),
        *(len(step.bias), packed.chunk, packed.block, packed.lists, packed.shared),
        *(step.low, step.high),
    )


def _block(planner: _Planner, step: Convolution) -> None:
    geometry = padded(*step.source.size, step.window)
    views = planner.views(step, geometry)
    per_row = rows_a_register(geometry)
    all_rows = -(-step.output.height // per_row)
    parts = -(-all_rows // MOST_ROWS)
    rows = -(-all_rows // parts)
    packed = pack_block(step.weight.astype(np.float32), step.groups, geometry, step.window, rows)
    strips = 1 if per_row > 1 else -(-step.output.width // LANES)
    chunks = min(-(-ITEMS // (parts * strips)), -(-len(step.bias) // 4))
    if packed.blocks > 1:
        chunks = max(chunks, -(-len(step.bias) // MOST_PUT_ASIDE))
    planner.program.add(
        Code.BLOCK,
        *views,
        planner.constant(step.bias),
        planner.constant(packed.starts, np.int32),
        planner.constant(packed.runs, packed.runs.dtype),
        planner.constant(packed.offsets, np.int32),
        planner.constant(packed.weights),
        *(len(step.bias), -(-len(step.bias) // chunks), packed.blocks),
        *(rows, per_row * geometry.row, per_row),
        *(step.low, step.high),
    )


def _pooling(planner: _Planner, step: Pooling) -> None:
    geometry = padded(*step.source.size, _in_place(step.window), step.fill)
    source, output, _ = planner.views(step, geometry)
    taps = np.ndindex(step.window.size)
    offsets = [offset_of(geometry, tap, step.window.dilation) for tap in taps]
    mode, scale = (0, 1.0) if step.scale is None else (1, step.scale)
    at = planner.constant(offsets, np.int32)
    columns = step.window.stride[1] // geometry.phases[1]
    planner.program.add(
        *(Code.POOL, source, output, mode, at, len(offsets), columns, scale),
        *(step.low, step.high),
    )


def _in_place(window: Window) -> Window:
    """The window of a pooling, in whose rows every second column can be read where it lies."""
    high, wide = window.stride
    return window._replace(stride=(high, 1)) if wide == 2 else window


def _mean(planner: _Planner, step: Mean) -> None:
    source, output, _ = planner.views(step, None)
    planner.program.add(Code.MEAN, source, output)


def _linear(planner: _Planner, step: Layer) -> None:
    source, output, _ = planner.views(step, plain(1, 1))
    packed = pack_linear(step.weight.reshape(len(step.weight), -1).astype(np.float32))
    bias, starts, indices = planner.constant(step.bias), NONE, NONE
    if packed.starts is not None:
        starts = planner.constant(packed.starts, np.int32)
        indices = planner.constant(packed.indices, np.int32)
    weights = planner.constant(packed.weights)
    planner.program.add(
        *(Code.LINEAR, source, output, bias, starts, indices, weights),
        *(len(step.bias), step.low, step.high),
    )


PLANS: Mapping[type[Step], Callable[[_Planner, Any], None]] = {
    Convolution: _convolution,
    Copy: _copy,
    Flatten: _Planner.alias,
    Linear: _linear,
    Mean: _mean,
    Pooling: _pooling,
}
