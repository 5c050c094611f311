"""Pictures of several runs: curves over epochs or epsilon, points of variants, bars of layers.

They need matplotlib: `pip install 'starfire-prune[plots]'`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from starfire_prune.engine.sparsity import LayerSparsity
from starfire_prune.reporting.curves import Curve, mean_curve
from starfire_prune.reporting.style import WIDTH_INCHES, Images, Line, Theme, rendered

__all__ = ["Points", "Series", "bars", "curves", "points", "shortened", "spread_positions"]


_LABEL_POINTS: Final = 8.5
_LABEL_INCHES: Final = _LABEL_POINTS * 1.25 / 72
_LETTER_INCHES: Final = 0.074  # of a label, on average
_LONGEST: Final = 22  # letters of a label
_KINDS: Final = {"3×3 and larger": "#0072b2", "1×1": "#56b4e9", "linear": "#e69f00"}


@dataclasses.dataclass(frozen=True)
class Series:
    """The curves of a variant, one a run."""

    label: str
    line: Line
    curves: tuple[Curve, ...]


@dataclasses.dataclass(frozen=True)
class Points:
    """The values of a variant, one a run.

    Attributes:
        label: of the variant.
        line: whose colour they have.
        filled: values that are shown as dots.
        hollow: values that are shown as rings, or as upright strokes.
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
    whole: bool = False,
    marked: bool = False,
) -> Images:
    """Draw the mean curve of each variant, a band from its lowest to its highest run behind it.

    Args:
        series: a variant each; their names stand at the ends of their curves.
        labels: of the axes, x and y.
        x_from: draw what comes from there on only.
        verticals: places of dotted upright lines.
        whole: let y go from 0 to 100.
        marked: mark the points that the curves join.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, height, right=_label_width([own.label for own in series]))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        for own in series:
            _draw_series(axes, own, theme, marked)
        for x in verticals:
            axes.axvline(x, color=theme.muted, lw=1, ls=":")
        _limit(axes, series, x_from, whole)
        _label_ends(axes, series, theme, height)

    height = max(3.5, 0.9 + 1.1 * _LABEL_INCHES * len(series))
    return rendered(draw, height)


def points(
    variants: Sequence[Points], label: str, legend: tuple[str, str], *, strokes: bool = False
) -> Images:
    """Draw two kinds of values of each variant, variants below each other.

    Args:
        variants: from top to bottom.
        label: of the x axis.
        legend: what filled and hollow marks are.
        strokes: draw the second kind as upright strokes rather than rings, from 0 to 100.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        names = [shortened(own.label) for own in variants]
        axes = _axes(figure, height, left=0.15 + _label_width(names), top=0.45)
        axes.set_yticks(range(len(variants)), names, fontsize=_LABEL_POINTS, color=theme.ink)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.spines["left"].set_visible(False)
        if strokes:
            axes.set_xlim(0, 100)
        mark = "|" if strokes else "o"
        for y, own in enumerate(variants):
            colour = own.line.colour_on(theme)
            edges = theme.ink if strokes else colour
            size, edge = (13, 1.6) if strokes else (8.5, 1.1)
            axes.plot(
                *(own.hollow, [y] * len(own.hollow), mark),
                ms=size,
                mew=edge,
                mfc="none",
                mec=edges,
            )
            axes.plot(own.filled, [y] * len(own.filled), "o", ms=5, mec="none", color=colour)
        _mark_legend(axes, theme, legend, mark)

    height = 1.0 + 0.27 * len(variants)
    return rendered(draw, height)


def bars(layers: Sequence[LayerSparsity], asked: float, colour: str | None = None) -> Images:
    """Draw the sparsity of each layer as a bar, as in the paper's Figure 5.

    Args:
        layers: in the model's order.
        asked: the sparsity asked for, in percent, as a dashed line.
        colour: of all bars; by default those of kinds of layers differ.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, 3.2, top=0.4)
        kinds = [_kind(layer) for layer in layers]
        colours = [colour or _KINDS[kind] for kind in kinds]
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


def spread_positions(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those wanted, in the same order, at least a gap apart, within low and high.

    Where there is no room for that, they are spread evenly from low to high.

    Example:
        >>> spread_positions([1.0, 1.0, 5.0], 1.0, 0.0, 10.0)
        [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    if len(wanted) > 1 and gap * (len(wanted) - 1) > high - low:
        gap = (high - low) / (len(wanted) - 1)
    groups: list[list[float]] = []  # sums of what is wanted less the offset in the group, counts
    for index in order:
        groups.append([wanted[index], 1])
        while len(groups) > 1 and _end(groups[-2], gap, low, high) > _start(
            groups[-1], gap, low, high
        ):
            total, count = groups.pop()
            groups[-1][0] += total - count * groups[-1][1] * gap
            groups[-1][1] += count
    placed = [
        _start(group, gap, low, high) + gap * step
        for group in groups
        for step in range(int(group[1]))
    ]
    by_index = dict(zip(order, placed, strict=True))
    return [by_index[index] for index in range(len(wanted))]


def shortened(label: str, longest: int = _LONGEST) -> str:
    """A label with its middle left out where it is too long.

    Example:
        >>> shortened("a-name-that-is-too-long-for-a-label", 12)
        'a-nam…-label'
    """
    if len(label) <= longest:
        return label
    tail = (longest - 1) // 2
    return f"{label[: longest - 1 - tail]}…{label[-tail:]}"


def _start(group: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the first of a group stands that is centred on what its members want."""
    total, count = group
    return min(max(total / count, low), high - gap * (count - 1))


