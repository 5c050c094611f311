"""The table and the picture of tradeoff.py: accuracy against time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blocks import Mean, kept_runs
from inference_cases import FLOAT32, INT8
from logs import RESULTS, points_text, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

THREADS: Final = (1, 2)
RECORD: Final = RESULTS / "inference" / "tradeoff.json"
# By variant: its name in the table and beside its point
_DENSE: Final = {
    "dense": ("dense", "dense"),
    "dense-w75": ("dense, 3/4 of the channels", "3/4"),
    "dense-w50": ("dense, half of the channels", "1/2"),
}
PRUNED: Final = {
    "ck-80-1x1": ("CK 80 %, `[1, 1]`", "[1, 1]"),
    "ck-80-1x4": ("CK 80 %, `[1, 4]`", "[1, 4]"),
    "ck-80-4x4": ("CK 80 %, `[4, 4]`", "[4, 4]"),
}
VARIANTS: Final = {**_DENSE, **PRUNED}


@dataclass(frozen=True)
class Point:
    """A network in one precision: its time, the faster engine's, and its accuracy."""

    milliseconds: float
    engine: str
    top1: Mean


def points(threads: int) -> dict[tuple[str, str], Point]:
    """The networks that are timed and trained, by variant and precision."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = next(run["rows"] for run in record if run["threads"] == threads)
    found = {}
    for variant in VARIANTS:
        kept = kept_runs(variant).values()
        for precision in (FLOAT32, INT8):
            own = [row for row in rows if (row["method"], row["precision"]) == (variant, precision)]
            epochs = [run.floats if precision == FLOAT32 else run.int8 for run in kept]
            top1 = [100 * epoch["top1"] for epoch in epochs if epoch]
            if own and top1:
                row = min(own, key=lambda row: row["best_ms"])
                found[variant, precision] = Point(row["best_ms"], row["engine"], Mean.of(top1))
    return found


def tradeoff() -> str:
    """Time and accuracy of all networks, with times as multiples of the dense network's in int8."""
    by_threads = {threads: points(threads) for threads in THREADS}
    rows = []
    for (variant, precision), point in by_threads[1].items():
        cells = [VARIANTS[variant][0], precision]
        for threads in THREADS:
            own, dense = by_threads[threads][variant, precision], by_threads[threads]["dense", INT8]
            cells.append(f"{own.milliseconds:.3f}")
            cells.append(f"{own.milliseconds / dense.milliseconds:.2f}x")
        interval = f" ± {point.top1.half:.2f}" if point.top1.count > 1 else ""
        accuracy = f"{point.top1.value:.2f}{interval}"
        above = points_text(point.top1.value - by_threads[1]["dense", precision].top1.value)
        rows.append([*cells, accuracy, above, str(point.top1.count)])
    header = ["network", "precision", "1 thread [ms]", "of dense int8", "2 threads [ms]"]
    return table([*header, "of dense int8", "top-1 [%]", "to dense", "seeds"], rows)


def draw(path: Path) -> None:
    """Draw accuracy against time on one thread."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    found = points(1)
    for precision, colour in ((FLOAT32, "#8a8a8a"), (INT8, "#0b6fb8")):
        _draw_line(axes, found, _DENSE, precision, colour, "o--")
        _draw_line(axes, found, PRUNED, precision, colour, "s-")
    axes.set_xscale("log")
    ticks = (0.1, 0.15, 0.2, 0.3, 0.4)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of an image on one thread [ms], the fastest engine (logarithmic)")
    axes.set_ylabel("top-1 on 10,000 test images [%]")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_line(
    axes: Axes,
    found: Mapping[tuple[str, str], Point],
    variants: Mapping[str, tuple[str, str]],
    precision: str,
    colour: str,
    style: str,
) -> None:
    """Draw the networks of a kind in one precision, with the standard errors of their means."""
    own = [
        (variants[name][1], found[name, precision])
        for name in variants
        if (name, precision) in found
    ]
    kind = "dense, of fewer channels" if variants is _DENSE else "80 % pruned"
    axes.errorbar(
        [point.milliseconds for _, point in own],
        [point.top1.value for _, point in own],
        yerr=[point.top1.error if point.top1.count > 1 else 0.0 for _, point in own],
        fmt=style,
        color=colour,
        lw=1.2,
        ms=5,
        capsize=2,
        label=f"{kind}, {precision}",
    )
    for label, point in own:
        at = (point.milliseconds, point.top1.value)
        axes.annotate(label, at, (5, 5), textcoords="offset points", fontsize=8, color=colour)
