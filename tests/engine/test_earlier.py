"""The notice for models that carry a finished pruning when a pruner is built."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import Pruner, ck_structured, magnitude_unstructured
from starfire_prune.engine.earlier import earlier_pruning
from starfire_prune.methods.base import make_permanent
from tests.engine.test_every_method import every_method
from tests.support.networks import LAYERS, SmallNet
from tests.support.pruned_runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")

CK: dict[str, Any] = {"method": "ck", "amount": 0.6, "era": [1, 3]}


def notices(model: nn.Module, caplog: Any, **settings: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="starfire_prune.engine.earlier"):
        Pruner(model, {**CK, **settings}, updates_per_epoch=4)
    return list(caplog.messages)


@every_method
def test_a_finished_pruning_is_noticed_by_the_same_method(settings):
    run = Run(**settings).train_until(13)
    pruner = run.pruner
    assert list(earlier_pruning(pruner.layers.values())) == list(pruner.layers)
    fresh = Run(**settings)
    assert earlier_pruning(fresh.pruner.layers.values()) == {}


@every_method
def test_a_pruning_within_the_era_is_not_a_finished_one(settings):
    run = Run(**settings).train_until(6)
    run.pruner.remove()
    assert earlier_pruning(run.pruner.layers.values()) == {}


def test_the_notice_names_layers_shares_and_ways_out(caplog):
    model = Run().train_until(13).model
    assert notices(model, caplog) == [
        "4 of the 4 layers to prune hold the zeros of a finished pruning: stem (62.5%), body "
        "(58.3%), point (62.5%), head (60.0%). To continue its training, load the pruner's state "
        "by load_state_dict; without it these zeros are trained as other weights until the era. "
        "If only its dense epochs are to be left out, call skip_dense(epochs). If it is to be "
        "pruned again, ignore this"
    ]


@pytest.mark.parametrize(("amount", "count"), [(0.3, 1), (0.6, 1), (0.7, 0)])
def test_more_zeros_than_asked_are_noticed_and_fewer_are_not(amount, count, caplog):
    model = Run().train_until(13).model
    assert len(notices(model, caplog, amount=amount, fc={"amount": 0.9})) == count


def test_layers_that_are_pruned_already_are_named_alone(caplog):
    model = SmallNet()
    ck_structured(model.body, amount=0.75)
    make_permanent(model.body, "weight")
    (message,) = notices(model, caplog)
    assert message.startswith("1 of the 4 layers to prune hold the zeros of a finished pruning: bo")


def test_single_zeros_are_not_whole_kernels(caplog):
    model = SmallNet()
    magnitude_unstructured(model.body, amount=0.7)
    make_permanent(model.body, "weight")
    assert notices(model, caplog) == []
    assert len(notices(model, caplog, method="magnitude")) == 1


def test_fresh_and_zero_initialized_networks_are_not_noticed(caplog):
    model = SmallNet()
    for name in LAYERS[1:]:
        nn.init.zeros_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert notices(model, caplog) == []


def test_the_notice_changes_nothing(caplog):
    model = Run(method="random").train_until(13).model
    before = torch.random.get_rng_state()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    assert len(notices(model, caplog, method="random")) == 1
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
