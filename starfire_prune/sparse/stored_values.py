"""Where the values of a program under construction are stored, with the conversions they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from starfire_prune.sparse.geometries import required_geometry
from starfire_prune.sparse.ir import Copy, Flatten, Op, Value
from starfire_prune.sparse.layout import Geometry, plain
from starfire_prune.sparse.program import Buffer, Program
from starfire_prune.sparse.program_format import INPUT, OUTPUT, TILES, Activation, Opcode

__all__ = ["NONE", "StoredValues", "geometry_of"]


NONE = -1  # a field that refers to nothing
INF = math.inf


def geometry_of(op: Op) -> Geometry:
    """The layout in which an op reads its source; a plain one if it reads any."""
    return required_geometry(op) or plain(*op.source.size)


class _Place(NamedTuple):
    """The memory of a value, which begins with that channel of it."""

    buffer: Buffer
    first: int = 0


class StoredValues:
    """Where the values of a program are stored, and in which layouts.

    Attributes:
        program: The program, to which conversions between layouts are added.
    """

    def __init__(self, geometries: Mapping[Value, Geometry]) -> None:
        self.program = Program()
        self._geometries = geometries
        self._places: dict[Value, dict[Geometry, _Place]] = {}

    def add_input(self, value: Value, index: int) -> None:
        """Let a value be the caller's tensor with that index."""
        geometry = plain(*value.size)
        self._places[value] = {geometry: _Place(Buffer(geometry, value.channels, INPUT, index))}
        self.any_view(value)

    def add_output(self, value: Value, index: int) -> None:
        """Copy a value to the caller's tensor with that index."""
        geometry = plain(*value.size)
        buffer = Buffer(geometry, value.channels, OUTPUT, index)
        self._copy(value, self.any_view(value), self.program.view(buffer, geometry, value.channels))

    def any_view(self, value: Value) -> int:
        """A view of a value in any layout."""
        return self._view(value, next(iter(self._places_of(value))))

    def convert(self, value: Value, geometry: Geometry) -> None:
        """Convert a value to a layout in the workspace, unless it is there already."""
        places = self._places_of(value)
        if geometry not in places or places[geometry].buffer.place == INPUT:
            source = self.any_view(value)
            buffer = Buffer(geometry, value.stored_channels)
            self._copy(value, source, self.program.view(buffer, geometry, value.stored_channels))
            self._places.setdefault(value, {})[geometry] = _Place(buffer)

    def views(self, op: Op, geometry: Geometry | None) -> tuple[int, int, int]:
        """Views of an op's source, in a given or in any layout, of its output and its residual.

        Other operands of the output's size are converted to its layout too.
        """
        target = self._geometries[op.output.root]
        if geometry is not None:
            self.convert(op.source, geometry)
        for operand in op.operands:
            if operand.size == op.output.size:
                self.convert(operand, target)
                if not self._is_like_output(operand, op) and isinstance(op, Copy):
                    self.convert(op.source, target)
                    geometry = target
                elif not self._is_like_output(operand, op):
                    self._separate(operand, target)
        source = self.any_view(op.source) if geometry is None else self._view(op.source, geometry)
        residual = NONE if op.residual is None else self._view(op.residual, target)
        return source, self._output_view(op, target), residual

    def factor_view(self, op: Copy) -> int:
        """A view of a copy's factor: in the output's layout, or of one pixel; after `views`."""
        if op.factor is None:
            return NONE
        if op.factor.size != op.output.size:
            return self.any_view(op.factor)
        return self._view(op.factor, self._geometries[op.output.root])

    def alias(self, op: Flatten) -> None:
        """Let a value be another one that is read in another shape."""
        geometry = plain(*op.source.size)
        self.convert(op.source, geometry)
        buffer, first = self._places_of(op.source)[geometry]
        self._places[op.output] = {plain(1, 1): _Place(buffer, first * geometry.channel)}

    def constant(self, values: Any, dtype: Any = np.float32) -> int:
        """Add constants to the program; returns their offset."""
        return self.program.constants.add(np.asarray(values, dtype))

    def _places_of(self, value: Value) -> Mapping[Geometry, _Place]:
        """Where a value is stored, by layout: as a part of its root, or on its own."""
        first = value.first_in_root
        parts = {
            geometry: _Place(buffer, start + first)
            for geometry, (buffer, start) in self._places.get(value.root, {}).items()
        }
        return {**parts, **self._places.get(value, {})}

    def _view(self, value: Value, geometry: Geometry) -> int:
        buffer, first = self._places_of(value)[geometry]
        return self.program.view(buffer, geometry, value.stored_channels, first)

    def _is_like_output(self, operand: Value, op: Op) -> bool:
        """Whether offsets of pixels are those of the output: tiles lie as far apart."""
        target = self._geometries[op.output.root]
        channels = self._places_of(operand)[target].buffer.channels
        return target.kind != TILES or channels == op.output.root.stored_channels

    def _separate(self, value: Value, geometry: Geometry) -> None:
        """Copy a part of a value, so that its tiles are next to each other."""
        source, buffer = self._view(value, geometry), Buffer(geometry, value.stored_channels)
        self._copy(value, source, self.program.view(buffer, geometry, value.stored_channels))
        self._places.setdefault(value, {})[geometry] = _Place(buffer)

    def _output_view(self, op: Op, geometry: Geometry) -> int:
        value, root = op.output, op.output.root
        places = self._places.setdefault(root, {})
        place = places.setdefault(geometry, _Place(Buffer(geometry, root.stored_channels)))
        first = place.first + value.first_in_root
        if isinstance(op, Copy):
            return self.program.view(
                place.buffer, geometry, op.source.stored_channels, first + op.first
            )
        return self.program.view(place.buffer, geometry, value.stored_channels, first)

    def _copy(self, value: Value, source: int, destination: int) -> None:
        if value.quantization is None:
            fields = (NONE, NONE, 1, 1, NONE, NONE, -INF, INF, Activation.NO_ACTIVATION)
            self.program.add(Opcode.COPY, source, destination, *fields)
        else:
            self.program.add(Opcode.BYTE_COPY, source, destination, 1, 1)
