"""State dicts have plain names in every phase, and load before or after the pruner's state."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from starfire_prune import Pruner, ck_structured
from tests.support.networks import LAYERS, SmallNet, equal_states, sgd, snapshot, train

CK: dict[str, object] = {"method": "ck", "amount": 0.6, "era": [1, 3]}
UPDATES = 2
PHASES = pytest.mark.parametrize("epochs", [1, 2, 3], ids=["dense", "era", "fixed"])


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = SmallNet(seed)
    optimizer = sgd(model)
    return model, optimizer, Pruner(model, CK, updates_per_epoch=UPDATES, optimizer=optimizer)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, epochs: range) -> None:
    for epoch in epochs:
        train(model, optimizer, pruner, range(epoch * UPDATES, (epoch + 1) * UPDATES))
        pruner.end_epoch(epoch)


@PHASES
def test_names_and_their_order_are_the_dense_models(epochs):
    model, optimizer, pruner = make()
    average = pruner.mirror(copy.deepcopy(model))
    run(model, optimizer, pruner, range(epochs))
    names = list(SmallNet().state_dict())
    pickled = pickle.loads(pickle.dumps(model))
    for one in (model, average, copy.deepcopy(model), pickled):
        assert list(one.state_dict()) == names


@PHASES
def test_a_state_dict_computes_in_a_dense_model_what_the_pruned_one_does(epochs):
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(epochs))
    dense: nn.Module = SmallNet(seed=9)
    dense.load_state_dict(model.state_dict())
    outputs = [one.eval()(torch.ones(2, 3, 8, 8)) for one in (dense, model)]
    assert torch.equal(*outputs)


def test_an_averages_state_dict_in_the_era_is_pruned_too():
    model, optimizer, pruner = make()
    average = pruner.mirror(copy.deepcopy(model))
    run(model, optimizer, pruner, range(2))
    state = average.state_dict()
    for name, mask in pruner.masks().items():
        assert not state[name][~mask].any()


def test_tensors_of_a_state_dict_in_the_era_are_the_live_ones():
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(2))
    for value in model.state_dict().values():
        value.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("order", ["pruner first", "model first"])
@PHASES
def test_training_resumes_bit_for_bit_in_either_order(epochs, order, assign):
    whole = make()
    run(*whole, range(4))
    part = make()
    run(*part, range(epochs))
    states = [copy.deepcopy(one.state_dict()) for one in part]

    model = SmallNet(seed=5)
    if order == "model first":
        model.load_state_dict(states[0], assign=assign)
    pruner = Pruner(model, CK, updates_per_epoch=UPDATES)
    pruner.load_state_dict(states[2])
    if order == "pruner first":
        model.load_state_dict(states[0], assign=assign)
    optimizer = sgd(model)
    optimizer.load_state_dict(states[1])
    run(model, optimizer, pruner, range(epochs, 4))
    assert equal_states(model.state_dict(), snapshot(whole[0]))
    assert pruner.mask_hash() == whole[2].mask_hash()


@pytest.mark.parametrize("to", [1, 2, 3])
@pytest.mark.parametrize("of", [1, 2, 3])
def test_a_checkpoint_of_any_phase_loads_into_a_model_in_any_phase(of, to):
    saved = make()
    run(*saved, range(of))
    model, optimizer, pruner = make(seed=3)
    run(model, optimizer, pruner, range(to))
    model.load_state_dict(copy.deepcopy(saved[0].state_dict()))
    pruner.check()
    if to > 1:
        for name, mask in pruner.masks().items():
            weight = model.get_parameter(name if to == 3 else f"{name}_orig")
            assert torch.equal(weight * mask, saved[0].state_dict()[name] * mask)


def test_loading_weights_that_the_frozen_masks_prune_warns_and_prunes_them(caplog):
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(3))
    model.load_state_dict(SmallNet(seed=7).state_dict())
    assert "layer body: " in caplog.text
    assert "not zero where the frozen mask prunes" in caplog.text
    pruner.check()


def test_accelerate_saves_and_loads_its_state_within_the_era(tmp_path: Path):
    def prepared(seed: int) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, Pruner]:
        accelerator = Accelerator(cpu=True)
        model: nn.Module = SmallNet(seed)
        model, optimizer = accelerator.prepare(model, sgd(model))
        pruner = Pruner(model, CK, updates_per_epoch=UPDATES, optimizer=optimizer)
        accelerator.register_for_checkpointing(pruner)
        return accelerator, model, optimizer, pruner

    accelerator, model, optimizer, pruner = prepared(0)
    run(model, optimizer, pruner, range(2))
    accelerator.save_state(str(tmp_path))
    run(model, optimizer, pruner, range(2, 4))
    whole = snapshot(model)
    accelerator, model, optimizer, pruner = prepared(4)
    accelerator.load_state(str(tmp_path))
    run(model, optimizer, pruner, range(2, 4))
    assert equal_states(snapshot(model), whole)


def test_the_functions_keep_the_names_of_torch():
    model = SmallNet()
    ck_structured(model.body, amount=0.5)
    assert {"body.weight_orig", "body.weight_mask"} <= set(model.state_dict())


def test_after_a_pruner_the_functions_have_the_names_of_torch_again():
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(3))
    for name in LAYERS[:3]:
        ck_structured(model.get_submodule(name), amount=0.7)
        assert {f"{name}.weight_orig", f"{name}.weight_mask"} <= set(model.state_dict())
