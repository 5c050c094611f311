"""Checks before a run starts: a first image, forward passes, the compiler and the disk."""

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
from starfire_prune.training.quantization import check_quantization
from starfire_prune.training.setup import Run, example_images
from starfire_prune.utils.modules import unwrap
from starfire_prune.utils.text import first_line

__all__ = ["check_run"]


def check_run(run: Run) -> None:
    """Raise errors now that the run would raise later: of images, model, compiler or disk.

    Args:
        run: The prepared run; it is not changed.

    Raises:
        DataError: If the first image of a data set can't be read.
        RunError: If the model doesn't accept the images or can't be quantized as the recipe asks, a
            compiler is missing, the optimizer can't make a step, or the disk is too full for the
            run's checkpoints.
        ModuleNotFoundError: If the quantization needs torchao, which is not installed.
    """
    _check_accumulation(run)
    _check_era(run)
    for dataset in (run.datasets.train, run.datasets.val):
        _read_first(dataset)
    _check_forward(run)
    _check_training_forward(run)
    check_quantization(run)
    if run.recipe.training.compile:
        _check_compiler(run.accelerator.device)
    if run.accelerator.is_main_process:  # the only one that writes
        _check_space(run)


def _check_accumulation(run: Run) -> None:
    accumulation, batches = run.recipe.training.gradient_accumulation, len(run.train_loader)
    if accumulation > batches:
        raise RunError(
            f"training.gradient_accumulation (={accumulation}) must be at most the {batches} "
            f"batches of an epoch, because each counts as 1/{accumulation} of an update: set it to "
            f"{batches}, or lower data.batch_size"
        )


def _check_era(run: Run) -> None:
    pruning, updates = run.recipe.pruning, run.recipe.epochs * run.updates_per_epoch
    if pruning == "none" or pruning.era_updates is None or pruning.era_updates[1] <= updates:
        return
    raise RunError(
        f"pruning.era_updates (={list(pruning.era_updates)}) ends after the run, which has "
        f"{updates:,} updates, {run.updates_per_epoch:,} in each of its {run.recipe.epochs:,} "
        f"epochs: lower its end to {updates} or less, or train more epochs"
    )


def _read_first(dataset: Any) -> None:
    """Read the first image of a data set."""
    _ = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]


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
            f"model {run.recipe.model.name} does not accept images of data.image_size (={size}): "
            f"{error}"
        ) from error
    finally:
        model.train(was_training)
    classes = run.recipe.model.num_classes
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        raise RunError(
            f"model {run.recipe.model.name} does not return {classes} numbers per image: it must "
            f"be a classifier; correct model.name or model.options"
        )


@torch.no_grad()
def _check_training_forward(run: Run) -> None:
    """Check that no batch norm gets a single value per channel, on which it can't train."""
    model = copy.deepcopy(unwrap(run.model)).train()  # the pass changes running statistics
    size = min(run.recipe.data.batch_size, len(run.datasets.train), 2)  # type: ignore[arg-type]
    try:
        with run.accelerator.autocast():
            model(example_images(run.recipe, run.accelerator.device)[:size])
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"model {run.recipe.model.name} can't train on batches of {size}: {error}; raise "
            f"data.batch_size (={run.recipe.data.batch_size}) or data.image_size "
            f"(={run.recipe.data.image_size}), or give more than one image"
        ) from error


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2, device=device))
    except Exception as error:  # a missing compiler raises errors of any kind
        raise RunError(
            f"training.compile (=true) does not work here: {first_line(error)}; install a C++ "
            f"compiler (GPUs: Triton), or set it to false"
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
    """The most bytes still to write; a new checkpoint is complete before an old one is removed."""
    there = len(list(checkpoints_of(run.folder).glob("epoch-*")))
    kept = KEPT_CHECKPOINTS + len(run.recipe.training.keep_checkpoints)
    return max(kept + 1 - there, 1) * checkpoint_bytes(run) + state_bytes(unwrap(run.model))
