"""Checks before a run starts: one forward pass, the compiler, the disk."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from starfire_prune.runs.checkpoint import KEPT_CHECKPOINTS
from starfire_prune.runs.folder import RunError, checkpoints_of, existing_part
from starfire_prune.training.disk_space import checkpoint_bytes, gigabytes, state_bytes
from starfire_prune.training.setup import Run, example_images
from starfire_prune.utils.modules import unwrap

__all__ = ["check_run"]


def check_run(run: Run) -> None:
    """Let what can be known to fail, fail now: reading an image, a forward pass, compiling, space.

    Args:
        run: as it was prepared; it is left as it was.

    Raises:
        DataError: if the first image of a part can't be read.
        RunError: if the model can't take the images, a compiler is missing, the optimizer can't
            take a step, or the disk is too full for the run's checkpoints.
    """
    _check_accumulation(run)
    for dataset in (run.datasets.train, run.datasets.val):
        _first(dataset)
    _check_forward(run)
    _check_training_forward(run)
    if run.recipe.training.compile:
        _check_compiler(run.accelerator.device)
    if run.accelerator.is_main_process:  # which writes
        _check_space(run)


# What can fail


def _first(dataset: Any) -> Tensor:
    """The first image of a part of the data."""
    item = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
    image: Tensor = item[0]
    return image


@torch.no_grad()
def _check_forward(run: Run) -> None:
    model, size = unwrap(run.model), run.recipe.data.image_size
    images = example_images(run.recipe, run.accelerator.device)
    was_training = model.training
    model.eval()
    try:
        with run.accelerator.autocast():
            logits = model(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RunError(
            f"model {run.recipe.model.name} can't take images of data.image_size (={size}): {error}"
        ) from error
    finally:
        model.train(was_training)
    classes = run.recipe.model.num_classes
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        raise RunError(
            f"model {run.recipe.model.name} doesn't give {classes} numbers an image: it must be a "
            f"classifier; correct model.name or model.options"
        )


@torch.no_grad()
def _check_training_forward(run: Run) -> None:
    """Batch norms can't train on a single value a channel; on a copy, for its statistics change."""
    model = copy.deepcopy(unwrap(run.model)).train()
    size = min(run.recipe.data.batch_size, len(run.datasets.train), 2)  # type: ignore[arg-type]
    try:
        with run.accelerator.autocast():
            model(example_images(run.recipe, run.accelerator.device)[:size])
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"model {run.recipe.model.name} can't train on batches of {size}: {error}; raise "
            f"data.batch_size (={run.recipe.data.batch_size}) or data.image_size "
            f"(={run.recipe.data.image_size}), or give it more than one image"
        ) from error


def _check_accumulation(run: Run) -> None:
    accumulation, batches = run.recipe.training.gradient_accumulation, len(run.train_loader)
    if accumulation > batches:
        raise RunError(
            f"training.gradient_accumulation (={accumulation}) is more than the {batches} batches "
            f"of an epoch, of which each counts as 1/{accumulation} of an update: set it to "
            f"{batches} at the most, or lower data.batch_size"
        )


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2, device=device))
    except Exception as error:  # of whatever kind a missing compiler gives
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"training.compile (=true) does not work here: {first}; install a C++ compiler (GPUs: "
            f"Triton), or set it to false"
        ) from error


def _check_space(run: Run) -> None:
    place = existing_part(run.folder)
    free, need = shutil.disk_usage(place).free, _bytes_to_write(run)
    if free < need:
        raise RunError(
            f"{place} has {gigabytes(free)} free, and the run needs about {gigabytes(need)} "
            f"for its checkpoints and export: make room, or choose another --output"
        )


def _bytes_to_write(run: Run) -> int:
    """What is still to be written at the most: a checkpoint is whole before an older one goes."""
    there = len(list(checkpoints_of(run.folder).glob("epoch-*")))
    kept = KEPT_CHECKPOINTS + len(run.recipe.training.keep_checkpoints)
    return max(kept + 1 - there, 1) * checkpoint_bytes(run) + state_bytes(unwrap(run.model))
