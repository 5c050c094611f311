"""The training run of a recipe: an Accelerate loop in which pruning is one call per update."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from starfire_prune.engine.sparsity import format_table, measure_sparsity
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.checkpoint import load_checkpoint, save_checkpoint
from starfire_prune.runs.environment import check_environment
from starfire_prune.runs.folder import (
    QUANTIZATION_PHASE,
    RunError,
    append_metrics,
    check_writable,
    checkpoints_of,
    create_folder,
    exported_file,
    int8_file,
    locked,
    read_metrics,
)
from starfire_prune.runs.resume import (
    begin_folder,
    checkpoint_to_resume,
    forked_checkpoint,
    resume_notices,
)
from starfire_prune.serialization.pruned import save_pruned
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.loop import run_epoch
from starfire_prune.training.plan import plan_text
from starfire_prune.training.plots import plot_training
from starfire_prune.training.preflight import check_run
from starfire_prune.training.quantization import (
    begin_quantization,
    explained_divergence,
    export_quantized,
)
from starfire_prune.training.setup import (
    Run,
    check_ranks_data_alike,
    check_ranks_start_alike,
    prepare_run,
)
from starfire_prune.training.tracking import log_metrics, start_trackers
from starfire_prune.utils.files import writing
from starfire_prune.utils.limits import explained_limits

__all__ = ["train"]

_LOGGER = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    fork: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Train a recipe, and write all results into `folder`.

    A folder that holds an unfinished run of the same recipe is resumed from its last checkpoint:
    on a CPU, a resumed run equals an uninterrupted one bit for bit. The folder holds the resolved
    `recipe.yaml`, `environment.json`, `metrics.jsonl` (one object per epoch), `training.png`,
    `checkpoints/` (the last two), `logs/` (of trackers) and, at the end,
    `export/model.safetensors`, and `export/int8.safetensors` after a quantization phase. The plan
    of the run is checked and logged before the first batch.

    Args:
        recipe: Recipe to train; see `starfire_prune.recipe`.
        folder: Folder of the run; it is created if it doesn't exist.
        resume: Raise an error if there is nothing to resume.
        fork: Folder of a run whose recipe differs only in `pruning` and `quantization`. The epochs
            that both recipes train alike are taken over from its last checkpoint of them, unless
            `folder` has a checkpoint already.
        dry_run: Stop after the plan, and write nothing.

    Raises:
        RunError: If the folder holds another recipe's run or a finished one, there is nothing to
            resume, the environment would not reproduce the run, or it can't be trained here.
        CheckpointError: If the checkpoint to resume from is damaged, or the disk is full.
        DataError, ValueError: For data, layers and settings that don't fit.
    """
    accelerator = create_accelerator(recipe, folder)
    check_writable(folder)
    writes = accelerator.is_main_process and not dry_run
    with ExitStack() as stack:
        existed = folder.is_dir()
        if writes and existed:
            stack.enter_context(locked(folder))
        start = _find_start(recipe, folder, accelerator, resume, fork)
        run, first_epoch = _prepare(recipe, folder, accelerator, start)
        if dry_run:
            return
        if writes:
            if not existed:
                create_folder(folder)
                stack.enter_context(locked(folder))
            begin_folder(folder, recipe, accelerator, first_epoch, start.source)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, recipe, folder, 0 if start.source else first_epoch)
        for row in read_metrics(folder) if start.source else ():
            log_metrics(accelerator, row)
        _train_epochs(run, first_epoch)
        _finish(run)
        accelerator.end_training()


