"""Builds programs for the native interpreter, in the format of native/program.h."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Geometry, float_bits
from starfire_prune.sparse.program_format import INPUT, MAGIC, OUTPUT, WORKSPACE, Opcode

__all__ = ["Buffer", "ConstantPool", "Program"]


class ConstantPool:
    """The bytes of a program's weights and indices."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint8]] = []
        self._size = 0

    def add(self, values: NDArray[Any]) -> int:
        """Append an array; returns its offset in bytes, a multiple of 64."""
        offset = self._size
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        gap = np.zeros(-len(data) % 64 + 64, np.uint8)  # kernels may read a little past the end
        self._parts += [data, gap]
        self._size += len(data) + len(gap)
        return offset

    def to_array(self) -> NDArray[np.uint8]:
        """All bytes."""
        return np.concatenate([np.zeros(0, np.uint8), *self._parts])


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory for an intermediate result, in the workspace or in a tensor of the caller.

    Attributes:
        geometry: Layout of each channel.
        channels: Number of channels.
        place: `WORKSPACE`, `INPUT` or `OUTPUT`.
        index: Index of the caller's tensor, or of the workspace slot once it is assigned.
        first: Operation that writes it.
        last: Operation that uses it last.
    """

    geometry: Geometry
    channels: int
    place: int = WORKSPACE
    index: int = -1
    first: int = -1
    last: int = -1

    @property
    def image(self) -> int:
        """Floats for each image."""
        return self.channels * self.geometry.channel


@dataclasses.dataclass(eq=False)
class _Slot:
    """Memory that several buffers use in turn; padded ones must have the same layout."""

    geometry: Geometry
    image: int
    slack: int
    until: int

    def is_free_for(self, buffer: Buffer) -> bool:
        padded = self.geometry.is_padded or buffer.geometry.is_padded
        compatible = not padded or self.geometry == buffer.geometry
        return compatible and self.until < buffer.first

    def fields(self) -> list[int]:
        return [self.image, self.slack, self.geometry.fill]


class Program:
    """A program under construction.

    Attributes:
        constants: The weights and indices of its operations.
    """

    def __init__(self) -> None:
        self.constants = ConstantPool()
        self._buffers: list[Buffer] = []
        self._views: list[tuple[Buffer, Geometry, int, int]] = []
        self._operations: list[list[int]] = []

    def view(self, buffer: Buffer, geometry: Geometry, channels: int, first: int = 0) -> int:
        """The number of a view of a buffer's channels, for use by the next operation.

        Args:
            buffer: The memory.
            geometry: The layout to read it in: the buffer's, unless it has been flattened.
            channels: Number of channels.
            first: First channel in the buffer.
        """
        if buffer not in self._buffers:
            self._buffers.append(buffer)
        now = len(self._operations)
        buffer.first = now if buffer.first < 0 else buffer.first
        buffer.last = now
        self._views.append((buffer, geometry, channels, first))
        return len(self._views) - 1

    def add(self, opcode: Opcode, *fields: int | float) -> None:
        """Append an operation; floats are stored as their bits."""
        numbers = [float_bits(f) if isinstance(f, float) else int(f) for f in fields]
        self._operations.append([opcode, *numbers])

    def to_array(self) -> NDArray[np.int64]:
        """The finished program, `(n,)`."""
        slots = self._assign_slots()
        places = [buffer.place for buffer in self._buffers]
        header = [MAGIC, len(slots), len(self._views), len(self._operations)]
        header += [places.count(INPUT), places.count(OUTPUT)]
        parts = [slot.fields() for slot in slots]
        parts += [self._view_fields(*view) for view in self._views]
        return np.array([*header, *(n for part in [*parts, *self._operations] for n in part)])

    def _assign_slots(self) -> list[_Slot]:
        slots: list[_Slot] = []
        for buffer in sorted(self._buffers, key=lambda buffer: buffer.first):
            if buffer.place == WORKSPACE:
                free = [slot for slot in slots if slot.is_free_for(buffer)]
                if not free:
                    slots.append(_Slot(buffer.geometry, 0, 0, -1))
                    free = slots[-1:]
                slot = min(free, key=lambda slot: abs(slot.image - buffer.image))
                slot.image = max(slot.image, buffer.image)
                slot.slack = max(slot.slack, buffer.geometry.slack)
                slot.until = buffer.last
                buffer.index = slots.index(slot)
        return slots

    def _view_fields(
        self, buffer: Buffer, geometry: Geometry, channels: int, first: int
    ) -> list[int]:
        total = buffer.image // geometry.channel
        return [
            *(geometry.kind, buffer.place, buffer.index, channels, first, total),
            *(geometry.height, geometry.width, *geometry.fields(), buffer.image),
        ]
