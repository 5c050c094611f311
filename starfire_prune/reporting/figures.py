"""Figures of several runs: curves over epochs or epsilon, points of variants, bars of layers.

They need matplotlib: `pip install 'starfire-prune[plots]'`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from starfire_prune.engine.sparsity import LayerSparsity
from starfire_prune.reporting.curves import Curve, mean_curve
from starfire_prune.reporting.document import Images
from starfire_prune.reporting.style import WIDTH_INCHES, Line, Theme, rendered

__all__ = ["Points", "Series", "bars", "curves", "points", "shortened"]


_LABEL_POINTS: Final = 8.5
_LETTER_INCHES: Final = 0.074  # average width of a letter in a label
_HEIGHT: Final = 3.5  # inches of a figure of curves
_LONGEST: Final = 22  # most letters of a label
_LEGEND: Final[Mapping[str, Any]] = {
    "bbox_to_anchor": (1.0, 1.0),
    "frameon": False,
    "fontsize": _LABEL_POINTS,
    "handletextpad": 0.4,
    "columnspacing": 1.2,
    "borderaxespad": 0.2,
    "handlelength": 1.4,
}
_KINDS: Final = {"3×3 and larger": "#0072b2", "1×1": "#56b4e9", "linear": "#e69f00"}


@dataclasses.dataclass(frozen=True)
class Series:
    """The curves of a variant, one per run."""

    label: str
    line: Line
    curves: tuple[Curve, ...]


@dataclasses.dataclass(frozen=True)
class Points:
    """The values of a variant, one per run.

    Attributes:
        label: Name of the variant.
        line: The line whose colour the marks have.
        filled: Values that are shown as dots.
        hollow: Values that are shown as rings, or as upright strokes.
    """

    label: str
    line: Line
    filled: tuple[float, ...]
    hollow: tuple[float, ...]


def curves(
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    x_from: float | None = None,
    verticals: Sequence[float] = (),
    to_100: bool = False,
    marked: bool = False,
) -> Images:
    """Draw the mean curve of each variant over a band from its lowest to its highest run.

    Args:
        series: The variants.
        labels: Labels of the x and the y axis.
        x_from: The lowest x that is shown; default: the lowest of the curves.
        verticals: The x of dotted vertical lines.
        to_100: Show y from 0 to 100.
        marked: Mark the points of the curves.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, _HEIGHT, right=0.15 + _label_width([one.label for one in series]))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        lines = [_draw_series(axes, one, theme, marked) for one in series]
        for x in verticals:
            axes.axvline(x, color=theme.muted, lw=1, ls=":")
        _limit(axes, series, x_from, to_100)
        _name_curves(axes, series, lines)

    return rendered(draw, _HEIGHT)


def points(
    variants: Sequence[Points], label: str, legend: tuple[str, str], *, strokes: bool = False
) -> Images:
    """Draw two kinds of values for each variant, in a row per variant.

    Args:
        variants: The variants, from top to bottom.
        label: Label of the x axis.
        legend: Names of the filled and of the hollow marks.
        strokes: Draw hollow marks as upright strokes, on an x axis from 0 to 100.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        names = [shortened(variant.label) for variant in variants]
        axes = _axes(figure, height, left=0.15 + _label_width(names), top=0.45)
        axes.set_yticks(range(len(variants)), names, fontsize=_LABEL_POINTS, color=theme.ink)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.spines["left"].set_visible(False)
        if strokes:
            axes.set_xlim(0, 100)
        mark = "|" if strokes else "o"
        for y, variant in enumerate(variants):
            colour = variant.line.colour_on(theme)
            edges = theme.ink if strokes else colour
            size, edge = (13, 1.6) if strokes else (8.5, 1.1)
            axes.plot(
                *(variant.hollow, [y] * len(variant.hollow), mark),
                ms=size,
                mew=edge,
                mfc="none",
                mec=edges,
            )
            axes.plot(
                variant.filled, [y] * len(variant.filled), "o", ms=5, mec="none", color=colour
            )
        _mark_legend(axes, theme, legend, mark)

    height = 1.0 + 0.27 * len(variants)
    return rendered(draw, height)


def bars(layers: Sequence[LayerSparsity], asked: float) -> Images:
    """Draw the sparsity of each layer as a bar, as in the paper's Figure 5.

    Args:
        layers: The layers in the model's order.
        asked: The sparsity asked for, in percent, drawn as a dashed line.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, 3.2, top=0.4)
        kinds = [_kind(layer) for layer in layers]
        colours = [_KINDS[kind] for kind in kinds]
        axes.bar(range(len(layers)), [100 * layer.sparsity for layer in layers], 0.8, color=colours)
        axes.axhline(asked, color=theme.ink, lw=1, ls="--")
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.set_ylabel("zero weights [%]")
        axes.grid(visible=False, axis="x")
        _name_stages(axes, [layer.name for layer in layers], theme)
        handles = [
            Line2D([], [], color=_KINDS[kind], marker="s", ls="", label=kind)
            for kind in _KINDS
            if kind in kinds
        ]
        handles.append(Line2D([], [], color=theme.ink, lw=1, ls="--", label="asked for"))
        _legend(axes, handles)

    return rendered(draw, 3.2)


