"""The tables and numbers of the pages are those of the committed logs."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tables.py as a module, as it is when it runs as a script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.mark.parametrize("name", ["README.md", "benchmarks/RESULTS.md", "docs/distributed.md"])
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


def test_an_unknown_name_raises_with_a_suggestion(tables):
    with pytest.raises(ValueError, match=r"quickstart\.dens; did you mean quick"):
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


@pytest.fixture
def evidence(tables: ModuleType, tmp_path: Path) -> Iterator[ModuleType]:
    """benchmarks/evidence.py, which reads an empty folder of logs."""
    module = importlib.import_module("evidence")
    cached = (module.tiny_runs, module.attacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TINY", tmp_path)
        for function in cached:
            function.cache_clear()
        yield module
    for function in cached:
        function.cache_clear()


def test_a_run_without_all_its_epochs_is_told(evidence, tmp_path):
    folder = tmp_path / "ck-60-seed0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "top1": 0.5}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="ck-60-seed0 has 1 of 20 epochs"):
        evidence.tiny_runs("ck-60")


def test_a_run_that_was_not_attacked_so_is_told(evidence):
    with pytest.raises(ValueError, match=r"dense-seed0 has 0 results of fgsm, pixel 0\.5"):
        evidence.attacked("dense", "fgsm", "pixel", 0.5)


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        (1.0, -1.5, "yes"),
        (-1.5, 1.0, "no"),
        (0.5, -1.0, "undecided: +1.50 is within the noise"),
    ],
)
def test_a_difference_within_the_noise_decides_nothing(one, other, verdict, evidence):
    assert evidence._beats(one, other) == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"window": 0.5, "CK": -1.0}, "yes"),
        ({"window": 0.5, "CK": -1.1}, "undecided: CK is beyond it within the noise"),
        ({"window": -3.1, "CK": -1.1}, "not by window"),
    ],
)
def test_a_loss_beyond_the_limit_is_told(found, verdict, evidence):
    assert evidence._within(found, 1.0) == verdict
