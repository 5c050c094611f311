"""Text of messages and tables: enumerations, suggestions, numbers, columns."""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Container, Iterable, Sequence
from typing import Final

__all__ = [
    "ABSENT",
    "NUMBER",
    "did_you_mean",
    "first_few",
    "first_line",
    "format_columns",
    "listed",
    "mean_of",
    "nearest",
    "number_text",
    "spread_text",
]

NUMBER: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
"""A decimal number as YAML 1.2 writes it."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """Enumerate names in sorted order, and only count those after the first few.

    Example:
        >>> listed(["c", "b", "a"], most=2)
        'a, b and 1 more'
    """
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Enumerate names in their order, and only count those after the first few.

    Example:
        >>> first_few(["c", "b", "a"], most=2)
        'c, b and 1 more'
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """The end of an error about a wrong name: the nearest valid one, or nothing if none is near.

    Example:
        >>> did_you_mean("amuont", ["amount", "era"])
        '; did you mean amount?'
    """
    near = nearest(value, names)
    return "" if near is None else f"; did you mean {near}?"


def nearest(value: object, names: Iterable[str]) -> str | None:
    """The valid name that a wrong one resembles most; None if none is near.

    Example:
        >>> nearest("modle", ["model", "data"])
        'model'
    """
    near = difflib.get_close_matches(str(value).lower(), list(names), n=1)
    return near[0] if near else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has no message.

    Example:
        >>> first_line(ValueError("no\\nyes")), first_line(KeyboardInterrupt())
        ('no', 'KeyboardInterrupt')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def format_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int] = (0,)
) -> str:
    """Lines of a table: its header, a rule and the rows, in columns two spaces apart.

    Args:
        header: Heading of each column.
        rows: Rows with one cell per column.
        left: Indices of the columns that are aligned to the left.

    Example:
        >>> print(format_columns(("run", "top1"), [("ck", "75.33")]))
        run   top1
        ---  -----
        ck   75.33
    """
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, rule, *rows]
    )


ABSENT: Final = "-"
"""The text of a missing number."""


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among values; None where there are none.

    Example:
        >>> mean_of([1.0, None, 2.0])
        1.5
    """
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def number_text(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """Format a number, or `-` for None.

    Example:
        >>> number_text(60.004), number_text(-0.001, sign=True), number_text(None)
        ('60.00', '+0.00', '-')
    """
    if value is None:
        return ABSENT
    rounded = round(value, digits) + 0.0  # not -0.0
    return f"{rounded:+.{digits}f}" if sign else f"{rounded:.{digits}f}"


def spread_text(
    values: Iterable[float | None], runs: int, digits: int = 2, *, sign: bool = False
) -> str:
    """Format the mean and the standard deviation over several runs.

    Args:
        values: Value of each run; None for a run without one.
        runs: Number of runs; it appears in the text if fewer have a value.
        digits: Number of digits after the decimal point.
        sign: Write a plus sign before positive numbers.

    Example:
        >>> spread_text([50.0, 52.0], 2), spread_text([50.0, None], 2), spread_text([], 2)
        ('51.00 ± 1.41', '50.00 (1 of 2)', '-')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    text = number_text(statistics.mean(known), digits, sign=sign)
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return text if len(known) == runs else f"{text} ({len(known)} of {runs})"