def shortened(label: str, longest: int = _LONGEST) -> str:
    """A label, without its middle if it is too long.

    Example:
        >>> shortened("a-name-that-is-too-long-for-a-label", 12)
        'a-name…label'
    """
    if len(label) <= longest:
        return label
    tail = (longest - 1) // 2
    return f"{label[: longest - 1 - tail]}…{label[-tail:]}"


def _axes(
    figure: Figure, height: float, *, left: float = 0.6, right: float = 0.12, top: float = 0.12
) -> Axes:
    """Axes with margins in inches."""
    bottom = 0.5
    box = (
        left / WIDTH_INCHES,
        bottom / height,
        1 - (left + right) / WIDTH_INCHES,
        1 - (bottom + top) / height,
    )
    return figure.add_axes(box)


def _label_width(labels: Sequence[str]) -> float:
    return 0.36 + _LETTER_INCHES * max((len(shortened(label)) for label in labels), default=0)


def _draw_series(axes: Axes, series: Series, theme: Theme, marked: bool) -> Line2D:
    colour = series.line.colour_on(theme)
    x, mean = mean_curve(series.curves)
    if len(series.curves) > 1:
        runs = [dict(zip(*curve, strict=True)) for curve in series.curves]
        lowest = [min(points[at] for points in runs) for at in x]
        highest = [max(points[at] for points in runs) for at in x]
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.13, lw=0)
    mark = "o" if marked or len(x) < 2 else ""
    (line,) = axes.plot(x, mean, marker=mark, ms=3.5, color=colour, lw=1.6, label=series.label)
    line.set_clip_on(not marked)  # so that marks at the edges are complete
    if series.line.dashes:
        line.set_dashes(series.line.dashes)
    return line


def _limit(axes: Axes, series: Sequence[Series], x_from: float | None, to_100: bool) -> None:
    all_x = [x for one in series for curve in one.curves for x in curve[0]]
    if not all_x:
        return
    first = min(all_x) if x_from is None else x_from
    last = max(all_x)
    seen = [
        y
        for one in series
        for curve in one.curves
        for x, y in zip(*curve, strict=True)
        if x >= first
    ]
    axes.set_xlim(first, last if last > first else first + 1)
    pad = 0.05 * (max(seen) - min(seen)) or 1.0
    axes.set_ylim(*((-2, 102) if to_100 else (min(seen) - pad, max(seen) + pad)))
    if all(x == int(x) for x in all_x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_curves(axes: Axes, series: Sequence[Series], lines: Sequence[Line2D]) -> None:
    """Name the variants to the right of the axes, the highest last value first."""
    ends = [mean_curve(one.curves)[1][-1:] for one in series]
    order = sorted(range(len(series)), key=lambda index: ends[index], reverse=True)
    axes.legend(
        [lines[index] for index in order],
        [shortened(series[index].label) for index in order],
        **{**_LEGEND, "loc": "upper left", "borderaxespad": 0.5},
    )


def _mark_legend(axes: Axes, theme: Theme, labels: tuple[str, str], mark: str) -> None:
    ink = theme.ink
    size = {"|": 11, "o": 8}[mark]
    handles = [
        Line2D([], [], color=ink, marker="o", ms=5, ls="", mec="none", label=labels[0]),
        Line2D([], [], color=ink, marker=mark, ms=size, ls="", mfc="none", label=labels[1]),
    ]
    _legend(axes, handles)


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.legend(handles=handles, **_LEGEND, loc="lower right", ncols=len(handles))


def _kind(layer: LayerSparsity) -> str:
    if layer.kind == "linear":
        return "linear"
    return "1×1" if all(side == 1 for side in layer.shape[2:]) else "3×3 and larger"


def _name_stages(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """Name the groups of neighbouring layers under their bars, with thin lines between them."""
    depth = next((d for d in (1, 2) if len({_stage(name, d) for name in names}) > 2), 1)
    start, centres, stages = 0, [], []
    for stage, members in itertools.groupby(names, lambda name: _stage(name, depth)):
        count = len(list(members))
        centres.append(start + (count - 1) / 2)
        stages.append(shortened(stage, 12))
        start += count
        if start < len(names):
            axes.axvline(start - 0.5, color=theme.muted, lw=0.6)
    crowded = len(stages) > 7
    axes.set_xticks(
        centres,
        stages,
        fontsize=_LABEL_POINTS - crowded,
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
    )


def _stage(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])
