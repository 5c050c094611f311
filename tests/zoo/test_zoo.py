"""Every family of models: what the package does is right, or refused in a sentence.

In two processes, a model in one of them: `pytest -m slow tests/zoo/test_zoo.py --dist load`.
"""

import json
import re

import pytest

from tests.zoo.cells import CELLS, measure
from tests.zoo.models import CHOSEN, ZOO, families, left_out
from tests.zoo.page import PAGE, page
from tests.zoo.results import read_results

timm = pytest.importorskip("timm")


def names_of_the_page() -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_each_family_of_timm_is_in_the_zoo_or_left_out_for_its_size():
    if json.loads(CHOSEN.read_text(encoding="utf-8"))["versions"]["timm"] != timm.__version__:
        pytest.skip("the zoo was chosen from another version of timm")
    covered = {model.family.removeprefix("timm.") for model in ZOO.values()}
    assert [name for name in families() if name not in covered | set(left_out())] == []


def test_the_page_lists_the_models_of_the_zoo():
    assert names_of_the_page() == list(ZOO)


def test_the_page_is_that_of_the_results():
    expected = page(read_results())
    assert PAGE.read_text(encoding="utf-8") == expected, "run python -m tests.zoo --page"


def test_no_result_of_the_page_is_wrong_or_unclear():
    found = read_results()["models"]
    faults = [
        f"{name}: {cell}"
        for name, cells in found.items()
        for cell, outcome in cells.items()
        if outcome["status"] in ("wrong", "unclear")
    ]
    assert faults == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_right_or_refused_in_a_sentence(name, native_kernels):
    outcomes = measure(ZOO[name])
    assert list(outcomes) == list(CELLS)
    bad = {cell: each for cell, each in outcomes.items() if each.status in ("wrong", "unclear")}
    assert bad == {}
