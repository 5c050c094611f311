"""What interactive users see of results: a line, however large the model is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from starfire_prune import Pruner, measure_sparsity, save_pruned
from starfire_prune.compact import compact, fold_constants
from starfire_prune.serialization.inspect import inspect_pruned
from tests.support.networks import SmallNet

IMAGES = torch.zeros(2, 3, 8, 8)


def _pruner(model: nn.Module) -> Pruner:
    return Pruner(model, {"method": "ck", "amount": 0.6, "era_updates": [0, 1]})


def _inspection(folder: Path) -> object:
    save_pruned(SmallNet(), folder / "model.safetensors")
    return inspect_pruned(folder / "model.safetensors")


MADE: dict[str, Callable[[Path], object]] = {
    "Sparsity": lambda folder: measure_sparsity(SmallNet()),
    "CompactReport": lambda folder: compact(SmallNet(), IMAGES)[1],
    "FoldReport": lambda folder: fold_constants(SmallNet(), IMAGES)[1],
    "Inspection": _inspection,
    "Pruner": lambda folder: _pruner(SmallNet()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_result_is_shown_as_a_line(name, tmp_path):
    shown = repr(MADE[name](tmp_path))
    assert shown.startswith(f"{name}(")
    assert len(shown) < 120
    assert "\n" not in shown


def test_sparsity_is_shown_by_its_shares():
    assert repr(measure_sparsity(SmallNet())) == (
        "Sparsity(4 layers, selected=0.0000, network=0.0000)"
    )
