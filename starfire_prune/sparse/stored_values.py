"""Where the values of a program under construction are stored, with the conversions they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from starfire_prune.sparse.geometries import required_geometry
from starfire_prune.sparse.ir import Copy, Flatten, Op, Value
from starfire_prune.sparse.layout import Geometry, plain
from starfire_prune.sparse.program import Buffer, Program
from starfire_prune.sparse.program_format import INPUT, OUTPUT, Opcode

__all__ = ["NONE", "StoredValues", "geometry_of"]


NONE = -1  # a field that refers to nothing
INF = math.inf


def geometry_of(op: Op) -> Geometry:
    """The layout in which an op reads its source; a plain one if it reads any."""
    return required_geometry(op) or plain(*op.source.size)


class StoredValues:
    """Where the values of a program are stored, and in which layouts.

    Attributes:
        program: The program, to which conversions between layouts are added.
    """

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
        self._copy(value, self.any_view(value), self.program.view(buffer, geometry, value.channels))

    def any_view(self, value: Value) -> int:
        """A view of a value in any layout."""
        geometry, buffer = next(iter(self._buffers[value].items()))
        return self.program.view(buffer, geometry, value.stored_channels)

    def convert(self, value: Value, geometry: Geometry) -> None:
        """Convert a value to a layout in the workspace, unless it is there already."""
        buffers = self._buffers[value]
        if geometry not in buffers or buffers[geometry].place == INPUT:
            source = self.any_view(value)
            buffer = Buffer(geometry, value.stored_channels)
            self._copy(value, source, self.program.view(buffer, geometry, value.stored_channels))
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
        return self.program.view(self._buffers[value][geometry], geometry, value.stored_channels)

    def _output_view(self, op: Op, geometry: Geometry) -> int:
        value = op.output
        buffers = self._buffers.setdefault(value, {})
        buffer = buffers.setdefault(geometry, Buffer(geometry, value.stored_channels))
        if isinstance(op, Copy):
            return self.program.view(buffer, geometry, op.source.stored_channels, op.first)
        return self.program.view(buffer, geometry, value.stored_channels)

    def _copy(self, value: Value, source: int, destination: int) -> None:
        if value.quantization is None:
            self.program.add(Opcode.COPY, source, destination, NONE, 1, 1, NONE, NONE, -INF, INF)
        else:
            self.program.add(Opcode.BYTE_COPY, source, destination, 1, 1)
