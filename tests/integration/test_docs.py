"""The pages in docs/ and the package agree: keys of recipes, links, and names in the code."""

import ast
import re
import runpy
from functools import cache
from typing import Any

import pytest

from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.findall(
    r"`(\w[\w/]*\.py):([\w.]+)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
)


@cache
def defined_in(file: str) -> set[str]:
    """The functions, classes and methods of a file of the package."""
    tree = ast.parse((ROOT / "starfire_prune" / file).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [own for own in node.body if isinstance(own, ast.FunctionDef)]
            names.update(f"{node.name}.{own.name}" for own in methods)
    return names


def test_the_page_of_keys_is_that_of_the_settings():
    page = runpy.run_path(str(ROOT / "docs" / "keys.py"))["page"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page, (
        "run python docs/keys.py"
    )


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_of_a_page_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in PAGES if path.name not in (index + "README.md")] == []


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: part)
def test_a_name_of_the_architecture_page_is_in_the_code(file, name):
    assert name in defined_in(file)


def test_the_architecture_page_names_code():
    assert len(NAMED) > 20


def test_the_loop_of_the_page_prunes(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8")
    loop, in_updates = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    exec(loop, names)
    assert names["pruner"].finished
    assert (tmp_path / "model.safetensors").is_file()
    exec(in_updates, names)
    assert names["pruner"].phase == "dense"


def test_the_method_and_the_schedule_of_the_page_work():
    from starfire_prune.methods import registry, schedules

    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    method, _, schedule = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        exec(method + schedule, names)
        for _ in range(10):
            names["pruner"].step()
        weight = names["model"][2].weight
        assert (weight == 0).all(dim=(2, 3)).sum(0).tolist() == [4] * 8
        assert schedules.SCHEDULES["late"](0.5) == 0.125
    finally:
        registry.unregister_method("ck_norm")
        schedules._SCHEDULES.pop("late", None)
