"""The style of a report's figures: two themes, and a palette for colour-blind readers.

They need matplotlib: `pip install 'starfire-prune[plots]'`.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from starfire_prune.reporting.document import Images

__all__ = [
    "DARK",
    "DENSE_LINE",
    "DPI",
    "LIGHT",
    "MOST_CURVES",
    "WIDTH_INCHES",
    "Line",
    "Theme",
    "lines_of",
    "rendered",
]


# At this width text of 10 points is legible on a phone, where a picture fills the screen's width
WIDTH_INCHES: Final = 4.8
DPI: Final = 200
MOST_CURVES: Final = 12  # in a picture; more are hard to distinguish
# Okabe and Ito's colours without black, which the ink replaces, and yellow, which is too pale
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES: Final[tuple[tuple[float, ...], ...]] = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a picture, the same as those of the page around it.

    Attributes:
        background: Background of page and picture.
        ink: Colour of names and of dense runs' lines.
        muted: Colour of the axes' labels.
        grid: Colour of the lines behind the data.
        kept: Colour of weights that a mask keeps.
    """

    background: str
    ink: str
    muted: str
    grid: str
    kept: str


LIGHT: Final = Theme(
    background="#ffffff", ink="#1d2126", muted="#59626c", grid="#e3e6ea", kept="#0072b2"
)
DARK: Final = Theme(
    background="#15191d", ink="#e6e9ec", muted="#a3adb7", grid="#2d353c", kept="#56b4e9"
)


@dataclasses.dataclass(frozen=True)
class Line:
    """The style of a variant's lines.

    Attributes:
        colour: A colour of the palette; None for the theme's ink, which dense runs have.
        dashes: Lengths of strokes and gaps, in line widths; empty for a solid line.
    """

    colour: str | None
    dashes: tuple[float, ...] = ()

    def colour_on(self, theme: Theme) -> str:
        """The colour with a theme."""
        return self.colour or theme.ink


DENSE_LINE: Final = Line(None)


def lines_of(methods: list[str]) -> list[Line]:
    """A line style for each variant's method; variants that prune have different ones.

    More than `MOST_CURVES` variants have a picture per method, so that only variants of the same
    method differ.

    Example:
        >>> [line.colour for line in lines_of(["dense", "ck", "ck"])]
        [None, '#0072b2', '#d55e00']
    """
    apart = len(methods) > MOST_CURVES
    lines: list[Line] = []
    counts: Counter[str] = Counter()
    for method in methods:
        is_dense = method == "dense"
        kind = method if apart or is_dense else "pruned"
        rounds, place = divmod(counts[kind], 1 if is_dense else len(_COLOURS))
        lines.append(Line(None if is_dense else _COLOURS[place], _DASHES[rounds % len(_DASHES)]))
        counts[kind] += 1
    return lines


def rendered(draw: Callable[[Figure, Theme], None], height_inches: float = 3.6) -> Images:
    """Draw a picture in both themes.

    Args:
        draw: A function that draws on a figure in the colours of a theme.
        height_inches: Height of the figure; its width is `WIDTH_INCHES`.
    """
    size = (WIDTH_INCHES, height_inches)
    light, dark = (_png(draw, theme, size) for theme in (LIGHT, DARK))
    return Images(light, dark, *(round(DPI * side) for side in size))


def _png(draw: Callable[[Figure, Theme], None], theme: Theme, size: tuple[float, float]) -> bytes:
    with matplotlib.rc_context(_settings(theme)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # in a run's name
        figure = Figure(figsize=size)
        draw(figure, theme)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return _with_palette(file)


def _with_palette(file: io.BytesIO) -> bytes:
    """A PNG of at most 256 colours: a third of the size, without a visible difference."""
    smaller = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "png")
    return smaller.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    coloured = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    inked = ("text.color", "axes.titlecolor")
    muted = ("axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(coloured, theme.background),
        **dict.fromkeys(inked, theme.ink),
        **dict.fromkeys(muted, theme.muted),
        "axes.edgecolor": theme.grid,
        "grid.color": theme.grid,
        "font.size": 9.5,
        "text.parse_math": False,  # in a run's name
        "axes.titlesize": 9.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.8,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
