"""Training runs of a second: the recipe, its data, and processes that are killed."""

import itertools
import json
import logging
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from starfire_prune import Pruner
from starfire_prune.data import Datasets, load_datasets
from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs import checkpoint
from starfire_prune.runs import data as run_data
from starfire_prune.training import train as training
from starfire_prune.utils.console import log_to_console

# Four updates an epoch, the last of a smaller batch; a dense epoch, two of the era, a fixed one
RECIPE = """\
model: {name: resnet18, num_classes: 10, options: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}}
data: {name: digits, image_size: 16, batch_size: 16, workers: 0}
optimizer: {name: sgd, lr: 0.05, weight_decay: 1.0e-4}
lr_schedule: {milestones: [2], gamma: 0.1}
epochs: 4
seed: 3
training: {threads: 1}
pruning: {method: ck, amount: 0.6, era: [1, 3]}
"""

Moment = Literal["after the checkpoint", "before the checkpoint", "within the epoch"]


class Killed(BaseException):
    """What ends a run in place of a signal: no handler of the package may catch it."""


def write_recipe(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def small_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder), overrides)


def fresh_model(recipe: Recipe) -> nn.Module:
    """The dense model of a recipe, randomly initialized."""
    model: nn.Module = timm.create_model(
        recipe.model.name, num_classes=recipe.model.num_classes, **recipe.model.options
    )
    return model


def few_digits(name: str, **options: Any) -> Datasets:
    """Any data set, but of the digits only the first: 56 to train on, 24 to evaluate on."""
    datasets = load_datasets(name, **options)
    if name != "digits":
        return datasets
    train, val = Subset(datasets.train, range(56)), Subset(datasets.val, range(24))
    return replace(datasets, train=train, val=val)


def make_photographs(root: Path, train: int = 14, val: int = 5) -> Path:
    """A folder data set of two classes of noise, each of another brightness."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(60 * label, 196 + 60 * label, (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@contextmanager
def small_runs(plot: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """Let `train` read few digits on the CPU, and leave threads and Accelerate's state alone."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")  # resumed runs repeat bit for bit there
        patch.setattr(run_data, "load_datasets", few_digits)
        if not plot:  # half of such a run's time
            patch.setattr(training, "plot_training", lambda *args, **options: None)
        patch.setattr(logging.getLogger("starfire_prune"), "handlers", [])
        log_to_console()
        new_process()
        yield patch
    new_process()
    torch.set_num_threads(threads)


def new_process() -> None:
    """Forget what a process keeps beside its run's folder, and leave other random states."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(random.SystemRandom().getrandbits(32))
    np.random.seed(random.SystemRandom().getrandbits(32))
    random.seed()


def train_killed(
    recipe: Recipe, folder: Path, epoch: int, moment: Moment, fork: Path | None = None
) -> None:
    """Train in a new process that dies in `epoch`, which must come to pass."""
    new_process()
    save, step, batches = checkpoint.save_checkpoint, Pruner.step, itertools.count(1)

    def save_and_die(folder: Path, done: int, *args: Any) -> None:
        if done != epoch + 1:
            save(folder, done, *args)
            return
        if moment == "after the checkpoint":
            save(folder, done, *args)
        raise Killed

    def step_and_die(pruner: Pruner, updated: bool = True) -> None:
        step(pruner, updated)
        if pruner.epoch == epoch and next(batches) == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if moment == "within the epoch":
            patch.setattr(Pruner, "step", step_and_die)
        else:
            patch.setattr(training, "save_checkpoint", save_and_die)
        with pytest.raises(Killed) as caught:
            training.train(recipe, folder, fork=fork)
    traceback.clear_frames(caught.tb)  # ends the loader's processes, as garbage they take 10 s


def train_on(recipe: Recipe, folder: Path) -> None:
    """Train in a new process, from the last checkpoint if there is one."""
    new_process()
    training.train(recipe, folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without what differs between runs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
