"""The tables and numbers of README.md and RESULTS.md are those of the committed logs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/tables.py as a module."""
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("benchmark_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "benchmarks/RESULTS.md"])
def test_every_marked_table_and_number_is_as_the_logs_have_it(name, tables):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_every_table_and_number_is_shown_somewhere(tables):
    text = "".join(path.read_text(encoding="utf-8") for path in tables.FILES)
    missing = [f"table: {name}" for name in tables.TABLES if f"table: {name} -->" not in text]
    missing += [f"number: {name}" for name in tables.NUMBERS if f"number: {name} -->" not in text]
    assert missing == []


def test_a_table_of_results_stands_between_markers(tables):
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    outside = tables._TABLE.sub("", text)
    assert [line for line in outside.splitlines() if line.startswith("|")] == []


def test_what_was_changed_by_hand_is_put_right(tables):
    number = "Dense: <!-- number: quickstart.dense -->12.34 %<!-- end -->."
    assert tables.filled(number) == number.replace("12.34", "98.80")
    table = "<!-- table: quickstart -->\n| run |\n<!-- end -->\n"
    assert "| dense | 0.0 % | 98.61 %, 98.89 %, 98.89 % | 98.80 % |\n" in tables.filled(table)


def test_an_unknown_name_is_refused_with_the_nearest(tables):
    with pytest.raises(ValueError, match=r"no table or number quickstart\.dens; there are quick"):
        tables.filled("<!-- number: quickstart.dens --><!-- end -->")


def test_the_check_tells_what_differs_and_writes_nothing(tables, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- number: quickstart.dense -->1 %<!-- end -->\n", encoding="utf-8")
    before = page.read_bytes()
    monkeypatch.setattr(tables, "FILES", (page,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "+<!-- number: quickstart.dense -->98.80 %<!-- end -->" in capsys.readouterr().out
    assert page.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert "98.80 %" in page.read_text(encoding="utf-8")
