"""The training run of a recipe: a plain Accelerate loop in which pruning is one call an update."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from starfire_prune.checkpoint import (
    export_weights,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from starfire_prune.data import Datasets, build_loader, load_datasets
from starfire_prune.engine import Pruner
from starfire_prune.files import write_text
from starfire_prune.models import create_model
from starfire_prune.plots import plot_training
from starfire_prune.recipe import (
    LrSchedule,
    Model,
    Optimizer,
    Recipe,
    differing_keys,
    dump_recipe,
    load_recipe,
)
from starfire_prune.report import format_table, measure_sparsity

__all__ = ["RunError", "evaluate", "learning_rate_factor", "train"]

Batch = tuple[Tensor, Tensor]


class RunError(RuntimeError):
    """A run that can't start or go on; the message says why and what to do."""


@dataclasses.dataclass
class _Run:
    """What one process needs to train; `model` and `optimizer` are those that Accelerate wraps."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    train_loader: DataLoader[Batch]
    val_loader: DataLoader[Batch]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    loss: nn.Module

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """Train as `recipe` says, and leave everything in `folder`.

    A folder that holds an unfinished run of the same recipe is resumed from its last checkpoint:
    an unbroken run and a resumed one end with the same bits on a CPU. It holds the resolved
    `recipe.yaml`, `environment.json`, `metrics.jsonl` (an object an epoch), `training.png`,
    `checkpoints/` (the last two) and, at the end, `export/model.safetensors`.

    Args:
        recipe: see `starfire_prune.recipe`.
        folder: of the run; made if it isn't there.
        resume: refuse to start from nothing.

    Raises:
        RunError: if the folder holds another recipe's run or a finished one, there is nothing to
            resume, or the environment would not reproduce the run.
        CheckpointError: if the checkpoint to resume from is damaged, or the disk is full.
        DataError, ValueError: for data, layers and settings that don't fit.
    """
    accelerator = _accelerator(recipe)
    checkpoint = _checkpoint_to_resume(recipe, folder, resume)
    run = _prepare(recipe, folder, accelerator)
    first_epoch = 0
    if checkpoint is not None:
        first_epoch = _restore(run, checkpoint)
        accelerator.print(f"resumed {folder} after {first_epoch} of {recipe.epochs} epochs")
    if accelerator.is_main_process:
        _begin_folder(run, first_epoch)
    accelerator.wait_for_everyone()
    for epoch in range(first_epoch, recipe.epochs):
        _record(run, _epoch(run, epoch))
        accelerator.wait_for_everyone()
    _finish(run)
    accelerator.end_training()


def learning_rate_factor(schedule: LrSchedule, epoch: int) -> float:
    """What the learning rate of an epoch is multiplied by; a function of the epoch alone.

    Example:
        >>> learning_rate_factor(LrSchedule(milestones=(30, 60)), 30)
        0.1
    """
    if epoch < schedule.warmup_epochs:
        return (epoch + 1) / (schedule.warmup_epochs + 1)
    return float(schedule.gamma ** bisect.bisect_right(schedule.milestones, epoch))


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Batch], accelerator: Accelerator, loss: nn.Module
) -> dict[str, float]:
    """Top-1, top-5 (shares in [0, 1]) and mean loss over all images of a prepared loader."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in loader:
        logits, labels = accelerator.gather_for_metrics((model(images).float(), labels))
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        batch = [best[:, 0].sum(), best.sum(), loss(logits, labels) * len(labels), len(labels)]
        sums += torch.tensor([float(value) for value in batch], dtype=torch.float64)
    top1, top5, total_loss, images_seen = sums.tolist()
    return {
        "top1": top1 / images_seen,
        "top5": top5 / images_seen,
        "val_loss": total_loss / images_seen,
    }


# --- preparation --------------------------------------------------------------------------------


def _accelerator(recipe: Recipe) -> Accelerator:
    _refuse_lonely_ranks()
    accelerator = Accelerator(
        mixed_precision=recipe.training.mixed_precision,
        gradient_accumulation_steps=recipe.training.gradient_accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
    )
    if recipe.training.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError(  # Accelerate would train in float32
            "training.mixed_precision (=fp16) needs a GPU: on a CPU, set bf16 or no"
        )
    if recipe.training.threads is not None:  # not before: Accelerate sets those of CPU processes
        torch.set_num_threads(recipe.training.threads)
    return accelerator


def _refuse_lonely_ranks() -> None:
    """`accelerate launch` starts CPU processes through MPI only, and without it just this one."""
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    if "MASTER_ADDR" in os.environ and not any(name in os.environ for name in ranks):
        raise RunError(
            f"MASTER_ADDR (={os.environ['MASTER_ADDR']}) announces several processes, but RANK and "
            f"WORLD_SIZE are not set, so that each would train alone: start CPU processes by "
            f"torchrun --nproc_per_node N tools/train.py …, or unset MASTER_ADDR for a single one"
        )


