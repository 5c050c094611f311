"""The training run of a recipe: a plain Accelerate loop in which pruning is one call an update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from starfire_prune.engine.sparsity import format_table, measure_sparsity
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.checkpoint import load_checkpoint, save_checkpoint
from starfire_prune.runs.environment import check_environment
from starfire_prune.runs.folder import (
    RunError,
    append_metrics,
    check_writable,
    checkpoints_of,
    exported_file,
    locked,
    read_metrics,
)
from starfire_prune.runs.resume import begin_folder, checkpoint_to_resume, forked_checkpoint
from starfire_prune.serialization.pruned import save_pruned
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.loop import run_epoch
from starfire_prune.training.plan import plan_text
from starfire_prune.training.plots import plot_training
from starfire_prune.training.preflight import check_run
from starfire_prune.training.setup import (
    Run,
    check_ranks_data_alike,
    check_ranks_start_alike,
    prepare_run,
)
from starfire_prune.training.tracking import log_metrics, start_trackers
from starfire_prune.utils.files import writing

__all__ = ["train"]


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    fork: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Train as `recipe` says, and leave everything in `folder`.

    A folder that holds an unfinished run of the same recipe is resumed from its last checkpoint:
    an unbroken run and a resumed one end with the same bits on a CPU. It holds the resolved
    `recipe.yaml`, `environment.json`, `metrics.jsonl` (an object an epoch), `training.png`,
    `checkpoints/` (the last two), `logs/` (of trackers) and, at the end,
    `export/model.safetensors`. Before the first batch the plan of the run is checked and printed.

    Args:
        recipe: see `starfire_prune.recipe`.
        folder: of the run; made if it isn't there.
        resume: refuse to start from nothing.
        fork: folder of a run whose recipe differs in `pruning` alone. The epochs that both train
            dense are taken over from its last checkpoint of them, unless `folder` has one already.
        dry_run: stop after the plan, with nothing written.

    Raises:
        RunError: if the folder holds another recipe's run or a finished one, there is nothing to
            resume, the environment would not reproduce the run, or it can't be trained here.
        CheckpointError: if the checkpoint to resume from is damaged, or the disk is full.
        DataError, ValueError: for data, layers and settings that don't fit.
    """
    accelerator = create_accelerator(recipe, folder)
    check_writable(folder)
    writes = accelerator.is_main_process and not dry_run
    with ExitStack() as stack:
        was_there = folder.is_dir()
        if writes and was_there:
            stack.enter_context(locked(folder))
        start = _start(recipe, folder, accelerator, resume, fork)
        run, first_epoch = _planned(recipe, folder, accelerator, start)
        if dry_run:
            return
        if writes:
            if not was_there:
                folder.mkdir(parents=True)  # refused if another run has made it meanwhile
                stack.enter_context(locked(folder))
            begin_folder(folder, recipe, accelerator, first_epoch, start.source)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, recipe, folder, 0 if start.source else first_epoch)
        for row in read_metrics(folder) if start.source else ():
            log_metrics(accelerator, row)
        with _told():
            for epoch in range(first_epoch, recipe.epochs):
                _record(run, run_epoch(run, epoch))
                accelerator.wait_for_everyone()
        _finish(run)
        accelerator.end_training()


@dataclasses.dataclass(frozen=True)
class _Start:
    """From where a run goes on: a checkpoint, its own or of the run `source`, or nothing."""

    checkpoint: Path | None
    source: Path | None = None


def _start(
    recipe: Recipe, folder: Path, accelerator: Accelerator, resume: bool, fork: Path | None
) -> _Start:
    start = _Start(checkpoint_to_resume(folder, recipe, resume=resume))
    if fork is not None and start.checkpoint is None:
        start = _Start(forked_checkpoint(fork, recipe), fork)
    if start.checkpoint is not None:
        check_environment(start.source or folder, accelerator)
    return start


