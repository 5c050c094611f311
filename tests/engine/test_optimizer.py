"""Optimizers that are attached to a pruner later, exchanged, or given another state."""

import copy
import re

import pytest
import torch
from torch import Tensor

from starfire_prune import Pruner
from tests.support.networks import SmallNet, sgd, train_step
from tests.support.pruned_runs import PHASES, Run, assert_same


def momenta(run: Run) -> list[Tensor]:
    """The optimizer's state of the pruned weights of each layer."""
    return [
        run.optimizer.state[run.model.get_parameter(name)]["momentum_buffer"][~mask]
        for name, mask in run.pruner.masks().items()
    ]


def all_zero(tensors: list[Tensor]) -> bool:
    assert sum(tensor.numel() for tensor in tensors) > 200
    return not any(bool(tensor.any()) for tensor in tensors)


@pytest.mark.parametrize("updates", PHASES.values(), ids=PHASES)
def test_a_new_optimizer_ends_without_momenta_of_pruned_weights(updates):
    run = Run().train_until(updates)
    run.optimizer = run.pruner.optimizer = torch.optim.SGD(run.model.parameters(), 0.1, 0.9)
    assert run.pruner.optimizer is run.optimizer
    run.train_until(16)
    assert all_zero(momenta(run))
    run.pruner.check()


@pytest.mark.parametrize("updates", [0, 5, 11])
def test_an_optimizer_attached_before_the_end_of_the_era_is_as_one_from_the_beginning(updates):
    given, later = Run(), Run()
    later.pruner.optimizer = None
    for run in (given, later):
        run.train_until(updates)
    later.pruner.optimizer = later.optimizer
    assert_same(given.train_until(16), later.train_until(16))
    assert all_zero(momenta(later))


def test_an_optimizer_attached_in_the_fixed_phase_loses_its_momenta_at_once():
    run = Run()
    run.pruner.optimizer = None
    run.train_until(12)
    assert not all_zero(momenta(run))
    run.pruner.optimizer = run.optimizer
    assert all_zero(momenta(run))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_a_state_loaded_in_the_fixed_phase_loses_its_momenta_at_the_next_step(copied):
    early = copy.deepcopy(Run().train_until(6).optimizer.state_dict())
    run = Run().train_until(13)
    run = copy.deepcopy(run) if copied else run
    run.optimizer.load_state_dict(early)
    assert not all_zero(momenta(run))
    run.train_until(14)
    assert all_zero(momenta(run))
    assert not any(
        bool(run.model.get_parameter(name)[~mask].any())
        for name, mask in run.pruner.masks().items()
    )


def test_a_state_loaded_within_the_era_loses_its_momenta_at_its_end():
    early = copy.deepcopy(Run().train_until(3).optimizer.state_dict())
    run = Run().train_until(6)
    run.optimizer.load_state_dict(early)
    assert all_zero(momenta(run.train_until(12)))


def test_an_optimizer_without_the_models_parameters_is_refused():
    message = (
        "`optimizer` (a SGD) holds no weight of the pruned layers, such as that of stem: build it "
        "from the parameters of the model that is pruned"
    )
    other = sgd(SmallNet())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pruner(SmallNet(), {"method": "ck", "amount": 0.6, "era_updates": [0, 1]}, optimizer=other)
    run = Run()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run.pruner.optimizer = other
        assert run.pruner.optimizer is run.optimizer
        run.train_until(13)


def test_an_optimizer_with_only_some_of_the_weights_is_noticed(caplog):
    model = SmallNet()
    names = [name for name, _ in model.named_parameters() if name != "stem.weight"]
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1)
    settings = {"method": "ck", "amount": 0.6, "era_updates": [0, 1]}
    pruner = Pruner(model, settings, optimizer=optimizer)
    (message,) = caplog.messages
    n = len(pruner.layers)
    assert message == (
        f"`optimizer` (a SGD) holds the weights of {n - 1} of the {n} pruned layers, not that of "
        f"stem: state that another optimizer keeps of them is not zeroed"
    )


def test_what_is_not_an_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"^`optimizer` \(a list\) must be a torch.optim.Optimizer"):
        Run().pruner.optimizer = []  # type: ignore[assignment]


def test_an_optimizer_of_some_layers_is_accepted():
    run = Run()
    run.optimizer = run.pruner.optimizer = torch.optim.SGD(run.model.head.parameters(), 0.1, 0.9)
    run.train_until(12)
    train_step(run.model, run.optimizer, 12)
    run.pruner.step()
    assert run.pruner.finished
