"""Reads the logs in results/, and writes their numbers as Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@cache
def epochs_of(log: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, below results/."""
    text = (RESULTS / log).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def printed(log: str) -> str:
    """What a benchmark has printed."""
    return (RESULTS / log).read_text(encoding="utf-8")


def found(pattern: str, log: str) -> str:
    """The group of a pattern in what a benchmark has printed."""
    match = re.search(pattern, printed(log))
    if match is None:
        raise ValueError(f"{log} has nothing like {pattern}")
    return match[1]


def printed_table(first: str, log: str) -> str:
    """The table that begins so in what a benchmark has printed, as it stands there."""
    text = printed(log)
    start = text.index(f"| {first}")
    return text[start:].partition("\n\n")[0].rstrip("\n")


def last_top1(runs: str) -> list[float]:
    """Top-1 after the last epoch, of the logs that fit a pattern below results/."""
    logs = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.glob(runs))
    return [epochs_of(log)[-1]["top1"] for log in logs]


def mean_top1(runs: str) -> str:
    """Their mean."""
    return percent_text(statistics.mean(last_top1(runs)))


def cells_of(pattern: str, log: str) -> list[str]:
    """The cells of the first line of a table that fits a pattern, in what was printed."""
    line = found(f"({pattern})", log)
    return [cell.strip() for cell in line.strip("| ").split("|")]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def percent_text(share: float, digits: int = 2) -> str:
    """A share as a percentage."""
    return f"{share:.{digits}%}".replace("%", " %")


def mean_text(values: Iterable[float | None]) -> str:
    """The mean of the values that there are."""
    return f"{statistics.mean(value for value in values if value is not None):.2f}"


def points_text(value: float) -> str:
    """A difference of percentages."""
    return f"{value:+.2f}"
