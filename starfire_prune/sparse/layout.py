"""How intermediates lie in memory while a compiled model runs.

`TILES` serve 1x1 convolutions: the pixels of the flattened image go in tiles of up to 112, and a
tile holds those of all channels, so that it stays in the cache while output channels use it.
`PLANES` serve all that slides a window: each channel is padded once, and where the window moves in
steps, split into phases, so that the window moves by one in each of them.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import NamedTuple

__all__ = [
    "LANES",
    "PLANES",
    "TILES",
    "Geometry",
    "Window",
    "float_bits",
    "offset_of",
    "padded",
    "plain",
    "tiles",
]


LANES = 16  # floats that tiles and rows are counted in, on every machine
LARGEST_TILE = 112
PLANES, TILES = 0, 1


class Window(NamedTuple):
    """What a convolution or a pooling slides over an image; pairs are (vertical, horizontal).

    Attributes:
        size: of the window.
        stride: in which it moves.
        dilation: distance of its taps.
        before: padding above and left of the image.
        after: padding below and right of it that the window reaches.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def is_point(self) -> bool:
        """Whether it is one pixel, without padding."""
        return self.size == (1, 1) and not any((*self.before, *self.after))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How each channel of an image of `height` x `width` is stored.

    Attributes:
        kind: `PLANES` or `TILES`.
        height: of the image.
        width: of the image.
        tile: pixels a tile; 0 for planes.
        phases: vertical and horizontal ones; (1, 1) for tiles.
        before: padding above and to the left.
        row: floats from row to row of a phase.
        plane: floats from phase to phase.
        fill: what padding holds.
    """

    kind: int
    height: int
    width: int
    tile: int = 0
    phases: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    row: int = 0
    plane: int = 0
    fill: float = 0.0

    @property
    def channel(self) -> int:
        """Floats from channel to channel; for tiles, in all tiles together."""
        if self.kind == TILES:
            return self.tile * -(-self.height * self.width // self.tile)
        return math.prod(self.phases) * self.plane

    @property
    def slack(self) -> int:
        """Floats that kernels may read past the end."""
        return 20 * max(self.row, LANES) + 4 * LANES

    @property
    def is_padded(self) -> bool:
        """Whether there is padding that has to keep its value."""
        return self.kind == PLANES and self.channel != self.height * self.width

    def fields(self) -> list[int]:
        """The fields of the program's view, from `tile` to `plane`."""
        return [self.tile, *self.phases, *self.before, self.row, self.plane]


def plain(height: int, width: int) -> Geometry:
    """As torch stores a contiguous image."""
    return Geometry(PLANES, height, width, row=width, plane=height * width)


def tiles(height: int, width: int) -> Geometry:
    """Tiles of equal size, as large as they may be."""
    vectors = -(-height * width // LANES)
    number = -(-vectors * LANES // LARGEST_TILE)
    return Geometry(TILES, height, width, tile=LANES * -(-vectors // number))


def padded(height: int, width: int, window: Window, fill: float = 0.0) -> Geometry:
    """Planes for a window: padded, a phase for each step of its stride.

    The padding to the right of a row may be that to the left of the next one. Rows are of 16 or
    a multiple of it, or of 4 or 8, several of which fill a register. Planes of longer rows are 16
    longer than their rows, so that the same place in other channels is in other sets of a cache.
    """
    (above, left), (below, right) = window.before, window.after
    high, wide = window.stride
    shared = wide == 1 and right <= left
    columns = left + width if shared else -(-(left + width + right) // wide)
    rows = -(-(above + height + below) // high)
    row = next((size for size in (4, 8) if columns <= size), LANES * -(-columns // LANES))
    return Geometry(
        PLANES,
        height,
        width,
        phases=window.stride,
        before=window.before,
        row=row,
        plane=rows * row + (LANES if row > LANES else 0),
        fill=fill,
    )


def float_bits(value: float) -> int:
    """The bits of a 32-bit float."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def offset_of(geometry: Geometry, tap: tuple[int, int], dilation: tuple[int, int]) -> int:
    """Floats from a padded channel's first one to what a tap reads for the first output."""
    down, high = divmod(tap[0] * dilation[0], geometry.phases[0])
    across, wide = divmod(tap[1] * dilation[1], geometry.phases[1])
    phase = high * geometry.phases[1] + wide
    return phase * geometry.plane + down * geometry.row + across
