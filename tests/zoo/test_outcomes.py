"""How attempts are judged."""

import re

import pytest
import torch
from torch import nn

from starfire_prune import Pruner
from starfire_prune.utils.errors import PruningError
from tests.zoo.outcomes import WrongError, attempt, named_in

NAMES = ["stem", "blocks.0", "blocks.0.conv1"]


def endless():
    while True:
        pass


def refused_plan():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    Pruner(
        model,
        {"method": "ck", "amount": 0.6, "era": [0, 1], "include": "head"},
        updates_per_epoch=1,
    )


def foreign_error():
    torch.ones(2) @ torch.ones(3)


def own_error():
    raise PruningError("layer stem is wrong")  # not raised within the package


def wrong():
    raise WrongError("other outputs")


@pytest.mark.parametrize(
    ("action", "status"),
    [
        (lambda: "a remark", "right"),
        (refused_plan, "refused"),
        (foreign_error, "unclear"),
        (own_error, "unclear"),
        (wrong, "wrong"),
        (endless, "late"),
    ],
)
def test_an_attempt_ends_in_one_way(action, status):
    assert attempt(action, NAMES, limit=0.3).status == status


def test_an_error_that_names_nothing_is_unclear(monkeypatch):
    assert attempt(refused_plan, NAMES, limit=5).status == "refused"  # by `pruning.include`
    monkeypatch.setattr("tests.zoo.outcomes._ARGUMENT", re.compile("no argument"))
    outcome = attempt(refused_plan, NAMES, limit=5)
    assert outcome.text.startswith("names neither a layer nor an argument: ValueError: pruning.")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("layer stem is wrong", ["stem"]),
        ("the stem is wrong", []),
        ("blocks.0.conv1: wrong", ["blocks.0.conv1"]),
        ("blocks.0, blocks.0.conv1", ["blocks.0.conv1", "blocks.0"]),
        ("blocks.01", []),
    ],
)
def test_the_modules_that_a_text_names(text, names):
    assert named_in(text, NAMES) == names
