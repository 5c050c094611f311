"""Schedules IR ops: chooses layouts, inserts conversions, packs weights and emits a program."""

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
    Op,
    Pooling,
    Value,
)
from starfire_prune.sparse.layout import Geometry, Window, offset_of, padded, plain, tiles
from starfire_prune.sparse.pack_pointwise import pack_linear, pack_pointwise
from starfire_prune.sparse.pack_spatial import pack_spatial, rows_per_register
from starfire_prune.sparse.program import Buffer, Program
from starfire_prune.sparse.program_format import (
    INPUT,
    LANES,
    MAX_ROWS,
    MAX_SPILLED,
    MAXIMUM,
    OUTPUT,
    SUM,
    Opcode,
)

__all__ = ["schedule"]


MIN_WORK_ITEMS = 32  # per operation, so that threads have equal shares
NONE = -1
INF = math.inf


def schedule(ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]) -> Program:
    """The program that runs the ops.

    Args:
        ops: The ops in an order in which they can run.
        inputs: The values that the caller passes.
        outputs: The values that the caller receives.
    """
    scheduler = _Scheduler(_choose_geometries(ops, outputs))
    for index, value in enumerate(inputs):
        scheduler.add_input(value, index)
    for op in ops:
        EMITTERS[type(op)](scheduler, op)
    for index, value in enumerate(outputs):
        scheduler.add_output(value, index)
    return scheduler.program


# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------


def _required_geometry(op: Op) -> Geometry | None:
    """The layout in which an op reads its source; None if it reads any."""
    size = op.source.size
    if isinstance(op, Convolution) and op.is_pointwise and not op.is_linear:
        return tiles(*size)
    if isinstance(op, (Layer, Flatten)) and not _is_spatial(op):
        return plain(*size)
    if isinstance(op, Convolution):
        return padded(*size, op.window)
    if isinstance(op, Pooling):
        return padded(*size, _pooling_window(op.window), op.fill)
    return None


def _is_spatial(op: Op) -> bool:
    return isinstance(op, Convolution) and not op.is_pointwise


def _choose_geometries(ops: Sequence[Op], outputs: Sequence[Value]) -> Mapping[Value, Geometry]:
    """A layout for each value that an op computes: the one that its first reader requires.

    Additions and copies prefer the layout of their output, which is chosen before that of their
    source because ops are visited from the last one to the first.
    """
    required: dict[Value, list[Geometry]] = {value: [plain(*value.size)] for value in outputs}
    preferred: dict[Value, Geometry] = {}
    chosen: dict[Value, Geometry] = {}
    for op in reversed(ops):
        value = op.output
        if value not in chosen:
            default = preferred.get(value, plain(*value.size))
            chosen[value] = required.get(value, [default])[-1]
        geometry = _required_geometry(op)
        if geometry is not None:
            required.setdefault(op.source, []).append(geometry)
        elif isinstance(op, Mean):
            preferred[op.source] = tiles(*op.source.size)
        elif op.source.size == value.size:
            preferred[op.source] = chosen[value]
        if op.residual is not None:
            preferred[op.residual] = chosen[value]
    return chosen


class _Scheduler:
    """Adds to a program what each op needs."""

    def __init__(self, geometries: Mapping[Value, Geometry]) -> None:
        self.program = Program()
        self._geometries = geometries
        self._buffers: dict[Value, dict[Geometry, Buffer]] = {}

    def add_input(self, value: Value, index: int) -> None:
        """Let a value be the caller's tensor with that index."""
        geometry = plain(*value.size)
        self._buffers[value] = {geometry: Buffer(geometry, value.channels, INPUT, index)}
        self.any_view(value)

    def add_output(self, value: Value, index: int) -> None:
        """Copy a value to the caller's tensor with that index."""
        geometry = plain(*value.size)
        buffer = Buffer(geometry, value.channels, OUTPUT, index)
        self._copy(self.any_view(value), self.program.view(buffer, geometry, value.channels))

    def any_view(self, value: Value) -> int:
        """A view of a value in any layout."""
        geometry, buffer = next(iter(self._buffers[value].items()))
        return self.program.view(buffer, geometry, value.channels)

    def convert(self, value: Value, geometry: Geometry) -> None:
        """Convert a value to a layout in the workspace, unless it is there already."""
        buffers = self._buffers[value]
        if geometry not in buffers or buffers[geometry].place == INPUT:
            source = self.any_view(value)
            buffer = Buffer(geometry, value.channels)
            self._copy(source, self.program.view(buffer, geometry, value.channels))
            buffers[geometry] = buffer

    def views(self, op: Op, geometry: Geometry | None) -> tuple[int, int, int]:
        """Views of an op's source, in a given or in any layout, of its output and its residual."""
        target = self._geometries[op.output]
        if geometry is not None:
            self.convert(op.source, geometry)
        if op.residual is not None:
            self.convert(op.residual, target)
        source = self._view(op.source, geometry)
        residual = NONE if op.residual is None else self._view(op.residual, target)
        return source, self._output_view(op, target), residual

    def alias(self, op: Flatten) -> None:
        """Let a value be another one that is read in another shape."""
        geometry = plain(*op.source.size)
        self.convert(op.source, geometry)
        self._buffers[op.output] = {plain(1, 1): self._buffers[op.source][geometry]}

    def constant(self, values: Any, dtype: Any = np.float32) -> int:
        """Add constants to the program; returns their offset."""
        return self.program.constants.add(np.asarray(values, dtype))

    def _view(self, value: Value, geometry: Geometry | None) -> int:
        if geometry is None:
            return self.any_view(value)
        return self.program.view(self._buffers[value][geometry], geometry, value.channels)

    def _output_view(self, op: Op, geometry: Geometry) -> int:
        value = op.output
        buffers = self._buffers.setdefault(value, {})
        buffer = buffers.setdefault(geometry, Buffer(geometry, value.channels))
        if isinstance(op, Copy):
            return self.program.view(buffer, geometry, op.source.channels, op.first)
        return self.program.view(buffer, geometry, value.channels)

    def _copy(self, source: int, destination: int) -> None:
        self.program.add(Opcode.COPY, source, destination, NONE, 1, 1, NONE, NONE, -INF, INF)


