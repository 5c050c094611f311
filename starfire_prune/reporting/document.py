"""What a report says, and how it is written in Markdown and CSV: one structure for all forms."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

__all__ = ["Grid", "Picture", "Report", "Section", "csv_text", "markdown_text"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: what it shows.
        header: of each column.
        rows: a cell a column, as it is written everywhere.
        left: the columns of words, which are aligned to the left.
        swatches: for each row the colour (None for the ink's) and the dashes of its lines in the
            pictures; none at all, or one a row.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)
    swatches: tuple[tuple[str | None, tuple[float, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its words.

    Attributes:
        name: of its file, without the ending.
        title: in a few words.
        caption: what one sees, of which runs.
        alt: what it shows, for those who don't see it.
        light, dark: PNG files' bytes, on a light and on a dark page.
        width, height: of both, in pixels.
    """

    name: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report under a heading.

    Attributes:
        heading: of the part.
        text: a paragraph before the rest; empty for none.
        grids: its tables.
        pictures: that follow them.
        folded: whether the tables are shown on demand only, where that is possible.
    """

    heading: str
    text: str = ""
    grids: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """A report in words, tables and pictures.

    Attributes:
        title: of the report.
        summary: sentences that tell the most important, each on its own.
        notes: sentences on what limits a comparison; often none.
        sections: in order.
        runs: the table with a line a run, which is the CSV file too.
    """

    title: str
    summary: tuple[str, ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    runs: Grid

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Of all sections."""
        return tuple(picture for section in self.sections for picture in section.pictures)


def csv_text(grid: Grid) -> str:
    r"""A table as comma-separated values, with empty cells where there is no number.

    Example:
        >>> csv_text(Grid("", ("run", "top-1"), (("a,b", "-"),)))
        'run,top-1\n"a,b",\n'
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(grid.header)
    writer.writerows(["" if cell == "-" else cell for cell in row] for row in grid.rows)
    return file.getvalue()


def markdown_text(report: Report) -> str:
    """A report in Markdown; its pictures are the PNG files beside it."""
    parts = [f"# {_plain(report.title)}"]
    parts += [_listed(report.summary)] if report.summary else []
    parts += ["\n".join(f"> {_plain(note)}  " for note in report.notes)] if report.notes else []
    for section in report.sections:
        parts.append(f"## {_plain(section.heading)}")
        parts += [_plain(section.text)] if section.text else []
        for grid in section.grids:
            parts += [f"{_plain(grid.caption)}", _table(grid)]
        for picture in section.pictures:
            parts.append(f"![{_plain(picture.alt)}]({picture.name}.png)")
            parts.append(f"**{_plain(picture.title)}.** {_plain(picture.caption)}")
    return "\n\n".join(parts) + "\n"


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(sentence)}" for sentence in sentences)


def _table(grid: Grid) -> str:
    rule = ["---" if index in grid.left else "---:" for index in range(len(grid.header))]
    lines = [[_plain(cell) for cell in row] for row in (grid.header, *grid.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _plain(text: str) -> str:
    """Text in which nothing is Markdown's, nor ends the line."""
    for sign in "\\`*_[]<>|#~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