def _planned(
    recipe: Recipe, folder: Path, accelerator: Accelerator, start: _Start
) -> tuple[Run, int]:
    """Prepare a run, check and print its plan, and go back to its checkpoint if there is one.

    Returns:
        The run, and the number of epochs that are done.
    """
    checkpoint = start.checkpoint
    check_ranks_start_alike(recipe, checkpoint, accelerator)
    run = prepare_run(recipe, folder, accelerator, fresh=checkpoint is None)
    check_ranks_data_alike(run)
    check_run(run)
    accelerator.print(plan_text(run, checkpoint))
    if checkpoint is None:
        return run, 0
    done = _restore(run, checkpoint, forks=start.source is not None)
    verb = "resumed" if start.source is None else f"forked {start.source} for"
    accelerator.print(f"{verb} {folder} after {done} of {recipe.epochs} epochs")
    return run, done


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a machine is too small for into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device has too little memory: lower data.batch_size (and raise "
            "training.gradient_accumulation), or set training.mixed_precision=bf16"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a loader process was ended from outside, mostly for want of memory or of /dev/shm: "
            "lower data.workers; the same command goes on from the last checkpoint"
        ) from error


# --- around the loop ----------------------------------------------------------------------------


def _restore(run: Run, checkpoint: Path, *, forks: bool) -> int:
    """Go back to a checkpoint; the number of epochs that are done."""
    average = run.average.module if run.average is not None else None
    parts = (run.model, run.optimizer, run.pruner, average)
    state = load_checkpoint(checkpoint, *parts, forks=forks)
    scaler = run.accelerator.scaler
    if scaler is not None:
        scaler.load_state_dict(state["extra"]["scaler"])
    run.average_updates = state["extra"].get("average_updates", 0)
    return int(state["epoch"])


def _record(run: Run, metrics: dict[str, Any]) -> None:
    """Keep an epoch's metrics and its checkpoint, and show a line."""
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
    save_checkpoint(folder, done, run.model, run.optimizer, run.pruner, extra, average, keep)
    if accelerator.is_main_process:
        tqdm.write(_epoch_line(metrics, run.recipe.epochs))


def _epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    average = f"average {metrics['ema_top1']:.2%}  " if "ema_top1" in metrics else ""
    return (
        f"epoch {metrics['epoch'] + 1}/{epochs}  loss {metrics['train_loss']:.4f}  "
        f"top-1 {metrics['top1']:.2%}  {average}phase {metrics['phase']}  "
        f"target {metrics['target_sparsity']:.2%}  sparsity {metrics['sparsity']:.2%}  "
        f"{metrics['images_per_s']:.0f} images/s"
    )


def _finish(run: Run) -> None:
    """Draw the picture, show what the run came to and export its weights."""
    show = run.accelerator.print
    picture, exported = run.folder / "training.png", exported_file(run.folder)
    rows = read_metrics(run.folder)
    if run.accelerator.is_main_process:
        with writing(picture):
            plot_training(rows, picture, title=run.folder.name)
    model, decay = run.model, None
    if run.average is not None:
        model, decay = run.average.module, run.average.decay
    pruner = run.pruner
    show(format_table(pruner.sparsity(model) if pruner is not None else measure_sparsity(model)))
    for name, reason in pruner.kept_columns().items() if pruner is not None else ():
        show(f"{name} keeps all its columns: {reason}")
    for line in _final_lines(rows):
        show(line)
    settings = run.recipe.model
    architecture = {"name": settings.name, "num_classes": settings.num_classes, **settings.options}
    save_pruned(  # last: it marks the run as finished
        model, exported, pruner=run.pruner, architecture=architecture, average_decay=decay
    )
    show(f"weights{' (the average)' if decay else ''}: {exported}\npicture: {picture}")


def _final_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    last = rows[-1]
    yield f"top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%} after {last['epoch'] + 1} epochs"
    if "ema_top1" in last:
        yield f"average of the weights: top-1 {last['ema_top1']:.2%}, top-5 {last['ema_top5']:.2%}"
