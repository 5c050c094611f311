"""A small network at any update of its training, with its optimizer and its pruner."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starfire_prune import Pruner
from starfire_prune.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.support.networks import SmallNet, train_step

UPDATES = 3  # an epoch
PHASES = ["dense", "era", "fixed"]


class Training:
    """A small network, its optimizer and its pruner, as far as some updates have brought them."""

    def __init__(self, updates: int = 0, seed: int = 0, **settings: object) -> None:
        self.model = SmallNet(seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.pruner = Pruner(
            self.model,
            {"method": "ck", "amount": 0.6, "era": [1, 2], **settings},
            updates_per_epoch=UPDATES,
            optimizer=self.optimizer,
        )
        self.go_on(range(updates))

    def go_on(self, updates: range) -> None:
        for update in updates:
            train_step(self.model, self.optimizer, update)
            self.pruner.step()
            if update % UPDATES == UPDATES - 1:
                self.pruner.end_epoch(update // UPDATES)

    def save(self, folder: Path, epoch: int = 2) -> Path:
        return save_checkpoint(folder, epoch, self.model, self.optimizer, self.pruner)

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, self.model, self.optimizer, self.pruner)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        states = self.optimizer.state_dict()["state"]
        return {
            **self.model.state_dict(),
            **{f"mask {name}": mask for name, mask in self.pruner.masks().items()},
            **{f"{key} {index}": states[index][key] for index in states for key in states[index]},
        }


def updates_in(phase: str) -> int:
    return {"dense": 2, "era": 5, "fixed": 7}[phase]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
