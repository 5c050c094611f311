"""The contents of a report, and their forms in Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

from starfire_prune.utils.text import ABSENT

__all__ = ["Grid", "Images", "Picture", "Report", "Section", "csv_text", "markdown_text"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: What the table shows.
        header: Headings of the columns.
        rows: The text of the cells, a tuple per row.
        left: Indices of the columns of words, which are left-aligned.
        swatches: For each row the colour (None for the text's) and the dashes of its lines in the
            pictures; empty for a table without them.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)
    swatches: tuple[tuple[str | None, tuple[float, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Images:
    """A picture as PNG files, for a light and for a dark page.

    Attributes:
        light, dark: The files' bytes.
        width, height: Size of both, in pixels.
    """

    light: bytes
    dark: bytes
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its title, caption and description.

    Attributes:
        name: Name of its file, without the ending.
        title: Title, in a few words.
        caption: What the picture shows, and of which runs.
        alt: Description for readers who don't see the picture.
        images: The picture itself.
    """

    name: str
    title: str
    caption: str
    alt: str
    images: Images


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report under a heading.

    Attributes:
        heading: Heading of the section.
        text: A paragraph before the tables; empty for none.
        grids: Tables of the section.
        pictures: Pictures after the tables.
        collapsed: Whether the tables are collapsed until a reader opens them, in HTML.
    """

    heading: str
    text: str = ""
    grids: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()
    collapsed: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of a report.

    Attributes:
        title: Title of the report.
        summary: Sentences with the most important results.
        caveats: Sentences on what limits a comparison; often none.
        sections: Sections in their order.
        runs: The table with a line per run, which is also the CSV file.
    """

    title: str
    summary: tuple[str, ...]
    caveats: tuple[str, ...]
    sections: tuple[Section, ...]
    runs: Grid

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.sections)} sections, {len(self.runs.rows)} runs)"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures of all sections."""
        return tuple(picture for section in self.sections for picture in section.pictures)


def csv_text(grid: Grid) -> str:
    r"""A table as comma-separated values, with empty cells for absent numbers.

    Example:
        >>> csv_text(Grid("", ("run", "top-1"), (("a,b", "-"),)))
        'run,top-1\n"a,b",\n'
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(grid.header)
    writer.writerows(["" if cell == ABSENT else cell for cell in row] for row in grid.rows)
    return file.getvalue()


def markdown_text(report: Report, pictures: str) -> str:
    """A report in Markdown.

    Args:
        report: The report.
        pictures: Folder of the pictures' PNG files, relative to the Markdown file.
    """
    parts = [f"# {_plain(report.title)}"]
    if report.summary:
        parts.append(_bullets(report.summary))
    if report.caveats:
        parts.append("\n".join(f"> {_plain(caveat)}  " for caveat in report.caveats))
    for section in report.sections:
        parts.append(f"## {_plain(section.heading)}")
        parts += [_plain(section.text)] if section.text else []
        for grid in section.grids:
            parts += [f"{_plain(grid.caption)}", _table(grid)]
        for picture in section.pictures:
            parts.append(f"![{_plain(picture.alt)}]({pictures}/{picture.name}.png)")
            parts.append(f"**{_plain(picture.title)}.** {_plain(picture.caption)}")
    return "\n\n".join(parts) + "\n"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(sentence)}" for sentence in sentences)


def _table(grid: Grid) -> str:
    rule = ["---" if index in grid.left else "---:" for index in range(len(grid.header))]
    lines = [[_plain(cell) for cell in row] for row in (grid.header, *grid.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _plain(text: str) -> str:
    """Text in one line, with Markdown's characters escaped."""
    for sign in "\\`*_[]<>|#~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
