"""The plan of a run, as text for its user."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from starfire_prune.engine.progress import era_in_updates
from starfire_prune.engine.pruner import Pruner
from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.engine.sparsity import left_out_text, weights_left_out
from starfire_prune.runs.checkpoint import KEPT_CHECKPOINTS
from starfire_prune.runs.folder import existing_part
from starfire_prune.training.disk_space import checkpoint_bytes, gigabytes, mask_bytes, state_bytes
from starfire_prune.training.learning_rate import learning_rate_factor, recipe_factor
from starfire_prune.training.setup import Run
from starfire_prune.utils.modules import layer_weight, unwrap
from starfire_prune.utils.text import format_columns

__all__ = ["plan_text"]


def plan_text(run: Run, checkpoint: Path | None = None) -> str:
    """Describe what a run is going to do.

    Args:
        run: The prepared run.
        checkpoint: Checkpoint from which the run continues, if there is one.

    Returns:
        Lines about the model, the data, the batch, the learning rates, the start, the pruning, the
        quantization, the memory of masks and the disk space, and a table of the pruned layers.
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
                *_uncounted_rows(run),
                *_quantization_rows(run),
                ("memory", _memory_line(run)),
                *_gradient_rows(run),
                ("disk", _disk_line(run)),
            ]
        ),
    ]
    if run.pruner is not None:
        lines += ["", _layer_table(run.pruner)]
    return "\n".join(lines) + "\n"


# Lines


def _model_line(run: Run) -> str:
    count = sum(weight.numel() for weight in run.model.parameters())
    return f"{run.recipe.model.name}, {count:,} parameters, {run.recipe.model.num_classes} classes"


def _data_line(run: Run) -> str:
    data, parts = run.recipe.data, (run.datasets.train, run.datasets.val)
    train, val = (len(part) for part in parts)  # type: ignore[arg-type]
    side = data.image_size
    return f"{data.name}: {train:,} images for training, {val:,} for evaluation, {side}x{side}"


def _batch_line(run: Run) -> str:
    size, processes = run.recipe.data.batch_size, run.accelerator.num_processes
    accumulation = run.recipe.training.gradient_accumulation
    return (
        f"{size * processes * accumulation:,} images per update: batch_size {size} x processes "
        f"{processes} x gradient_accumulation {accumulation}; {run.updates_per_epoch:,} updates "
        f"per epoch, {run.recipe.epochs} epochs"
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
        return f"continues from {checkpoint}"
    if pretrained is False:
        return f"from random weights, seed {run.recipe.seed}"
    source = "timm's weights" if pretrained is True else str(pretrained)
    fresh = f"; new: {', '.join(run.fresh_keys)}" if run.fresh_keys else ""
    return f"from {source}{fresh}"


def _pruning_line(run: Run) -> str:
    pruning = run.recipe.pruning
    if pruning == "none":
        return "none: dense training"
    updates = run.updates_per_epoch
    what = f"{pruning.method} to {pruning.amount:.1%}, {pruning.schedule}"
    first, end = era_in_updates(pruning, updates)
    span = f"updates {first + 1:,} to {end:,} of {run.recipe.epochs * updates:,}"
    if pruning.era is not None:
        return f"{what}, era {list(pruning.era)}: {span}"
    return f"{what}, {span}: epochs {first // updates} to {(end - 1) // updates}"


def _uncounted_rows(run: Run) -> list[tuple[str, str]]:
    """What the sparsity of the network doesn't count, if there is anything."""
    left_out = weights_left_out(run.model) if run.pruner is not None else ()
    if not left_out:
        return []
    text = left_out_text(left_out)
    return [("sparsity", f"of all convolution and linear weights, without {text}")]


def _quantization_rows(run: Run) -> list[tuple[str, str]]:
    """The quantization phase, if the recipe has one."""
    settings, recipe = run.recipe.quantization, run.recipe
    if settings is None:
        return []
    rate = recipe.optimizer.lr * recipe_factor(recipe, recipe.epochs)
    first, last = recipe.epochs, recipe.total_epochs - 1
    return [("int8", f"trained in epochs {first} to {last}, learning rate {rate:.4g}, in float32")]


def _memory_line(run: Run) -> str:
    copies = 1 if run.average is None else 2
    return f"{gigabytes(copies * mask_bytes(run))} of masks per process"


def _gradient_rows(run: Run) -> list[tuple[str, str]]:
    """The effect of `training.compress_gradients` on this run, if it is set."""
    if not run.recipe.training.compress_gradients:
        return []
    pruning, processes = run.recipe.pruning, run.accelerator.num_processes
    if processes == 1:
        return [("gradients", "compress_gradients has no effect: a single process sends none")]
    if run.pruner is None or pruning == "none":
        return [("gradients", "compress_gradients has no effect in dense training")]
    end = math.ceil(era_in_updates(pruning, run.updates_per_epoch)[1] / run.updates_per_epoch)
    if end == run.recipe.epochs:
        return [("gradients", "compress_gradients has no effect: the run ends with the era")]
    total = sum(weight.nbytes for weight in run.model.parameters() if weight.requires_grad)
    weights = [(layer.amount, layer_weight(layer.module)) for layer in run.pruner.layers.values()]
    pruned = sum(amount * weight.nbytes for amount, weight in weights if weight.requires_grad)
    return [
        (
            "gradients",
            f"{gigabytes(total)} averaged per update, about {gigabytes(total - pruned)} from epoch "
            f"{end} on",
        )
    ]


def _disk_line(run: Run) -> str:
    free = shutil.disk_usage(existing_part(run.folder)).free
    epochs = ", ".join(map(str, run.recipe.training.keep_checkpoints))
    others = f" and those after {epochs} epochs" if epochs else ""
    return (
        f"about {gigabytes(checkpoint_bytes(run))} per checkpoint, the last "
        f"{KEPT_CHECKPOINTS}{others} are kept; {gigabytes(state_bytes(unwrap(run.model)))} "
        f"exported; {gigabytes(free)} free"
    )


def _layer_table(pruner: Pruner) -> str:
    """The layers that are pruned, and those that are left out although `*` selects them."""
    header = ("layer", "shape", "method", "target", "scopes", "of units")
    rows = [_layer_row(layer) for layer in pruner.layers.values()]
    rows += [(name, "", f"none: {reason}", "", "", "") for name, reason in pruner.left_out.items()]
    return format_columns(header, rows, left=range(3))


def _layer_row(layer: PrunedLayer) -> tuple[str, ...]:
    units = layer.method.units(layer.shape)
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        f"{layer.method_name} {layer.method.detail(layer.shape)}".rstrip(),
        f"{layer.amount:.1%}",
        f"{units.scopes:,}",
        f"{units.size:,}",
    )


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:<9}  {text}" for name, text in rows]
