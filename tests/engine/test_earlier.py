"""Models that carry a finished pruning when a pruner begins: an error, and the ways out."""

from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import Pruner, ck_structured, random_unstructured
from starfire_prune.methods.base import make_permanent
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight
from tests.engine.test_every_method import every_method
from tests.support.networks import LAYERS, SmallNet, drift
from tests.support.pruned_runs import Run

CK: dict[str, Any] = {"method": "ck", "amount": 0.6, "era": [1, 3]}


def found(model: nn.Module, **settings: Any) -> str:
    """The error of the first update, or nothing."""
    pruner = Pruner(model, {**CK, **settings}, updates_per_epoch=4)
    drift(model, 1)  # the first update hides the zeros
    try:
        pruner.step()
    except PruningError as error:
        return str(error)
    return ""


@every_method
def test_a_finished_pruning_is_found_by_the_same_method(settings):
    run = Run(**settings).train_until(13)
    run.pruner.remove()
    pruner = Pruner(run.model, run.pruner.pruning, updates_per_epoch=4)
    with pytest.raises(PruningError, match="of the 4 layers to prune held zeros of an earlier"):
        pruner.step()
    Run(**settings).pruner.step()


@every_method
def test_a_pruning_within_the_era_is_found_too(settings):
    run = Run(**settings).train_until(6)
    run.pruner.remove()
    with pytest.raises(PruningError, match="earlier pruning"):
        Pruner(run.model, run.pruner.pruning, updates_per_epoch=4).step()


def test_the_error_names_layers_shares_and_ways_out_at_every_step():
    pruner = Pruner(Run().train_until(13).model, CK, updates_per_epoch=4)
    for _ in range(2):
        with pytest.raises(PruningError) as error:
            pruner.step()
        assert str(error.value) == (
            "4 of the 4 layers to prune held zeros of an earlier pruning before the first "
            "update: stem (62.5%), body (58.3%), point (62.5%), head (60.0%); to continue that "
            "training, load the pruner's state by pruner.load_state_dict(state); to prune the "
            "model once more, build the pruner by Pruner(..., prune_again=True)"
        )


def test_zeros_count_wherever_the_method_would_have_put_them():
    model = SmallNet()
    random_unstructured(model.body, amount=0.7)
    make_permanent(model.body, "weight")
    assert found(model, method="random", seed=7, include=["body"])


def test_a_finished_pruning_that_is_loaded_later_is_found():
    model = SmallNet(seed=4)
    pruner = Pruner(model, CK, updates_per_epoch=4)
    model.load_state_dict(Run().train_until(13).model.state_dict())
    drift(model, 1)
    with pytest.raises(PruningError, match=r"pruner\.load_state_dict"):
        pruner.step()


def test_dense_weights_that_are_loaded_later_are_fine():
    run = Run().train_until(13)
    run.pruner.remove()
    model = run.model
    pruner = Pruner(model, CK, updates_per_epoch=4)
    model.load_state_dict(SmallNet(seed=4).state_dict())
    pruner.step()


@pytest.mark.parametrize("order", ["pruner first", "model first"])
def test_the_pruners_state_makes_it_a_resumed_run(order):
    finished = Run().train_until(13)
    model = SmallNet(seed=4)
    if order == "model first":
        model.load_state_dict(finished.model.state_dict())
    pruner = Pruner(model, finished.pruner.pruning, updates_per_epoch=4)
    pruner.load_state_dict(finished.pruner.state_dict())
    if order == "pruner first":
        model.load_state_dict(finished.model.state_dict())
    drift(model, 1)
    pruner.step()
    pruner.check()


def test_prune_again_prunes_a_pruned_model_further():
    model = Run().train_until(13).model
    settings = {**CK, "amount": 0.8, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=1, prune_again=True)
    pruner.step()
    assert pruner.sparsity()["body"].sparsity >= 0.75


@pytest.mark.parametrize("settings", [{"amount": 0.9}, {"method": "window"}, {"fc": "none"}])
def test_zeros_of_other_amounts_and_methods_are_found_too(settings):
    assert found(Run().train_until(13).model, **settings) != ""


def test_one_layer_of_many_is_only_logged(caplog):
    model = SmallNet()
    ck_structured(model.body, amount=0.75)
    make_permanent(model.body, "weight")
    assert found(model) == ""
    assert caplog.text.count("1 of the 4 layers to prune held zeros of an earlier pruning") == 1


def test_a_few_zeros_are_no_pruning():
    model = SmallNet()
    for name in LAYERS:
        layer_weight(model.get_submodule(name)).detach().flatten()[0] = 0.0
    assert found(model, include=["stem", "body"]) == ""


def test_fresh_and_zero_initialized_networks_are_not_found():
    model = SmallNet()
    for name in LAYERS[1:]:
        nn.init.zeros_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert found(model) == ""


def test_looking_changes_nothing():
    model = Run(method="random").train_until(13).model
    before = torch.random.get_rng_state()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    Pruner(model, {**CK, "method": "random"}, updates_per_epoch=4)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
