"""Saving and resuming the pruner, and copies of the model in every phase."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import Pruner
from tests.support.networks import (
    backward,
    equal_states,
    hook_count,
    sgd,
    snapshot,
    train_step,
)
from tests.support.pruned_runs import LAST, PHASES, UPDATES, Run, assert_same, through_json

METHODS: dict[str, dict[str, Any]] = {
    "window": {"method": "window", "exact_layer_sparsity": True, "max_nonzero": 5},
    "intra": {"method": "intra", "resolution": 0.0},
    "inter": {"method": "inter"},
}


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_resumed_run_equals_the_one_that_went_on(settings, n_updates):
    run = Run(**settings).train_until(n_updates)
    resumed = Run(seed=1, **settings).resume(run)
    assert_same(run, resumed)
    for until in range(n_updates + 1, LAST + 1):
        run.train_until(until)
        resumed.train_until(until)
        assert_same(run, resumed)
    resumed.pruner.check()


@pytest.mark.parametrize("into", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_a_state_loads_into_a_pruner_of_any_phase(n_updates, into):
    run = Run().train_until(n_updates)
    other = Run(seed=1).train_until(into).resume(run)
    assert_same(run, other)
    assert_same(run.train_until(LAST), other.train_until(LAST))
    other.pruner.check()


def test_a_state_loaded_twice_leaves_one_hook_a_layer():
    fixed = Run().train_until(PHASES["fixed"])
    other = Run().resume(fixed).resume(fixed)
    hooks: Any = other.model.body.weight._backward_hooks
    assert (hook_count(other.model), len(hooks)) == (0, 1)
    era = Run().train_until(PHASES["era"])
    again = Run().resume(era).resume(era)
    assert hook_count(again.model) == len(again.pruner.layers)


def test_going_back_to_the_dense_phase_lets_gradients_through_again():
    dense = Run().train_until(1)
    run = Run().train_until(PHASES["fixed"])
    gone = ~run.pruner.masks()["body.weight"]
    run.resume(dense)
    run.optimizer.zero_grad()
    backward(run.model, 0)
    gradient: Any = run.model.body.weight.grad
    assert gradient[gone].any()
    assert run.pruner.masks() == {}


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_the_state_is_plain_data_and_bool_tensors(n_updates):
    def walk(value: object) -> None:
        if type(value) is dict:
            for key, item in value.items():
                assert type(key) is str
                walk(item)
        elif type(value) is list:
            for item in value:
                walk(item)
        elif isinstance(value, Tensor):
            assert type(value) is Tensor
            assert value.dtype == torch.bool
            assert not value.requires_grad
        else:
            assert value is None or type(value) in (str, int, float, bool)

    run = Run(**METHODS["window"], overrides=[{"layers": "stem", "amount": 0.3}])
    state = run.train_until(n_updates).pruner.state_dict()
    walk(state)
    through_json(state)


def test_the_state_is_a_copy():
    run = Run().train_until(PHASES["era"])
    state = run.pruner.state_dict()
    kept = copy.deepcopy(state)
    run.train_until(PHASES["fixed"])
    assert through_json(state).keys() == kept.keys()
    assert state["applied"] == kept["applied"]
    assert equal_states(state["masks"], kept["masks"])


def test_the_state_passes_a_weights_only_load(tmp_path):
    state = Run().train_until(PHASES["era"]).pruner.state_dict()
    torch.save(state, tmp_path / "pruner.pt")
    read = torch.load(tmp_path / "pruner.pt", weights_only=True)
    assert equal_states(read["masks"], state["masks"])


# Refusals


def refusal(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"amount": 0.5}, "amount"),
        ({"era": [1, 4], "schedule": "cubic"}, "era, schedule"),
        ({"exclude": ["stem"]}, "exclude"),
        ({"method": "intra"}, "method, window_fraction"),
    ],
)
def test_a_state_of_other_settings_is_refused(settings, names, n_updates):
    state = Run().train_until(n_updates).pruner.state_dict()
    with refusal(
        f"the pruner's state was saved under other settings of {names}: "
        f"resume with the recipe, data and batch size of the run that saved it"
    ):
        Run(**settings).pruner.load_state_dict(state)


def test_a_state_of_another_number_of_updates_is_refused():
    state = Run().pruner.state_dict()
    state["updates_per_epoch"] = 5
    with pytest.raises(ValueError, match=r"other settings of updates_per_epoch: resume with"):
        Run().pruner.load_state_dict(state)


@pytest.mark.parametrize("version", [1, None])
def test_a_state_of_another_version_is_refused(version):
    state = {**Run().pruner.state_dict(), "version": version}
    with refusal(f"the pruner's state has version {version!r}, this package reads 4"):
        Run().pruner.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "foo"}, "the pruner's state is damaged: its phase is 'foo'"),
        ({"epoch": "1"}, "the pruner's state is damaged: its epoch is '1'"),
        ({"era_updates": -4}, "the pruner's state is damaged: its era_updates is -4"),
        ({"more": 1}, "the pruner's state is not complete, or not a pruner's: see more"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    with refusal(message):
        Run().pruner.load_state_dict({**Run().pruner.state_dict(), **change})


def test_an_incomplete_state_is_refused():
    state = Run().pruner.state_dict()
    del state["applied"]
    with refusal("the pruner's state is not complete, or not a pruner's: see applied"):
        Run().pruner.load_state_dict(state)


def test_the_settings_in_a_state_are_a_copy():
    pruner = Run().pruner
    pruner.state_dict()["pruning"]["amount"] = 0.9
    assert pruner.state_dict()["pruning"]["amount"] == 0.6


def pruner_of(model: nn.Module) -> Pruner:
    settings = {"method": "ck", "amount": 0.5, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=2)
    pruner.step()
    return pruner


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 6, 3)),
            "the pruner's state has no mask of shape (6, 3, 3, 3) for layer 0: it is of another "
            "model",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)),
            "the pruner's state has no mask of shape (4, 4) for layer 2: it is of another model",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            "the pruner's state has a mask for 1.weight, which this pruner does not prune: it is "
            "of another model",
        ),
    ],
    ids=["shape", "missing", "unknown"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(other, message):
    state = pruner_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))).state_dict()
    pruner = pruner_of(other)
    before = pruner.mask_hash()
    with refusal(message):
        pruner.load_state_dict(state)
    assert (pruner.phase, pruner.mask_hash()) == ("era", before)


# Copies


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_trap_04_the_model_can_be_copied_in_every_phase(settings, n_updates):
    run = Run(**settings).train_until(n_updates)
    clone = copy.deepcopy(run.model)  # after a forward pass with gradients
    assert equal_states(snapshot(clone), snapshot(run.model))
    assert hook_count(clone) == hook_count(run.model)
    before = snapshot(clone)
    run.train_until(LAST)
    assert equal_states(snapshot(clone), before)


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_trap_04_a_copy_trains_on_its_own(n_updates):
    run = Run().train_until(n_updates)
    clone = copy.deepcopy(run.model)
    twin = copy.deepcopy(run.model)
    for model in (clone, twin):
        train_step(model, sgd(model), 0)
    assert equal_states(snapshot(clone), snapshot(twin))
    assert not equal_states(snapshot(clone), snapshot(run.model))


@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_the_whole_model_can_be_pickled_in_every_phase(n_updates):
    run = Run().train_until(n_updates)
    file = io.BytesIO()
    torch.save(run.model, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    assert equal_states(snapshot(clone), snapshot(run.model))


def test_a_copy_of_the_fixed_phase_is_a_plain_model():
    run = Run().train_until(PHASES["fixed"])
    clone = copy.deepcopy(run.model)
    backward(clone, 0)
    gradient: Any = clone.body.weight.grad
    assert gradient[~run.pruner.masks()["body.weight"]].any()


def test_training_goes_on_after_evaluation_in_the_era():
    run, other = Run(), Run()
    run.train_until(6)
    run.model.eval()
    with torch.inference_mode():
        run.model(torch.zeros(1, 3, 8, 8))
    run.model.train()
    assert_same(run.train_until(LAST), other.train_until(LAST))


# Dense epochs that another run has trained


def test_a_pruner_that_skips_its_dense_epoch_goes_on_as_one_that_has_trained_it():
    trained = Run().train_until(UPDATES)
    skipping = Run()
    skipping.pruner.skip_dense(1)
    assert skipping.pruner.state_dict() == trained.pruner.state_dict()


@pytest.mark.parametrize("epochs", [-1, 2])
def test_only_dense_epochs_can_be_skipped(epochs):
    message = re.escape(f"`epochs` (={epochs}) must be in 0..1, where the era begins")
    with pytest.raises(ValueError, match=message):
        Run().pruner.skip_dense(epochs)


@pytest.mark.parametrize("updates", [1, UPDATES])
def test_epochs_can_be_skipped_before_the_first_update_alone(updates):
    run = Run().train_until(updates)
    with pytest.raises(RuntimeError, match="comes before the first step"):
        run.pruner.skip_dense(1)