def _prepare(recipe: Recipe, folder: Path, accelerator: Accelerator) -> _Run:
    set_seed(recipe.seed)
    datasets = load_datasets(
        recipe.data.name,
        root=recipe.data.root,
        image_size=recipe.data.image_size,
        interpolation=recipe.data.interpolation,
        crop_pct=recipe.data.crop_pct,
    )
    _check_classes(recipe, datasets)
    model = _model(recipe.model)
    if recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(recipe.optimizer, model)
    data = recipe.data
    train_loader, val_loader = accelerator.prepare(
        build_loader(datasets.train, data.batch_size, train=True, workers=data.workers),
        build_loader(
            datasets.val, data.eval_batch_size or data.batch_size, train=False, workers=data.workers
        ),
    )
    pruner = None
    if recipe.pruning != "none":  # before DDP wraps the model, which then leaves the masks alone
        updates = math.ceil(len(train_loader) / recipe.training.gradient_accumulation)
        pruner = Pruner(model, recipe.pruning, updates_per_epoch=updates, optimizer=optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    return _Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        train_loader=train_loader,
        val_loader=val_loader,
        model=model,
        optimizer=optimizer,
        pruner=pruner,
        loss=nn.CrossEntropyLoss(label_smoothing=recipe.training.label_smoothing),
    )


def _model(settings: Model) -> nn.Module:
    try:
        return create_model(settings.name, settings.num_classes, **settings.options)
    except (AssertionError, TypeError) as error:
        raise RunError(f"model.options: {settings.name} refuses them: {error}") from error


def _optimizer(settings: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    known = timm.optim.list_optimizers()
    if settings.name not in known:
        nearest = difflib.get_close_matches(settings.name, known, n=3) or known[:5]
        raise RunError(
            f"optimizer.name (={settings.name!r}) is none of timm's optimizers; nearest: "
            f"{', '.join(nearest)}"
        )
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            model,
            settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=settings.filter_bias_and_bn,
            **settings.options,
        )
    except (AssertionError, TypeError, ValueError) as error:  # assertions: packages that it needs
        raise RunError(f"optimizer: {settings.name} refuses its options: {error}") from error
    return optimizer


def _check_classes(recipe: Recipe, datasets: Datasets) -> None:
    if len(datasets.classes) != recipe.model.num_classes:
        raise RunError(
            f"model.num_classes (={recipe.model.num_classes}) must be the number of classes in the "
            f"data, {len(datasets.classes)}: --set model.num_classes={len(datasets.classes)}"
        )


# --- the loop -----------------------------------------------------------------------------------


def _epoch(run: _Run, epoch: int) -> dict[str, Any]:
    """Train and evaluate one epoch; its line for `metrics.jsonl`."""
    recipe, pruner = run.recipe, run.pruner
    # All randomness of an epoch follows from (seed, epoch), so that a resumed run repeats it.
    seed = int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0])
    set_seed(seed, device_specific=True)
    run.train_loader.set_epoch(epoch)  # type: ignore[attr-defined]
    factor = learning_rate_factor(recipe.lr_schedule, epoch)
    for group in run.optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * factor * group.get("lr_scale", 1.0)  # timm's layer_decay
    start = time.perf_counter()
    train_loss, images = _train_epoch(run, epoch)
    seconds = time.perf_counter() - start
    if pruner is not None:
        pruner.end_epoch(epoch)
    sparsity = pruner.sparsity() if pruner is not None else measure_sparsity(run.model)
    return {
        "epoch": epoch,
        "train_loss": train_loss,
        **evaluate(run.model, run.val_loader, run.accelerator, run.loss),
        "lr": recipe.optimizer.lr * factor,
        "phase": _phase_of(recipe, epoch),
        "threshold": pruner.threshold if pruner is not None else 0.0,
        "sparsity": sparsity.selected,
        "sparsity_network": sparsity.network,
        "images_per_s": images / seconds,
    }


def _phase_of(recipe: Recipe, epoch: int) -> str:
    """The phase that an epoch trains in."""
    if recipe.pruning == "none" or epoch < recipe.pruning.era[0]:
        return "dense"
    return "era" if epoch < recipe.pruning.era[1] else "fixed"


def _train_epoch(run: _Run, epoch: int) -> tuple[float, int]:
    """Mean loss and number of images (of all processes)."""
    accelerator, model, optimizer, training = (
        run.accelerator,
        run.model,
        run.optimizer,
        run.recipe.training,
    )
    model.train()
    total_loss = torch.zeros((), device=accelerator.device)
    images_seen = 0
    for images, labels in _progress(run, epoch):
        if training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(model):
            loss = run.loss(model(images).float(), labels)
            accelerator.backward(loss)
            if training.clip_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), training.clip_grad_norm)
            optimizer.step()
            if run.pruner is not None:
                run.pruner.step(
                    accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
                )
            optimizer.zero_grad()
        total_loss += loss.detach() * len(labels)
        images_seen += len(labels)
    sums = torch.stack([total_loss, torch.tensor(float(images_seen), device=accelerator.device)])
    total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return total / count, int(count)


