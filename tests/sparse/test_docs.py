"""The code of docs/inference.md runs and prints what its comments say."""

import doctest
import re
from typing import Any

import pytest
import torch

from starfire_prune import ck_structured, sparse
from starfire_prune.utils import cpp
from tests.support.paths import ROOT
from tests.support.sparse_networks import difference

DOCS = ROOT / "docs"
TEXT = (DOCS / "inference.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.usefixtures("native_kernels")
def test_the_example_runs(capsys):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    names: dict[str, Any] = {"batches": [torch.rand(4, 3, 64, 64)]}
    for block in BLOCKS:
        exec(block, names)
    assert capsys.readouterr().out.split() == re.findall(r"\)  # (\S+):", "".join(BLOCKS))
    assert names["logits"].shape == (1, 10)
    assert difference(names["model"].eval(), names["fast"], names["images"]) < 1e-4
    assert names["in_int8"].torch_operations == []


@pytest.mark.usefixtures("native_kernels")
def test_the_docstrings_example_runs():
    names = {"nn": torch.nn, "torch": torch, "ck_structured": ck_structured, "sparse": sparse}
    tests = doctest.DocTestFinder().find(sparse.compile, "compile", globs=names, module=False)
    (result,) = [doctest.DocTestRunner().run(test) for test in tests]
    assert result == (0, 7)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (DOCS / target).exists(), target


def test_the_environment_variables_are_documented():
    assert set(re.findall(r"STARFIRE_\w+", TEXT)) == {cpp.CACHE_VARIABLE, cpp.FLAGS_VARIABLE}
