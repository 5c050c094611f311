"""A small training run whose pruner is saved and resumed, for the tests of the engine."""

import copy
import json
from typing import Any

import torch

from starfire_prune import Pruner
from tests.support.networks import (
    SmallNet,
    equal_states,
    hook_count,
    sgd,
    snapshot,
    train_step,
)

UPDATES, LAST = 4, 16  # updates an epoch and in all; the era is the epochs 1 and 2
PHASES = {"dense": 3, "era": 6, "era, second half": 10, "fixed": 13}  # updates done


class Run:
    """A model, its optimizer and its pruner, trained update by update."""

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        self.model = SmallNet(seed)
        self.optimizer = sgd(self.model)
        self.pruner = Pruner(
            self.model,
            {"method": "ck", "amount": 0.6, "era": [1, 3], **settings},
            updates_per_epoch=UPDATES,
            optimizer=self.optimizer,
            example_input=torch.zeros(2, 3, 8, 8),
        )
        self.n_updates = 0

    def train_until(self, n_updates: int) -> "Run":
        while self.n_updates < n_updates:
            train_step(self.model, self.optimizer, self.n_updates)
            self.pruner.step()
            self.n_updates += 1
            if self.n_updates % UPDATES == 0:
                self.pruner.end_epoch(self.pruner.epoch)
        return self

    def resume(self, saved: "Run") -> "Run":
        state = through_json(saved.pruner.state_dict())
        self.pruner.load_state_dict(state)
        self.model.load_state_dict(snapshot(saved.model), strict=True)
        self.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
        self.n_updates = saved.n_updates
        return self


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    masks = {name: mask.clone() for name, mask in state["masks"].items()}
    plain = {key: value for key, value in state.items() if key != "masks"}
    read: dict[str, Any] = json.loads(json.dumps(plain))
    assert read == plain
    return {**read, "masks": masks}


def assert_same(one: Run, other: Run) -> None:
    assert equal_states(snapshot(one.model), snapshot(other.model))
    assert equal_states(one.pruner.masks(), other.pruner.masks())
    assert one.pruner.phase == other.pruner.phase
    assert one.pruner.target_sparsity == other.pruner.target_sparsity
    assert hook_count(one.model) == hook_count(other.model)