def _progress(run: _Run, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch under a progress bar, which is quiet where there is no terminal."""
    rows = _read_metrics(run.metrics_file) if run.accelerator.is_main_process else []
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


def _status(run: _Run, last: dict[str, Any]) -> dict[str, str]:
    status = {"top1": f"{last['top1']:.2%}"} if last else {}
    if run.pruner is not None:
        status["phase"] = run.pruner.phase
        status["threshold"] = f"{run.pruner.threshold:.2%}"
        status["sparsity"] = f"{last.get('sparsity', 0.0):.2%}"
    return status


# --- the run's folder ---------------------------------------------------------------------------


def _checkpoint_to_resume(recipe: Recipe, folder: Path, resume: bool) -> Path | None:
    saved = folder / "recipe.yaml"
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if resume and checkpoint is None:
        raise RunError(f"{folder} holds no checkpoint to resume from")
    if not saved.is_file():
        if checkpoint is not None:
            raise RunError(
                f"{folder} holds checkpoints but not the {saved.name} they belong to: restore it, "
                f"choose another --output, or delete the folder"
            )
        return None
    differing = differing_keys(load_recipe(saved), recipe)
    if differing:
        listed = "; ".join(
            f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items()
        )
        raise RunError(
            f"{folder} holds the run of another recipe ({listed}): choose another --output, or "
            f"delete the folder"
        )
    if (folder / "export" / "model.safetensors").is_file():
        raise RunError(
            f"{folder} holds a finished run of this recipe: choose another --output, or delete it"
        )
    return checkpoint


def _restore(run: _Run, checkpoint: Path) -> int:
    _check_environment(run)
    state = load_checkpoint(checkpoint, run.model, run.optimizer, run.pruner)
    scaler = run.accelerator.scaler
    if scaler is not None:
        scaler.load_state_dict(state["extra"]["scaler"])
    return int(state["epoch"])


def _check_environment(run: _Run) -> None:
    path = run.folder / "environment.json"
    own = _reproducing(run)
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
        saved = {key: environment[key] for key in own}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{path} of the run can't be read: restore it, or delete {run.folder} to train anew"
        ) from error
    ways = {"processes": "accelerate launch --num_processes {}", "threads": "OMP_NUM_THREADS={}"}
    for key, value in own.items():
        if saved[key] != value:
            raise RunError(
                f"{run.folder} was trained with {key} = {saved[key]}, and now it is {value}: a "
                f"resumed run would not repeat what the unbroken one had done; start it as then: "
                f"{ways[key].format(saved[key])}"
            )


def _begin_folder(run: _Run, first_epoch: int) -> None:
    if first_epoch == 0:
        if not (run.folder / "recipe.yaml").is_file():  # else an equal one, perhaps of the user's
            write_text(run.folder / "recipe.yaml", dump_recipe(run.recipe))
        write_text(run.folder / "environment.json", json.dumps(_environment(run), indent=1) + "\n")
    done = [row for row in _read_metrics(run.metrics_file) if row["epoch"] < first_epoch]
    write_text(run.metrics_file, "".join(json.dumps(row) + "\n" for row in done))


def _record(run: _Run, metrics: dict[str, Any]) -> None:
    show = run.accelerator.is_main_process
    if show:
        _append_metrics(run.metrics_file, metrics)
    scaler = run.accelerator.scaler
    extra = {"scaler": scaler.state_dict()} if scaler is not None else {}
    save_checkpoint(
        run.checkpoints, metrics["epoch"] + 1, run.model, run.optimizer, run.pruner, extra
    )
    if show:
        tqdm.write(
            f"epoch {metrics['epoch'] + 1}/{run.recipe.epochs}  loss {metrics['train_loss']:.4f}  "
            f"top-1 {metrics['top1']:.2%}  phase {metrics['phase']}  "
            f"threshold {metrics['threshold']:.2%}  sparsity {metrics['sparsity']:.2%}  "
            f"{metrics['images_per_s']:.0f} images/s"
        )


def _finish(run: _Run) -> None:
    show = run.accelerator.print
    picture, exported = run.folder / "training.png", run.folder / "export" / "model.safetensors"
    rows = _read_metrics(run.metrics_file)
    if run.accelerator.is_main_process:
        plot_training(rows, picture, title=run.folder.name)
    selected = run.pruner.layers if run.pruner is not None else None
    show(format_table(measure_sparsity(run.model, selected)))
    if rows:
        last = rows[-1]
        show(f"top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%} after {last['epoch'] + 1} epochs")
    export_weights(exported, run.model, run.pruner)  # last: it marks the run as finished
    show(f"weights: {exported}\npicture: {picture}")


def _append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:  # a kill cuts the last line short
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(rows, key=lambda row: int(row["epoch"]))
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): mend or delete it") from error


def _reproducing(run: _Run) -> dict[str, int]:
    """What has to be the same for a resumed run to repeat the unbroken one."""
    return {
        "processes": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _environment(run: _Run) -> dict[str, Any]:
    packages = ("starfire-prune", "torch", "torchvision", "timm", "accelerate", "numpy")
    device = run.accelerator.device
    is_cuda = device.type == "cuda"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu",
        "cpus": os.cpu_count(),
        "seed": run.recipe.seed,
        **_reproducing(run),
    }


def _commit() -> str | None:
    """The commit of the package's source tree, where it is run from one."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():  # installed, perhaps within another project's repository
        return None
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
