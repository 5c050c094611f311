"""The plan of a run: what is going to happen, checked and told before the first batch."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from starfire_prune.checkpoint import KEPT_CHECKPOINTS
from starfire_prune.layers import PrunedLayer, layer_weight, unwrap
from starfire_prune.learning_rate import learning_rate_factor
from starfire_prune.preparation import Run, create_optimizer, example_images
from starfire_prune.report import format_columns
from starfire_prune.run_folder import RunError, checkpoints_of, existing_part

__all__ = ["check_run", "checkpoint_bytes", "plan_text"]

_GIGABYTE = 1e9


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


def plan_text(run: Run, checkpoint: Path | None = None) -> str:
    """The plan of a run, to be read before it begins.

    Args:
        run: as it was prepared.
        checkpoint: from which it goes on, if it does.

    Returns:
        Lines: the data, epochs and updates, the batch, the learning rates, the start, the layers
        with their method, locales, target and shape, the memory of masks and the disk space.
    """
    lines = [
        f"plan of {run.folder}",
        *_aligned(
            [
                ("model", _model_line(run)),
                ("data", _data_line(run)),
                ("batch", _batch_line(run)),
                ("optimizer", _optimizer_line(run)),
                ("start", _start_line(run, checkpoint)),
                ("pruning", _pruning_line(run)),
                ("memory", _memory_line(run)),
                *_gradient_rows(run),
                ("disk", _disk_line(run)),
            ]
        ),
    ]
    if run.pruner is not None:
        lines += ["", _layer_table(run.pruner.layers.values())]
    return "\n".join(lines) + "\n"


def checkpoint_bytes(run: Run) -> int:
    """About how large a checkpoint of the run is: model, average, optimizer state and masks."""
    model = unwrap(run.model)
    copies = 1 if run.average is None else 2
    return int(copies * _state_bytes(model) + _optimizer_bytes(run) + _mask_bytes(run))


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
            f"{place} has {_size(free)} free, and the run needs about {_size(need)} for its "
            f"checkpoints and export: make room, or choose another --output"
        )


def _bytes_to_write(run: Run) -> int:
    """What is still to be written at the most: a checkpoint is whole before an older one goes."""
    there = len(list(checkpoints_of(run.folder).glob("epoch-*")))
    kept = KEPT_CHECKPOINTS + len(run.recipe.training.keep_checkpoints)
    return max(kept + 1 - there, 1) * checkpoint_bytes(run) + _state_bytes(unwrap(run.model))


# Sizes


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _optimizer_bytes(run: Run) -> float:
    """The state that the optimizer will have, as it has it for a small parameter."""
    probe = nn.Parameter(torch.zeros(16, 16))
    optimizer = create_optimizer(run.recipe.optimizer, [probe])
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer.step()
    except RuntimeError as error:
        raise RunError(
            f"optimizer.name (={run.recipe.optimizer.name}) can't take a step by gradients alone: "
            f"{error}"
        ) from error
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    share = sum(value.nbytes for value in state if value.ndim) / probe.nbytes
    return share * sum(weight.nbytes for weight in run.model.parameters() if weight.requires_grad)


def _mask_bytes(run: Run) -> int:
    """A byte a weight of the pruned layers."""
    if run.pruner is None:
        return 0
    return sum(layer_weight(layer.module).numel() for layer in run.pruner.layers.values())


def _size(count: float) -> str:
    return f"{count / _GIGABYTE:.2f} GB" if count >= _GIGABYTE / 10 else f"{count / 1e6:.1f} MB"


# Lines


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<9}  {text}" for name, text in rows]


def _model_line(run: Run) -> str:
    count = sum(weight.numel() for weight in run.model.parameters())
    return f"{run.recipe.model.name}, {count:,} parameters, {run.recipe.model.num_classes} classes"


def _data_line(run: Run) -> str:
    data, parts = run.recipe.data, (run.datasets.train, run.datasets.val)
    train, val = (len(part) for part in parts)  # type: ignore[arg-type]
    side = data.image_size
    return f"{data.name}: {train:,} images to train on, {val:,} to evaluate on, {side}x{side}"


def _batch_line(run: Run) -> str:
    size, processes = run.recipe.data.batch_size, run.accelerator.num_processes
    accumulation = run.recipe.training.gradient_accumulation
    return (
        f"{size * processes * accumulation:,} images an update: batch_size {size} x processes "
        f"{processes} x gradient_accumulation {accumulation}; {run.updates_per_epoch:,} updates an "
        f"epoch, {run.recipe.epochs} epochs"
    )


def _optimizer_line(run: Run) -> str:
    settings, epochs = run.recipe.optimizer, run.recipe.epochs
    rates = [
        (settings.lr * learning_rate_factor(run.recipe.lr_schedule, epoch, epochs), epoch)
        for epoch in range(epochs)
    ]
    starts = [next(group) for _, group in groupby(rates, key=lambda rate: rate[0])]
    shown = [f"{rate:.4g} from epoch {epoch}" for rate, epoch in starts]
    if len(shown) > 6:
        shown = [*shown[:3], "…", shown[-1]]
    return f"{settings.name}, learning rate {', '.join(shown)}"


def _start_line(run: Run, checkpoint: Path | None) -> str:
    pretrained = run.recipe.model.pretrained
    if checkpoint is not None:
        return f"goes on from {checkpoint}"
    if pretrained is False:
        return f"from random weights, seed {run.recipe.seed}"
    source = "timm's weights" if pretrained is True else str(pretrained)
    fresh = f"; new: {', '.join(run.fresh_keys)}" if run.fresh_keys else ""
    return f"from {source}{fresh}"


def _pruning_line(run: Run) -> str:
    pruning = run.recipe.pruning
    if pruning == "none":
        return "none: dense training"
    first, end = pruning.era
    updates = run.updates_per_epoch
    return (
        f"{pruning.method} to {pruning.amount:.1%}, {pruning.schedule}, era [{first}, {end}]: "
        f"updates {first * updates + 1:,} to {end * updates:,} of {run.recipe.epochs * updates:,}"
    )


def _memory_line(run: Run) -> str:
    copies = 1 if run.average is None else 2
    return f"{_size(copies * _mask_bytes(run))} of masks a process"


def _gradient_rows(run: Run) -> list[tuple[str, str]]:
    """What `training.compress_gradients` does in this run, where it is set."""
    if not run.recipe.training.compress_gradients:
        return []
    pruning, processes = run.recipe.pruning, run.accelerator.num_processes
    if processes == 1:
        return [("gradients", "compress_gradients has no effect: a single process sends none")]
    if run.pruner is None or pruning == "none":
        return [("gradients", "compress_gradients has no effect in dense training")]
    if pruning.era[1] == run.recipe.epochs:
        return [("gradients", "compress_gradients has no effect: the run ends with the era")]
    whole = sum(weight.nbytes for weight in run.model.parameters() if weight.requires_grad)
    weights = [(layer.amount, layer_weight(layer.module)) for layer in run.pruner.layers.values()]
    gone = sum(amount * weight.nbytes for amount, weight in weights if weight.requires_grad)
    return [
        (
            "gradients",
            f"{_size(whole)} averaged an update, about {_size(whole - gone)} from epoch "
            f"{pruning.era[1]} on",
        )
    ]


def _disk_line(run: Run) -> str:
    free = shutil.disk_usage(existing_part(run.folder)).free
    epochs = ", ".join(map(str, run.recipe.training.keep_checkpoints))
    others = f" and those after {epochs} epochs" if epochs else ""
    return (
        f"about {_size(checkpoint_bytes(run))} a checkpoint, the last {KEPT_CHECKPOINTS}{others} "
        f"are kept; {_size(_state_bytes(unwrap(run.model)))} exported; {_size(free)} free"
    )


def _layer_table(layers: Iterable[PrunedLayer]) -> str:
    header = ("layer", "shape", "method", "target", "locales", "of units")
    return format_columns(header, [_layer_row(layer) for layer in layers], left=range(3))


def _layer_row(layer: PrunedLayer) -> tuple[str, ...]:
    shape = layer_weight(layer.module).shape
    method = layer.method_at(1.0)
    _, units = method.counts(shape)[0]
    return (
        layer.name,
        "x".join(map(str, shape)),
        layer.method,
        f"{layer.amount:.1%}",
        f"{method.locales(shape):,}",
        f"{units:,}",
    )