# ---------------------------------------------------------------------------------------------
# Emitting operations
# ---------------------------------------------------------------------------------------------


def _emit_copy(scheduler: _Scheduler, op: Copy) -> None:
    views = scheduler.views(op, None)
    scale, shift = NONE, NONE
    if op.scale is not None:
        scale, shift = scheduler.constant(op.scale), scheduler.constant(op.shift)
    scheduler.program.add(Opcode.COPY, *views, *op.stride, scale, shift, op.low, op.high)


def _emit_convolution(scheduler: _Scheduler, op: Convolution) -> None:
    if op.is_linear:
        _emit_linear(scheduler, op)
    elif op.is_pointwise:
        _emit_pointwise(scheduler, op)
    else:
        _emit_spatial(scheduler, op)


def _emit_pointwise(scheduler: _Scheduler, op: Convolution) -> None:
    geometry = tiles(*op.source.size)
    views = scheduler.views(op, geometry)
    packed = pack_pointwise(op.weight[:, :, 0, 0].astype(np.float32), geometry.tile)
    bias = np.pad(op.bias, (0, -len(op.bias) % packed.output_tile_size))
    scheduler.program.add(
        Opcode.POINTWISE,
        *views,
        scheduler.constant(bias),
        scheduler.constant(packed.tiles, packed.tiles.dtype),
        scheduler.constant(packed.indices, np.uint16),
        scheduler.constant(packed.weights),
        *(len(op.bias), packed.output_tile_size, packed.input_tile_size),
        *(packed.index_lists, packed.outputs_per_list, op.low, op.high),
    )


def _emit_spatial(scheduler: _Scheduler, op: Convolution) -> None:
    geometry = padded(*op.source.size, op.window)
    views = scheduler.views(op, geometry)
    image_rows = rows_per_register(geometry)
    all_rows = -(-op.output.height // image_rows)
    row_tiles = -(-all_rows // MAX_ROWS)
    rows = -(-all_rows // row_tiles)
    packed = pack_spatial(op.weight.astype(np.float32), op.groups, geometry, op.window, rows)
    column_tiles = 1 if image_rows > 1 else -(-op.output.width // LANES)
    output_tiles = min(-(-MIN_WORK_ITEMS // (row_tiles * column_tiles)), -(-len(op.bias) // 4))
    if packed.input_tiles > 1:
        output_tiles = max(output_tiles, -(-len(op.bias) // MAX_SPILLED))
    scheduler.program.add(
        Opcode.SPATIAL,
        *views,
        scheduler.constant(op.bias),
        scheduler.constant(packed.starts, np.int32),
        scheduler.constant(packed.runs, packed.runs.dtype),
        scheduler.constant(packed.offsets, np.int32),
        scheduler.constant(packed.weights),
        *(len(op.bias), -(-len(op.bias) // output_tiles), packed.input_tiles),
        *(rows, image_rows * geometry.row, image_rows),
        *(op.low, op.high),
    )


def _emit_pooling(scheduler: _Scheduler, op: Pooling) -> None:
    geometry = padded(*op.source.size, _pooling_window(op.window), op.fill)
    source, output, _ = scheduler.views(op, geometry)
    taps = np.ndindex(op.window.size)
    offsets = [offset_of(geometry, tap, op.window.dilation) for tap in taps]
    mode, scale = (MAXIMUM, 1.0) if op.scale is None else (SUM, op.scale)
    offsets_at = scheduler.constant(offsets, np.int32)
    columns = op.window.stride[1] // geometry.phases[1]
    scheduler.program.add(
        *(Opcode.POOL, source, output, mode, offsets_at, len(offsets), columns, scale),
        *(op.low, op.high),
    )


def _pooling_window(window: Window) -> Window:
    """The window for a pooling's layout: for horizontal stride 2, rows are not split into phases.

    The kernel reads every second column of them.
    """
    vertical, horizontal = window.stride
    return window._replace(stride=(vertical, 1)) if horizontal == 2 else window


def _emit_mean(scheduler: _Scheduler, op: Mean) -> None:
    source, output, _ = scheduler.views(op, None)
    scheduler.program.add(Opcode.MEAN, source, output)


def _emit_linear(scheduler: _Scheduler, op: Layer) -> None:
    source, output, _ = scheduler.views(op, plain(1, 1))
    packed = pack_linear(op.weight.reshape(len(op.weight), -1).astype(np.float32))
    bias, starts, indices = scheduler.constant(op.bias), NONE, NONE
    if packed.starts is not None:
        starts = scheduler.constant(packed.starts, np.int32)
        indices = scheduler.constant(packed.indices, np.int32)
    weights = scheduler.constant(packed.weights)
    scheduler.program.add(
        *(Opcode.LINEAR, source, output, bias, starts, indices, weights),
        *(len(op.bias), op.low, op.high),
    )


EMITTERS: Mapping[type[Op], Callable[[_Scheduler, Any], None]] = {
    Convolution: _emit_convolution,
    Copy: _emit_copy,
    Flatten: _Scheduler.alias,
    Linear: _emit_linear,
    Mean: _emit_mean,
    Pooling: _emit_pooling,
}
