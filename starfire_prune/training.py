"""The training run of a recipe: a plain Accelerate loop in which pruning is one call an update."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from starfire_prune.checkpoint import load_checkpoint, save_checkpoint
from starfire_prune.cpu_share import CpuShare
from starfire_prune.data import PADDING_LABEL
from starfire_prune.layers import unwrap
from starfire_prune.learning_rate import learning_rate_factor
from starfire_prune.mixing import mix_batch
from starfire_prune.plan import check_run, plan_text
from starfire_prune.plots import plot_training
from starfire_prune.preparation import (
    Batch,
    Run,
    check_ranks_data_alike,
    check_ranks_start_alike,
    create_accelerator,
    prepare_run,
)
from starfire_prune.pruned_file import save_pruned
from starfire_prune.recipe import Recipe
from starfire_prune.report import format_table, measure_sparsity
from starfire_prune.run_folder import (
    RunError,
    append_metrics,
    begin_folder,
    check_environment,
    check_writable,
    checkpoint_to_resume,
    checkpoints_of,
    exported_file,
    forked_checkpoint,
    locked,
    read_metrics,
    writing,
)
from starfire_prune.tracking import log_metrics, start_trackers

__all__ = ["RunError", "evaluate", "train"]


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
                _record(run, _epoch(run, epoch))
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


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Batch], accelerator: Accelerator, loss: nn.Module
) -> dict[str, float]:
    """Top-1, top-5 (shares in [0, 1]) and mean loss over all images of a prepared loader."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images).float()
        logits, labels = accelerator.gather_for_metrics((logits, labels))
        own = labels != PADDING_LABEL
        logits, labels = logits[own], labels[own]
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        total_loss = loss(logits, labels) * len(labels) if len(labels) else 0.0
        batch = [best[:, 0].sum(), best.sum(), total_loss, len(labels)]
        sums += torch.tensor([float(value) for value in batch], dtype=torch.float64)
    top1, top5, total_loss, images_seen = sums.tolist()
    return {
        "top1": top1 / images_seen,
        "top5": top5 / images_seen,
        "val_loss": total_loss / images_seen,
    }


# --- the loop -----------------------------------------------------------------------------------


def _epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train and evaluate one epoch; its line for `metrics.jsonl`."""
    recipe, pruner = run.recipe, run.pruner
    _seed_epoch(run, epoch)
    factor = learning_rate_factor(recipe.lr_schedule, epoch, recipe.epochs)
    _set_learning_rate(run.optimizer, factor)
    trained = _train_epoch(run, epoch)
    if pruner is not None:
        pruner.end_epoch(epoch)
    sparsity = pruner.sparsity() if pruner is not None else measure_sparsity(run.model)
    return {
        "epoch": epoch,
        "train_loss": trained.pop("train_loss"),
        **evaluate(run.model, run.val_loader, run.accelerator, run.loss),
        **_evaluate_average(run),
        "lr": recipe.optimizer.lr * factor,
        "phase": _phase_of(recipe, epoch),
        "threshold": pruner.threshold if pruner is not None else 0.0,
        "sparsity": sparsity.selected,
        "sparsity_network": sparsity.network,
        **trained,
    }


def _seed_epoch(run: Run, epoch: int) -> None:
    """Let all randomness of an epoch follow from (seed, epoch): a resumed run repeats it."""
    seed = int(np.random.SeedSequence([run.recipe.seed, epoch]).generate_state(1)[0])
    set_seed(seed, device_specific=True)
    run.train_loader.set_epoch(epoch)  # type: ignore[attr-defined]


def _set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * factor * group.get("lr_scale", 1.0)  # timm's layer_decay


def _phase_of(recipe: Recipe, epoch: int) -> str:
    """The phase that an epoch trains in."""
    if recipe.pruning == "none" or epoch < recipe.pruning.era[0]:
        return "dense"
    return "era" if epoch < recipe.pruning.era[1] else "fixed"


def _train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Mean loss, images (of all processes) a second, and the pruner's share of the CPU time."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    training = run.recipe.training
    model.train()
    start, cpu = time.perf_counter(), CpuShare()
    total_loss = torch.zeros((), device=accelerator.device)
    images_seen = 0
    for images, labels in _progress(run, epoch):
        images, targets = _prepared_batch(run, images, labels)
        with accelerator.accumulate(model):
            loss = run.train_loss(model(images).float(), targets)
            accelerator.backward(loss)
            if training.clip_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), training.clip_grad_norm)
            optimizer.step()
            _follow_update(run, cpu)
            optimizer.zero_grad()
        total_loss += loss.detach() * len(labels)
        images_seen += len(labels)
    sums = torch.stack([total_loss, torch.tensor(float(images_seen), device=accelerator.device)])
    total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return {
        "train_loss": total / count,
        "images_per_s": count / (time.perf_counter() - start),
        "pruner_cpu_share": cpu.share,
    }


def _prepared_batch(run: Run, images: Tensor, labels: Tensor) -> Batch:
    if run.recipe.training.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return (images, labels) if run.mixup is None else mix_batch(run.mixup, images, labels)


def _follow_update(run: Run, cpu: CpuShare) -> None:
    """Prune and average after `optimizer.step()`, if that was an update."""
    accelerator = run.accelerator
    updated = accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
    if run.pruner is not None:
        with cpu.part():
            run.pruner.step(updated)
    if run.average is not None and updated:
        run.average_updates += 1
        run.average.update(unwrap(run.model), step=run.average_updates)


def _evaluate_average(run: Run) -> dict[str, float]:
    if run.average is None:
        return {}
    for buffer in run.average.module.buffers():  # ranks have batch statistics of their own
        broadcast(buffer)
    metrics = evaluate(run.average.module, run.val_loader, run.accelerator, run.loss)
    return {f"ema_{key}": value for key, value in metrics.items()}


def _progress(run: Run, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch under a progress bar, which is quiet where there is no terminal."""
    rows = read_metrics(run.folder) if run.accelerator.is_main_process else []
    bar = tqdm(
        run.train_loader,
        desc=f"epoch {epoch + 1}/{run.recipe.epochs}",
        disable=None if run.accelerator.is_main_process else True,
        leave=False,
    )
    for batch in bar:
        yield batch
        if not bar.disable:
            bar.set_postfix(_status(run, rows[-1] if rows else {}), refresh=False)


def _status(run: Run, last: dict[str, Any]) -> dict[str, str]:
    status = {"top1": f"{last['top1']:.2%}"} if last else {}
    if run.pruner is not None:
        status["phase"] = run.pruner.phase
        status["threshold"] = f"{run.pruner.threshold:.2%}"
        status["sparsity"] = f"{last.get('sparsity', 0.0):.2%}"
    return status


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
        f"threshold {metrics['threshold']:.2%}  sparsity {metrics['sparsity']:.2%}  "
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
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["phase"], []).append(row["pruner_cpu_share"])
    if set(shares) != {"dense"}:
        means = (f"{phase} {statistics.mean(values):.2%}" for phase, values in shares.items())
        yield f"pruner's share of the CPU time: {', '.join(means)}"
