"""Memory layouts of intermediate results.

Sizes are in lanes of 32 bits: floats, or the bytes of four channels of a quantized value (a quad).

`TILES` are for 1x1 convolutions: the flattened image is cut into tiles of up to 112 pixels, and a
tile has the pixels of all channels, so that it stays in the cache while all output channels use it.
`PLANES` are for sliding windows: each channel is padded once and, where the window has a stride,
split into phases, so that within each phase the window moves by one.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import NamedTuple

from starfire_prune.sparse.program_format import LANES, MAX_TILE, PLANES, TILES

__all__ = ["Geometry", "Window", "float_bits", "offset_of", "padded", "plain", "tiles"]


class Window(NamedTuple):
    """The window of a convolution or a pooling; pairs are (vertical, horizontal).

    Attributes:
        size: Number of taps.
        stride: Distance of neighbouring outputs, in pixels.
        dilation: Distance of neighbouring taps, in pixels.
        before: Padding above and left of the image.
        after: Padding below and right of the image that the window reaches.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        """Whether it is one pixel, without padding."""
        return self.size == (1, 1) and not any((*self.before, *self.after))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The memory layout of each channel of an image.

    Attributes:
        kind: `PLANES` or `TILES`.
        height: Height of the image.
        width: Width of the image.
        tile: Pixels per tile; 0 for planes.
        phases: Number of vertical and horizontal phases; (1, 1) for tiles.
        before: Padding above and to the left.
        row: Floats from row to row of a phase.
        plane: Floats from phase to phase.
        fill: Bits of the padding's lanes.
    """

    kind: int
    height: int
    width: int
    tile: int = 0
    phases: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    row: int = 0
    plane: int = 0
    fill: int = 0

    @property
    def channel(self) -> int:
        """Floats per channel; for tiles, the sum over all tiles."""
        if self.kind == TILES:
            return self.tile * -(-self.height * self.width // self.tile)
        return math.prod(self.phases) * self.plane

    @property
    def slack(self) -> int:
        """Floats that kernels may read past the end."""
        return 20 * max(self.row, LANES) + 4 * LANES

    @property
    def is_padded(self) -> bool:
        """Whether there is padding, which must keep its value."""
        return self.kind == PLANES and self.channel != self.height * self.width

    def fields(self) -> list[int]:
        """The fields of the program's view, from `tile` to `plane`."""
        return [self.tile, *self.phases, *self.before, self.row, self.plane]


def plain(height: int, width: int) -> Geometry:
    """The layout of a contiguous image in torch."""
    return Geometry(PLANES, height, width, row=width, plane=height * width)


def tiles(height: int, width: int) -> Geometry:
    """Tiles of equal size, as large as allowed."""
    vectors = -(-height * width // LANES)
    number = -(-vectors * LANES // MAX_TILE)
    return Geometry(TILES, height, width, tile=LANES * -(-vectors // number))


def padded(height: int, width: int, window: Window, fill: int = 0) -> Geometry:
    """Planes for a window: padded, with a phase for each step of its stride.

    The padding to the right of a row may serve as the padding to the left of the next one. A row
    has 4 or 8 floats, several of which fill a register, or a multiple of 16. Planes of longer rows
    have 16 additional floats, so that the same place in other channels is in other cache sets.

    Args:
        height: Height of the image.
        width: Width of the image.
        window: The window.
        fill: Bits of the padding's lanes.
    """
    (above, left), (below, right) = window.before, window.after
    stride_h, stride_w = window.stride
    shared = stride_w == 1 and right <= left
    columns = left + width if shared else -(-(left + width + right) // stride_w)
    rows = -(-(above + height + below) // stride_h)
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
    """Floats from the start of a padded channel to the input of a tap for the first output."""
    row, phase_h = divmod(tap[0] * dilation[0], geometry.phases[0])
    column, phase_w = divmod(tap[1] * dilation[1], geometry.phases[1])
    phase = phase_h * geometry.phases[1] + phase_w
    return phase * geometry.plane + row * geometry.row + column
