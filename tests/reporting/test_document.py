"""A report in Markdown, CSV and HTML: the same numbers, with all text escaped."""

import csv
import html
import io
import re

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from starfire_prune.reporting.document import (
    Grid,
    Images,
    Picture,
    Report,
    Section,
    csv_text,
    markdown_text,
)
from starfire_prune.reporting.html import html_text

EVIL = '<script>alert("x")</script> | `a` & *b*'
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs"))).filter(lambda text: text != "-")
GRID = Grid(
    "Runs",
    ("run", "top-1 [%]"),
    (("ck", "75.00"), (EVIL, "-")),
    swatches=(("#0072b2", ()), (None, (5, 2))),
)
PICTURE = Picture("masks", EVIL, EVIL, EVIL, Images(b"light", b"dark", 960, 720))
REPORT = Report(
    EVIL,
    (EVIL, "Two runs."),
    (EVIL,),
    (
        Section("Results", EVIL, (GRID,), (PICTURE,)),
        Section("Each run", grids=(GRID,), collapsed=True),
    ),
    GRID,
)


def cells_of(page: str) -> list[str]:
    found = re.findall(r"<(t[hd])[^>]*>(.*?)</\1>", page)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for _, cell in found]


def test_all_forms_have_the_same_cells():
    once = [*GRID.header, *(cell for row in GRID.rows for cell in row)]
    assert cells_of(html_text(REPORT)) == once * 2
    markdown = markdown_text(REPORT, "pictures")
    assert "| ck | 75.00 |" in markdown
    assert "ck,75.00" in csv_text(GRID)


def test_a_page_escapes_all_text():
    page = html_text(REPORT)
    assert "<script" not in page
    assert page.count(escape(EVIL)) == 10


def test_markdown_escapes_its_own_characters():
    lines = markdown_text(REPORT, "pictures").splitlines()
    assert lines[0].startswith("# \\<script\\>")
    rows = [line for line in lines if line.startswith("| \\<script")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


@given(st.lists(st.tuples(WORDS, WORDS), max_size=4))
def test_comma_separated_values_are_read_back(rows):
    own = [tuple(" ".join(cell.split()) for cell in row) for row in rows]
    text = csv_text(Grid("", ("a", "b"), tuple(own)))
    assert [tuple(row) for row in csv.reader(io.StringIO(text))] == [("a", "b"), *own]


def test_an_absent_number_is_an_empty_cell_of_the_csv_file():
    assert csv_text(Grid("", ("run", "top-1"), (("ck", "-"),))) == "run,top-1\nck,\n"


def test_a_page_needs_nothing_beside_it():
    page = html_text(REPORT)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert sources == ["data:image/png;base64,ZGFyaw==", "data:image/png;base64,bGlnaHQ="]
    assert "url(" not in page
    assert "@import" not in page


def test_pictures_have_their_dark_form_on_a_dark_page():
    page = html_text(REPORT)
    dark = '<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,ZGFyaw==">'
    assert dark in page


def test_pictures_have_a_description():
    page = html_text(REPORT)
    assert f'alt="{escape(EVIL)}"' in page
    assert 'width="960" height="720"' in page


def test_tables_are_named_and_can_be_focused():
    page = html_text(REPORT)
    for name in re.findall(r'role="region" tabindex="0" aria-labelledby="([^"]*)"', page):
        assert f'id="{name}"' in page
    assert page.count('tabindex="0"') == 2
    assert page.count('<th scope="row"') == 4


def test_a_collapsed_table_can_be_opened():
    page = html_text(REPORT)
    assert page.count("<details>") == 1


def test_the_page_has_a_language_and_fits_the_screen():
    page = html_text(REPORT)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_markdown_refers_to_the_pictures():
    assert "](pictures/masks.png)" in markdown_text(REPORT, "pictures")
