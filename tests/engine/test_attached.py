"""Layers that are replaced, shared or left untrained after a pruner was built are noticed."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from starfire_prune import Pruner, save_pruned
from starfire_prune.utils.errors import PruningError
from tests.support.networks import SmallNet, sgd, train

CK: dict[str, object] = {"method": "ck", "amount": 0.6, "era": [1, 2]}


def make() -> tuple[nn.Module, Pruner]:
    model = SmallNet()
    return model, Pruner(model, CK, updates_per_epoch=2)


def replace(model: nn.Module) -> None:
    model.body = nn.Conv2d(8, 12, 3, padding=1, stride=2)


def share(model: nn.Module) -> None:
    other = nn.Conv2d(8, 12, 3)
    other.weight = model.get_parameter("body.weight")
    model.other = other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, "layer body of the model was replaced after the pruner was built"),
        (share, "layer body has shared its weight with other since the pruner was built"),
    ],
)
@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_replaced_or_shared_layer_is_an_error_at_the_end_of_the_epoch(change, message, epochs):
    model, pruner = make()
    for epoch in range(epochs):
        train(model, sgd(model), pruner, range(2))
        pruner.end_epoch(epoch)
    change(model)
    with pytest.raises(PruningError, match=message):
        pruner.check()
    with pytest.raises(PruningError, match=message):
        pruner.end_epoch(epochs)


def test_a_replaced_layer_is_an_error_when_the_era_begins_without_epochs():
    model = SmallNet()
    settings = {"method": "ck", "amount": 0.6, "era_updates": [1, 3]}
    pruner = Pruner(model, settings)
    train(model, sgd(model), pruner, range(1))
    replace(model)
    with pytest.raises(PruningError, match="layer body of the model was replaced"):
        pruner.step()


def test_training_a_copy_through_the_era_is_logged(caplog):
    model, pruner = make()
    model = copy.deepcopy(model)
    for epoch in range(2):
        train(model, sgd(model), pruner, range(2))
        pruner.end_epoch(epoch)
    assert "no weight of the pruned layers has changed within the era" in caplog.text


def test_a_copy_that_was_not_pruned_is_not_saved_with_the_pruners_masks(tmp_path: Path):
    model = SmallNet()
    average = copy.deepcopy(model)
    pruner = Pruner(model, {**CK, "era": [0, 1]}, updates_per_epoch=2)
    train(model, sgd(model), pruner, range(2))
    with pytest.raises(PruningError, match=r"are not zero where its pruner's mask prunes"):
        save_pruned(average, tmp_path / "model.safetensors", pruner=pruner)
    assert not any(tmp_path.iterdir())
    save_pruned(model, tmp_path / "model.safetensors", pruner=pruner)


def test_lbfgs_is_refused_since_it_moves_pruned_weights_within_a_step():
    model = SmallNet()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS"):
        Pruner(model, CK, updates_per_epoch=2, optimizer=optimizer)
