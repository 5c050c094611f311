"""Layers that are replaced, shared or left untrained after a pruner was built are noticed."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

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


def test_a_second_pruner_of_a_model_is_refused_until_the_first_has_ended():
    model, pruner = make()
    message = (
        "layer stem is pruned by another Pruner, which has not finished: use that one, or call its "
        "remove() before building another"
    )
    with pytest.raises(PruningError, match=f"^{re.escape(message)}$"):
        Pruner(model, CK, updates_per_epoch=2)
    pruner.remove()
    second = Pruner(model, {**CK, "era": [0, 1]}, updates_per_epoch=2)
    train(model, sgd(model), second, range(2))
    third = Pruner(model, CK, updates_per_epoch=2, prune_again=True)
    assert third.phase == "dense"


def test_a_pruner_whose_building_failed_or_that_is_gone_is_not_in_the_way():
    model = SmallNet()
    with pytest.raises(ValueError, match="holds no weight") as error:
        Pruner(model, CK, updates_per_epoch=2, optimizer=sgd(SmallNet()))
    pruner = Pruner(model, CK, updates_per_epoch=2)
    assert error.value is not None
    del pruner
    assert Pruner(model, CK, updates_per_epoch=2).phase == "dense"


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_step_in_inference_mode_is_refused(epochs):
    model, pruner = make()
    for epoch in range(epochs):
        train(model, sgd(model), pruner, range(2))
        pruner.end_epoch(epoch)
    with torch.inference_mode(), pytest.raises(PruningError, match=r"inference_mode\(\) would"):
        pruner.step()
    train(model, sgd(model), pruner, range(1))


@pytest.mark.parametrize("add", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("epochs", [0, 2])
def test_a_parametrization_of_a_pruned_layer_is_an_error_at_the_next_step(add, epochs):
    model, pruner = make()
    for epoch in range(epochs):
        train(model, sgd(model), pruner, range(2))
        pruner.end_epoch(epoch)
    add(model.get_submodule("body"))
    with pytest.raises(PruningError, match=r"^layer body has no parameter `weight` any more"):
        pruner.step()
    with pytest.raises(PruningError, match=r"^layer body has no parameter `weight` any more"):
        pruner.check()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripting_before_the_first_update_says_what_to_do():
    model, _ = make()
    names = [hook.__name__ for hook in model.get_submodule("stem")._forward_pre_hooks.values()]
    assert names == ["note_call"]
    with pytest.raises(PruningError, match=r"script the model after the first step\(\)"):
        torch.jit.script(model)