# Before the first epoch


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a run starts from.

    Attributes:
        checkpoint: The checkpoint to continue from; None for a new run.
        source: Folder of the run that the checkpoint is taken over from; None if it is this run's.
        prunes_otherwise: Whether that run has another pruning.
    """

    checkpoint: Path | None
    source: Path | None = None
    prunes_otherwise: bool = False


def _find_start(
    recipe: Recipe, folder: Path, accelerator: Accelerator, resume: bool, fork: Path | None
) -> _Start:
    start = _Start(checkpoint_to_resume(folder, recipe, resume=resume))
    if fork is not None and start.checkpoint is None:
        checkpoint, other = forked_checkpoint(fork, recipe)
        start = _Start(checkpoint, fork, prunes_otherwise=other.pruning != recipe.pruning)
    if start.checkpoint is not None:
        check_environment(start.source or folder, accelerator)
    if start.checkpoint is not None and start.source is None:
        for notice in resume_notices(folder, recipe):
            _log(accelerator, notice)
    return start


def _prepare(
    recipe: Recipe, folder: Path, accelerator: Accelerator, start: _Start
) -> tuple[Run, int]:
    """Prepare a run, check and log its plan, and restore its checkpoint if there is one.

    Returns:
        The run, and the number of epochs that are done.
    """
    checkpoint = start.checkpoint
    check_ranks_start_alike(recipe, checkpoint, accelerator)
    run = prepare_run(recipe, folder, accelerator, fresh=checkpoint is None)
    check_ranks_data_alike(run)
    check_run(run)
    _log(accelerator, plan_text(run, checkpoint))
    if checkpoint is None:
        return run, 0
    done = _restore(run, checkpoint, forks=start.prunes_otherwise)
    verb = "resumed" if start.source is None else f"forked {start.source} for"
    _log(accelerator, f"{verb} {folder} after {done} of {recipe.total_epochs} epochs")
    return run, done


def _restore(run: Run, checkpoint: Path, *, forks: bool) -> int:
    """Restore a checkpoint, and return the number of epochs that are done."""
    average = run.average.module if run.average is not None else None
    parts = (run.model, run.optimizer, run.pruner, average)
    state = load_checkpoint(checkpoint, *parts, forks=forks)
    scaler = run.accelerator.scaler
    if scaler is not None:
        scaler.load_state_dict(state["extra"]["scaler"])
    run.average_updates = state["extra"].get("average_updates", 0)
    done = int(state["epoch"])
    if done > run.recipe.epochs:
        begin_quantization(run, state["quantization"])
    return done


# Epochs


def _train_epochs(run: Run, first_epoch: int) -> None:
    limits = explained_limits(
        RunError,
        less_memory="lower data.batch_size (and raise training.gradient_accumulation), or set "
        "training.mixed_precision=bf16, with another --output, since this is another training",
        fewer_workers="lower data.workers; the command then continues from the last checkpoint",
    )
    with limits:
        for epoch in range(first_epoch, run.recipe.total_epochs):
            if epoch == run.recipe.epochs:
                begin_quantization(run)
            with explained_divergence(run):
                metrics = run_epoch(run, epoch)
            _record(run, metrics)
            run.accelerator.wait_for_everyone()


def _record(run: Run, metrics: dict[str, Any]) -> None:
    """Write an epoch's metrics and its checkpoint, and log a line."""
    accelerator = run.accelerator
    if not math.isfinite(metrics["val_loss"]):
        raise RunError(
            f"training has diverged: after epoch {metrics['epoch']} the loss is "
            f"{metrics['val_loss']}; lower optimizer.lr (={run.recipe.optimizer.lr}), set "
            f"lr_schedule.warmup_epochs or training.clip_grad_norm"
        )
    if accelerator.is_main_process:
        append_metrics(run.folder, metrics)
    log_metrics(accelerator, metrics)
    scaler = accelerator.scaler
    extra: dict[str, Any] = {"scaler": scaler.state_dict()} if scaler is not None else {}
    average = None
    if run.average is not None:
        average = run.average.module
        extra["average_updates"] = run.average_updates
    folder = checkpoints_of(run.folder)
    done = metrics["epoch"] + 1
    keep = run.recipe.training.keep_checkpoints
    ranges = None if run.quantized is None else run.quantized.state()
    parts = (run.model, run.optimizer, run.pruner, extra, average, keep, ranges)
    save_checkpoint(folder, done, *parts)
    _log(accelerator, _epoch_line(metrics, run.recipe.total_epochs))


def _epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    average = f"average {metrics['ema_top1']:.2%}  " if "ema_top1" in metrics else ""
    return (
        f"epoch {metrics['epoch'] + 1}/{epochs}  loss {metrics['train_loss']:.4f}  "
        f"top-1 {metrics['top1']:.2%}  {average}phase {metrics['phase']}  "
        f"target {metrics['target_sparsity']:.2%}  sparsity {metrics['sparsity']:.2%}  "
        f"{metrics['images_per_s']:.0f} images/s"
    )


# After the last epoch


def _finish(run: Run) -> None:
    """Draw the picture, log the results and export the weights."""
    accelerator = run.accelerator
    picture, exported = run.folder / "training.png", exported_file(run.folder)
    rows = read_metrics(run.folder)
    if accelerator.is_main_process:
        with writing(picture):
            plot_training(rows, picture, title=run.folder.name)
    model, decay = run.model, None
    if run.average is not None:
        model, decay = run.average.module, run.average.decay
    pruner = run.pruner
    sparsity = pruner.sparsity(model) if pruner is not None else measure_sparsity(model)
    _log(accelerator, format_table(sparsity))
    for name, reason in pruner.kept_columns().items() if pruner is not None else ():
        _log(accelerator, f"{name} keeps all its columns: {reason}")
    for line in _accuracy_lines(rows):
        _log(accelerator, line)
    settings = run.recipe.model
    architecture = {"name": settings.name, "num_classes": settings.num_classes, **settings.options}
    unfinished = None if pruner is None else pruner.unfinished_text()
    if unfinished is not None:  # a gradient scaler has skipped steps of an era in updates
        _log(accelerator, f"the weights are exported as they are, but {unfinished}")
    export_quantized(run, architecture)
    save_pruned(  # last, because it marks the run as finished
        model,
        exported,
        pruner=pruner,
        architecture=architecture,
        average_decay=decay,
        unfinished=unfinished is not None,
    )
    average = " (the average)" if decay else ""
    _log(accelerator, f"weights{average}: {exported}\npicture: {picture}")
    if run.quantized is not None:
        _log(accelerator, f"int8 model: {int8_file(run.folder)}")


def _accuracy_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    last = rows[-1]
    yield f"top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%} after {last['epoch'] + 1} epochs"
    before = [row for row in rows if row["phase"] != QUANTIZATION_PHASE]
    if len(before) < len(rows):
        yield f"that is in int8; in floating point before: top-1 {before[-1]['top1']:.2%}"
    if "ema_top1" in last:
        yield f"average of the weights: top-1 {last['ema_top1']:.2%}, top-5 {last['ema_top5']:.2%}"


def _log(accelerator: Accelerator, message: str) -> None:
    """Log a message on the main process only."""
    if accelerator.is_main_process:
        _LOGGER.info(message)