def _end(group: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the next one after a group may stand."""
    return _start(group, gap, low, high) + gap * group[1]


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


def _draw_series(axes: Axes, series: Series, theme: Theme, marked: bool) -> None:
    colour = series.line.colour_on(theme)
    x, mean = mean_curve(series.curves)
    if len(series.curves) > 1:
        own = [dict(zip(*curve, strict=True)) for curve in series.curves]
        lowest = [min(points[at] for points in own) for at in x]
        highest = [max(points[at] for points in own) for at in x]
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.13, lw=0)
    mark = "o" if marked or len(x) < 2 else ""
    (line,) = axes.plot(x, mean, marker=mark, ms=3.5, color=colour, lw=1.6, label=series.label)
    line.set_clip_on(not marked)  # marks at the edges are whole
    if series.line.dashes:
        line.set_dashes(series.line.dashes)


def _limit(axes: Axes, series: Sequence[Series], x_from: float | None, whole: bool) -> None:
    all_x = [x for own in series for curve in own.curves for x in curve[0]]
    if not all_x:
        return
    first = min(all_x) if x_from is None else x_from
    last = max(all_x)
    seen = [
        y
        for own in series
        for curve in own.curves
        for x, y in zip(*curve, strict=True)
        if x >= first
    ]
    axes.set_xlim(first, last if last > first else first + 1)
    pad = 0.05 * (max(seen) - min(seen)) or 1.0
    axes.set_ylim(*((-2, 102) if whole else (min(seen) - pad, max(seen) + pad)))
    if all(x == int(x) for x in all_x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_ends(axes: Axes, series: Sequence[Series], theme: Theme, height: float) -> None:
    """Write the names of variants to the right of the axes, each joined to its curve's end."""
    means = [(own, mean_curve(own.curves)) for own in series]
    ends = [(own, x[-1], y[-1]) for own, (x, y) in means if x]
    low, high = axes.get_ylim()
    gap = _LABEL_INCHES * (high - low) / (height * axes.get_position().height)
    places = spread_positions([end[2] for end in ends], gap, low, high)
    left, right = axes.get_xlim()
    for (own, x, y), place in zip(ends, places, strict=True):
        colour = own.line.colour_on(theme)
        reach = right + 0.06 * (right - left)
        if x < right:  # it has ended before the others: nothing is drawn that looks like a value
            axes.plot([x, right], [y, y], color=colour, lw=0.8, ls=":")
        axes.plot([right, reach], [y, place], color=colour, lw=1, clip_on=False)
        text = shortened(own.label)
        at = (reach + 0.015 * (right - left), place)
        axes.text(*at, text, fontsize=_LABEL_POINTS, va="center", color=theme.ink)
    axes.set_xlim(left, right)


def _mark_legend(axes: Axes, theme: Theme, labels: tuple[str, str], mark: str) -> None:
    ink = theme.ink
    size = {"|": 11, "o": 8}[mark]
    handles = [
        Line2D([], [], color=ink, marker="o", ms=5, ls="", mec="none", label=labels[0]),
        Line2D([], [], color=ink, marker=mark, ms=size, ls="", mfc="none", label=labels[1]),
    ]
    _legend(axes, handles)


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=_LABEL_POINTS,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.2,
        handlelength=1.4,
    )


def _kind(layer: LayerSparsity) -> str:
    if layer.kind == "linear":
        return "linear"
    return "1×1" if all(side == 1 for side in layer.shape[2:]) else "3×3 and larger"


def _name_stages(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """Name the groups of neighbouring layers under their bars, apart by thin lines."""
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
