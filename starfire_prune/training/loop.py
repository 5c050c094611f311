"""One epoch of a run: training, evaluation and its line of metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from starfire_prune.data.shards import PADDING_LABEL
from starfire_prune.engine.sparsity import measure_sparsity
from starfire_prune.engine.state import Phase
from starfire_prune.runs.folder import QUANTIZATION_PHASE, read_metrics
from starfire_prune.training.learning_rate import recipe_factor
from starfire_prune.training.setup import Batch, Run
from starfire_prune.utils.modules import unwrap
from starfire_prune.utils.tally import Tally

__all__ = ["evaluate", "run_epoch"]

_LOGGER = logging.getLogger(__name__)


def run_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train and evaluate one epoch, and return its line for `metrics.jsonl`."""
    recipe, pruner = run.recipe, run.pruner
    _seed_epoch(run, epoch)
    _freeze_quantization(run, epoch)
    factor = recipe_factor(recipe, epoch)
    _set_learning_rate(run.optimizer, factor)
    before = None if pruner is None else pruner.phase
    trained = _train_epoch(run, epoch)
    if pruner is not None:
        pruner.end_epoch(epoch)
    sparsity = pruner.sparsity() if pruner is not None else measure_sparsity(run.model)
    return {
        "epoch": epoch,
        "train_loss": trained.pop("train_loss"),
        **_evaluate_trained(run),
        **_evaluate_average(run),
        "lr": recipe.optimizer.lr * factor,
        "phase": _phase_of(run, epoch, before),
        "target_sparsity": pruner.target_sparsity if pruner is not None else 0.0,
        "sparsity": sparsity.selected,
        "sparsity_network": sparsity.network,
        **trained,
    }


# Training


def _seed_epoch(run: Run, epoch: int) -> None:
    """Seed all generators by (seed, epoch), so that a resumed run repeats the epoch."""
    seed = int(np.random.SeedSequence([run.recipe.seed, epoch]).generate_state(1)[0])
    set_seed(seed, device_specific=True)
    run.train_loader.set_epoch(epoch)  # type: ignore[attr-defined]


def _freeze_quantization(run: Run, epoch: int) -> None:
    settings = run.recipe.quantization
    if settings is None or run.quantized is None:
        return
    if epoch >= run.recipe.total_epochs - settings.frozen_epochs:
        run.quantized.freeze()


def _set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * factor * group.get("lr_scale", 1.0)  # timm's layer_decay


def _phase_of(run: Run, epoch: int, before: Phase | None) -> str:
    """The phase in which an epoch has trained; `era` if one of its updates belongs to the era.

    Args:
        run: The run, after the epoch.
        epoch: The epoch.
        before: The pruner's phase before the epoch.
    """
    if run.quantized is not None:
        return QUANTIZATION_PHASE
    if run.pruner is None:
        return "dense"
    era = run.pruner.pruning.era
    if era is None:
        return "era" if before != "fixed" and run.pruner.phase != "dense" else run.pruner.phase
    return "dense" if epoch < era[0] else "era" if epoch < era[1] else "fixed"


def _train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train one epoch, and return its mean loss and the images of all processes per second."""
    accelerator, model, optimizer = run.accelerator, run.trained, run.optimizer
    training = run.recipe.training
    model.train()
    start = time.perf_counter()
    total_loss = torch.zeros((), device=accelerator.device)
    images_seen = 0
    for images, labels in _progress(run, epoch):
        images, targets = _prepared_batch(run, images, labels)
        with accelerator.accumulate(run.model):
            loss = run.train_loss(model(images).float(), targets)
            accelerator.backward(loss)
            if training.clip_grad_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.model.parameters(), training.clip_grad_norm)
            optimizer.step()
            _follow_update(run)
            optimizer.zero_grad()
        total_loss += loss.detach() * len(labels)
        images_seen += len(labels)
    sums = torch.stack([total_loss, torch.tensor(float(images_seen), device=accelerator.device)])
    total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return {
        "train_loss": total / count,
        "images_per_s": count / (time.perf_counter() - start),
    }


def _prepared_batch(run: Run, images: Tensor, labels: Tensor) -> Batch:
    if run.mixing is not None:
        images, labels = run.mixing(images, labels)
    if run.recipe.training.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels


def _follow_update(run: Run) -> None:
    """Prune and average after `optimizer.step()`, unless it only accumulated gradients."""
    accelerator = run.accelerator
    updated = accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
    if run.pruner is not None:
        run.pruner.step(updated)
    if run.average is not None and updated:
        run.average_updates += 1
        run.average.update(unwrap(run.model), step=run.average_updates)


# Progress


def _progress(run: Run, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch; a progress bar appears on terminals if messages are shown."""
    is_shown = run.accelerator.is_main_process and _LOGGER.isEnabledFor(logging.INFO)
    rows = read_metrics(run.folder) if is_shown else []
    bar = tqdm(
        run.train_loader,
        desc=f"epoch {epoch + 1}/{run.recipe.total_epochs}",
        disable=None if is_shown else True,  # None: disabled where there is no terminal
        leave=False,
    )
    for batch in bar:
        yield batch
        if not bar.disable:
            bar.set_postfix(_status(run, rows[-1] if rows else {}), refresh=False)


def _status(run: Run, last: dict[str, Any]) -> dict[str, str]:
    status = {"top1": f"{last['top1']:.2%}"} if last else {}
    if run.pruner is not None:
        status["phase"] = QUANTIZATION_PHASE if run.quantized else run.pruner.phase
        status["target_sparsity"] = f"{run.pruner.target_sparsity:.2%}"
        status["sparsity"] = f"{last.get('sparsity', 0.0):.2%}"
    return status


# Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Batch],
    accelerator: Accelerator,
    loss: nn.Module,
    *,
    mixed: bool = True,
) -> dict[str, float]:
    """Top-1, top-5 (shares in [0, 1]) and mean loss over all images of a prepared loader.

    Args:
        model: The model; it is put in eval mode.
        loader: The loader.
        accelerator: The accelerator that prepared it.
        loss: Loss of logits `(N, classes)` and labels `(N,)`.
        mixed: Whether the accelerator's mixed precision applies, if it has any.
    """
    model.eval()
    tally = Tally()
    for images, labels in loader:
        with accelerator.autocast(AutocastKwargs(enabled=mixed)):
            logits = model(images).float()
        logits, labels = accelerator.gather_for_metrics((logits, labels))
        counted = labels != PADDING_LABEL
        logits, labels = logits[counted], labels[counted]
        tally.add(logits, labels, loss(logits, labels) * len(labels) if len(labels) else 0.0)
    return dict(zip(("top1", "top5", "val_loss"), tally.means(), strict=True))


def _evaluate_trained(run: Run) -> dict[str, float]:
    """The metrics of the model; in the quantization phase those of the int8 model it gives."""
    loader, accelerator = run.val_loader, run.accelerator
    if run.quantized is None:
        return evaluate(run.model, loader, accelerator, run.loss)
    return evaluate(run.quantized.finished(), loader, accelerator, run.loss, mixed=False)


def _evaluate_average(run: Run) -> dict[str, float]:
    if run.average is None:
        return {}
    for buffer in run.average.module.buffers():  # each rank has its own batch statistics
        broadcast(buffer)
    metrics = evaluate(run.average.module, run.val_loader, run.accelerator, run.loss)
    return {f"ema_{key}": value for key, value in metrics.items()}
