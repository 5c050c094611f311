"""Read the logs in results/, and write their numbers as Markdown."""

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
    """The objects of a run's `metrics.jsonl`, a path relative to results/."""
    text = (RESULTS / log).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def printed(log: str) -> str:
    """The output of a benchmark."""
    return (RESULTS / log).read_text(encoding="utf-8")


def found(pattern: str, log: str) -> str:
    """The group of a pattern in the output of a benchmark."""
    match = re.search(pattern, printed(log))
    if match is None:
        raise ValueError(f"{log} has no match for {pattern}")
    return match[1]


def printed_table(first: str, log: str) -> str:
    """The table in the output of a benchmark whose header begins with `first`."""
    text = printed(log)
    start = text.index(f"| {first}")
    return text[start:].partition("\n\n")[0].rstrip("\n")


def last_top1(runs: str) -> list[float]:
    """Top-1 after the last epoch, for the logs that match a pattern relative to results/."""
    logs = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.glob(runs))
    return [epochs_of(log)[-1]["top1"] for log in logs]


def mean_top1(runs: str) -> str:
    """The mean of `last_top1` as a percentage."""
    return percent_text(statistics.mean(last_top1(runs)))


def cells_of(pattern: str, log: str) -> list[str]:
    """The cells of the first line that matches a pattern, in the output of a benchmark."""
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
    """The mean of the values that are not None."""
    return f"{statistics.mean(value for value in values if value is not None):.2f}"


def points_text(value: float) -> str:
    """A difference of percentages."""
    return f"{value:+.2f}"
