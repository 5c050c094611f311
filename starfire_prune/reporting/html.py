"""A report as one HTML file that needs nothing beside it, for screens of any width."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from importlib import resources

from starfire_prune.reporting.document import Grid, Picture, Report, Section

__all__ = ["html_text"]


def html_text(report: Report) -> str:
    """A report as an HTML page: pictures are within it, on a light and on a dark page theirs.

    Names are escaped; nothing is loaded and no script runs.
    """
    sections = "\n".join(_section(section, index) for index, section in enumerate(report.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(report.title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_text(report.title)}</h1>
{_list(report.summary, "summary")}
{_notes(report.notes)}</header>
{sections}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _list(sentences: Iterable[str], kind: str) -> str:
    items = "\n".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">\n{items}\n</ul>' if items else ""


def _notes(notes: tuple[str, ...]) -> str:
    if not notes:
        return ""
    return f'<aside aria-label="Notes">\n{_list(notes, "notes")}\n</aside>\n'


def _section(section: Section, index: int) -> str:
    heading = f"heading-{index}"
    parts = [f'<section aria-labelledby="{heading}">', f'<h2 id="{heading}">']
    parts[-1] += f"{_text(section.heading)}</h2>"
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    for number, grid in enumerate(section.grids):
        parts.append(_grid(grid, f"table-{index}-{number}", section.folded))
    if section.pictures:
        parts.append('<div class="pictures">')
        parts += [_picture(picture) for picture in section.pictures]
        parts.append("</div>")
    return "\n".join([*parts, "</section>"])


def _grid(grid: Grid, name: str, folded: bool) -> str:
    """A table in a box that scrolls sideways by itself, by the keyboard too."""
    rows = "\n".join(_row(grid, index) for index in range(len(grid.rows)))
    header = "".join(
        f'<th scope="col"{_aligned(grid, column)}>{_text(cell)}</th>'
        for column, cell in enumerate(grid.header)
    )
    table = f"""<div class="table" role="region" tabindex="0" aria-labelledby="{name}">
<table>
<thead><tr>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""
    caption = _text(grid.caption)
    if folded:
        return f'<details>\n<summary id="{name}">{caption}</summary>\n{table}\n</details>'
    return f'<p class="caption" id="{name}">{caption}</p>\n{table}'


def _row(grid: Grid, index: int) -> str:
    first, *rest = grid.rows[index]
    swatch = _swatch(*grid.swatches[index]) if grid.swatches else ""
    cells = "".join(
        f"<td{_aligned(grid, column)}>{_text(cell)}</td>" for column, cell in enumerate(rest, 1)
    )
    long = " long" if len(first) > _LONG_NAME else ""
    name = f'<span class="name">{swatch}<span>{_text(first)}</span></span>'
    return f'<tr><th scope="row" class="words{long}">{name}</th>{cells}</tr>'


def _aligned(grid: Grid, column: int) -> str:
    return ' class="words"' if column in grid.left else ""


def _swatch(colour: str | None, dashes: tuple[float, ...]) -> str:
    """The line of a variant in the pictures, beside its name."""
    dashed = (
        f' stroke-dasharray="{" ".join(f"{2.5 * part:g}" for part in dashes)}"' if dashes else ""
    )
    return (
        f'<svg class="swatch" width="24" height="8" aria-hidden="true"><line x1="0" y1="4" x2="24" '
        f'y2="4" stroke="{colour or "currentColor"}" stroke-width="3"{dashed}/></svg>'
    )


def _picture(picture: Picture) -> str:
    light, dark = (base64.b64encode(image).decode() for image in (picture.light, picture.dark))
    return f"""<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">
<img src="data:image/png;base64,{light}" width="{picture.width}" height="{picture.height}" \
alt="{_text(picture.alt)}">
</picture>
<figcaption><strong>{_text(picture.title)}.</strong> {_text(picture.caption)}</figcaption>
</figure>"""


_LONG_NAME = 22  # letters from which on a name may break on a narrow screen
_FOLDER = resources.files("starfire_prune.reporting")
_STYLE = _FOLDER.joinpath("report.css").read_text(encoding="utf-8")
