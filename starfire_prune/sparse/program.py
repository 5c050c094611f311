"""Programs of the native interpreter: what native/program.h describes, put together."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.layout import Geometry, float_bits

__all__ = ["ARENA", "INPUT", "OUTPUT", "Buffer", "Code", "Constants", "Program"]


MAGIC = 0x5354415246495245
ARENA, INPUT, OUTPUT = 0, 1, 2


class Code:
    """Numbers of the operations."""

    COPY, POINT, BLOCK, POOL, MEAN, LINEAR = range(1, 7)


class Constants:
    """The blob that holds a program's weights and indices."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint8]] = []
        self._size = 0

    def add(self, values: NDArray[Any]) -> int:
        """Append an array; returns its position in bytes, a multiple of 64."""
        position = self._size
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        gap = np.zeros(-len(data) % 64 + 64, np.uint8)  # kernels may read a little past an end
        self._parts += [data, gap]
        self._size += len(data) + len(gap)
        return position

    def joined(self) -> NDArray[np.uint8]:
        """All of them."""
        return np.concatenate([np.zeros(0, np.uint8), *self._parts])


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory for an intermediate, in the arena or of the caller.

    Attributes:
        geometry: of each channel.
        channels: how many.
        place: `ARENA`, `INPUT` or `OUTPUT`.
        index: of the caller's tensor; of the slot, once there is one.
        first: operation that writes it.
        last: operation that uses it last.
    """

    geometry: Geometry
    channels: int
    place: int = ARENA
    index: int = -1
    first: int = -1
    last: int = -1

    @property
    def image(self) -> int:
        """Floats for each image."""
        return self.channels * self.geometry.channel


@dataclasses.dataclass(eq=False)
class _Slot:
    """Memory that buffers use one after another; padding is kept by such as have the same."""

    geometry: Geometry
    image: int
    slack: int
    until: int

    def takes(self, buffer: Buffer) -> bool:
        padded = self.geometry.is_padded or buffer.geometry.is_padded
        alike = not padded or self.geometry == buffer.geometry
        return alike and self.until < buffer.first

    def fields(self) -> list[int]:
        return [self.image, self.slack, float_bits(self.geometry.fill)]


class Program:
    """A program while it grows.

    Attributes:
        constants: what its operations refer to.
    """

    def __init__(self) -> None:
        self.constants = Constants()
        self._buffers: list[Buffer] = []
        self._views: list[tuple[Buffer, Geometry, int, int]] = []
        self._operations: list[list[int]] = []

    def view(self, buffer: Buffer, geometry: Geometry, channels: int, first: int = 0) -> int:
        """The number of a view of some of a buffer's channels, to be used by the next operation.

        Args:
            buffer: the memory.
            geometry: how it is read; that of the buffer, unless it has been flattened.
            channels: how many.
            first: of them in the buffer.
        """
        if buffer not in self._buffers:
            self._buffers.append(buffer)
        now = len(self._operations)
        buffer.first = now if buffer.first < 0 else buffer.first
        buffer.last = now
        self._views.append((buffer, geometry, channels, first))
        return len(self._views) - 1

    def add(self, code: int, *fields: int | float) -> None:
        """Append an operation; floats become their bits."""
        numbers = [float_bits(f) if isinstance(f, float) else int(f) for f in fields]
        self._operations.append([code, *numbers])

    def words(self) -> NDArray[np.int64]:
        """The finished program."""
        slots = self._slots()
        places = [buffer.place for buffer in self._buffers]
        header = [MAGIC, len(slots), len(self._views), len(self._operations)]
        header += [places.count(INPUT), places.count(OUTPUT)]
        parts = [slot.fields() for slot in slots]
        parts += [self._view_fields(*view) for view in self._views]
        return np.array([*header, *(n for part in [*parts, *self._operations] for n in part)])

    def _slots(self) -> list[_Slot]:
        slots: list[_Slot] = []
        for buffer in sorted(self._buffers, key=lambda buffer: buffer.first):
            if buffer.place == ARENA:
                free = [slot for slot in slots if slot.takes(buffer)]
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
