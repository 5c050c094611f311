"""A report as one self-contained HTML file, from the template `report.html.j2`."""

from __future__ import annotations

import base64
from typing import Final

import jinja2

from starfire_prune.reporting.document import Report

__all__ = ["html_text"]


_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("starfire_prune", "reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["base64"] = lambda data: base64.b64encode(data).decode()


def html_text(report: Report) -> str:
    """A report as an HTML page with its pictures inside, one for light and one for dark pages.

    All text is escaped. The page loads nothing and runs no script.
    """
    return _TEMPLATES.get_template("report.html.j2").render(report=report)
