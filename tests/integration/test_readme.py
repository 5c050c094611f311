"""The README's code runs, and its commands are the ones that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import starfire_prune
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block_with(text: str) -> str:
    (block,) = (block for block in BLOCKS if text in block)
    return block


def test_three_lines_prune_a_model_in_its_own_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(360, 10))
    batches = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(3)]
    names: dict[str, Any] = {
        "model": model,
        "loader": batches,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss": nn.CrossEntropyLoss(),
        "epochs": 8,
    }
    exec(block_with("import Pruner"), names)
    pruner = names["pruner"]
    assert pruner.phase == "fixed"
    assert pruner.sparsity().network == pytest.approx(0.6)
    assert torch.count_nonzero(names["model"][0].weight) == 4 * 9
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    pruner.check()


def test_one_call_on_one_layer():
    names: dict[str, Any] = {}
    exec(block_with("ck_structured"), names)
    conv = names["conv"]
    assert not prune.is_pruned(conv)
    kernels_gone = (conv.weight == 0).all(dim=(2, 3)).sum(0)
    assert torch.equal(kernels_gone, torch.full((64,), 38))  # floor(0.6 * 64 + 0.5) each


def test_a_sparse_model_becomes_a_smaller_dense_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10))
    starfire_prune.filter_structured(model[0], amount=0.5)
    names: dict[str, Any] = {"model": model, "torch": torch}
    exec(block_with("import compact"), names)
    assert names["smaller"][0].out_channels == 4


def test_a_sparse_model_runs_by_kernels_that_skip_its_zeros(native_kernels):
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.rand(1, 3, 8, 8)
    starfire_prune.ck_structured(model[0], amount=0.6)
    names: dict[str, Any] = {"model": model, "images": images}
    exec(block_with("sparse.compile"), names)
    assert names["fast"].torch_operations == []
    assert torch.allclose(names["fast"](images), model(images), atol=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -e '.[train]' && accelerate launch tools/train.py recipes/quickstart.yaml",
        "pip install -e '.[dev]' && pytest",
    ],
)
def test_commands_stand_alone_on_a_line(command):
    assert command in README.splitlines()


def test_a_wrong_recipe_is_refused_in_the_words_that_are_shown():
    paths = (str(Path(sys.executable).parent), os.environ["PATH"])
    (block,) = re.findall(r"```console\n\$ (.*?)```", README, flags=re.DOTALL)
    command, _, shown = block.partition("\n")
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, shown)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
