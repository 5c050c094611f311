"""The objects that train a recipe: data, model, optimizer and pruner."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from pathlib import Path

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from starfire_prune.data.images import Datasets
from starfire_prune.data.loaders import build_loader, prepare_loader
from starfire_prune.engine.comm_hook import MaskedAllreduceState, masked_allreduce_hook
from starfire_prune.engine.distributed import compare_across_ranks
from starfire_prune.engine.pruner import Pruner
from starfire_prune.models import create_model
from starfire_prune.quantization.training import QuantizedTraining
from starfire_prune.recipe.sections import Model, Optimizer, Recipe, Training
from starfire_prune.runs.data import recipe_datasets
from starfire_prune.runs.folder import RunError
from starfire_prune.serialization.pretrained import create_pretrained
from starfire_prune.utils.errors import PretrainedError

__all__ = [
    "Batch",
    "Run",
    "check_ranks_data_alike",
    "check_ranks_start_alike",
    "create_optimizer",
    "example_images",
    "prepare_run",
]


Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Run:
    """A training run in one process.

    Attributes:
        recipe: Recipe that the run trains.
        folder: Folder of the run.
        accelerator: The accelerator of this process.
        datasets: The data sets that the loaders read.
        train_loader, val_loader: Loaders of this process's part of the data.
        model, optimizer: Model and optimizer as Accelerate wraps them.
        pruner: Pruner of the model; None in dense training.
        average: Moving average of the weights, if the recipe has one.
        mixing: Mixes the images `(N, C, height, width)` and labels `(N,)` of a batch, if the recipe
            does; the labels become shares of classes `(N, classes)`.
        train_loss: Training loss of logits `(N, classes)` and labels `(N,)` or shares of classes.
        loss: Loss in evaluation.
        fresh_keys: Keys of the weights that pretrained ones have not replaced.
        average_updates: Number of updates of the average.
        quantized: Training with the rounding of int8, once its phase has begun.
    """

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    datasets: Datasets
    train_loader: DataLoader[Batch]
    val_loader: DataLoader[Batch]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    average: ModelEmaV3 | None
    mixing: nn.Module | None
    train_loss: nn.Module
    loss: nn.Module
    fresh_keys: tuple[str, ...] = ()
    average_updates: int = 0
    quantized: QuantizedTraining | None = None

    @property
    def trained(self) -> nn.Module:
        """The module through which images pass in training."""
        return self.model if self.quantized is None else self.quantized.module

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps per epoch, not counting that a gradient scaler may skip some."""
        return math.ceil(len(self.train_loader) / self.recipe.training.gradient_accumulation)


def prepare_run(
    recipe: Recipe, folder: Path, accelerator: Accelerator, *, fresh: bool = True
) -> Run:
    """Load the data, and create the model, its optimizer and its pruner.

    Args:
        recipe: Recipe of the run.
        folder: Folder of the run; nothing is written.
        accelerator: The accelerator of this process.
        fresh: Load pretrained weights; unnecessary if a checkpoint follows.

    Raises:
        RunError: If the optimizer does not accept its settings, or pretrained weights are missing
            or don't fit.
        DataError, ValueError: For data, layers and models that don't fit.
    """
    set_seed(recipe.seed)
    pretrained = recipe.model.pretrained if fresh else False
    with accelerator.local_main_process_first():  # it may download
        datasets = recipe_datasets(recipe)
        model, fresh_keys = _model(recipe.model, pretrained)
    model = model.to(accelerator.device)
    if recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(recipe.optimizer, model)
    train_loader, val_loader = _loaders(recipe, datasets, accelerator)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        datasets=datasets,
        train_loader=train_loader,
        val_loader=val_loader,
        model=model,
        optimizer=optimizer,
        pruner=None,
        average=_average(recipe.training, model),
        mixing=_mixing(recipe),
        train_loss=nn.CrossEntropyLoss(label_smoothing=recipe.training.label_smoothing),
        loss=nn.CrossEntropyLoss(),
        fresh_keys=fresh_keys,
    )
    run.pruner = _pruner(run)  # before DDP wraps the model, so that it skips masks
    run.model, run.optimizer = accelerator.prepare(model, optimizer)
    if recipe.training.compress_gradients and run.pruner is not None:
        _compress_gradients(run.model, run.pruner)
    return run


def example_images(recipe: Recipe, device: torch.device) -> Tensor:
    """Two images of zeros, `(2, 3, image_size, image_size)`, in the memory format of training."""
    size = recipe.data.image_size
    images = torch.zeros(2, 3, size, size, device=device)
    last = recipe.training.channels_last
    return images.to(memory_format=torch.channels_last) if last else images


def _loaders(
    recipe: Recipe, datasets: Datasets, accelerator: Accelerator
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    data = recipe.data
    eval_batch_size = data.eval_batch_size or data.batch_size
    train = build_loader(datasets.train, data.batch_size, train=True, workers=data.workers)
    val = build_loader(datasets.val, eval_batch_size, train=False, workers=data.workers)
    return prepare_loader(accelerator, train), prepare_loader(accelerator, val)


def _model(settings: Model, pretrained: bool | str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and the keys that pretrained weights have not replaced."""
    if pretrained is False:
        return create_model(settings.name, settings.num_classes, **settings.options), ()
    file = None if pretrained is True else Path(pretrained)
    try:
        return create_pretrained(settings.name, settings.num_classes, file, **settings.options)
    except PretrainedError as error:
        raise RunError(f"model.pretrained: {error}") from error


def create_optimizer(
    settings: Optimizer, model: nn.Module | list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Create timm's optimizer from a recipe's settings.

    Args:
        settings: Settings of the recipe.
        model: The model to optimize, or a list of parameters.

    Raises:
        RunError: If timm has no such optimizer, or it does not accept the options.
    """
    known = timm.optim.list_optimizers()
    if settings.name not in known:
        nearest = difflib.get_close_matches(settings.name, known, n=3) or known[:5]
        raise RunError(
            f"optimizer.name (={settings.name!r}) is not one of timm's optimizers; nearest: "
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
    except (AssertionError, TypeError, ValueError) as error:  # AssertionError: a package is missing
        raise RunError(f"optimizer.options don't fit {settings.name}: {error}") from error
    return optimizer


def _average(training: Training, model: nn.Module) -> ModelEmaV3 | None:
    if training.ema is None:
        return None
    return ModelEmaV3(model, decay=training.ema.decay, use_warmup=training.ema.warmup)


def _pruner(run: Run) -> Pruner | None:
    if run.recipe.pruning == "none":
        return None
    pruner = Pruner(
        run.model,
        run.recipe.pruning,
        updates_per_epoch=run.updates_per_epoch,
        optimizer=run.optimizer,
        example_input=example_images(run.recipe, run.accelerator.device),
        prune_again=True,  # pretrained weights may be pruned; checkpoints restore the pruner
    )
    if run.average is not None:
        pruner.mirror(run.average.module)
    return pruner


def _compress_gradients(model: nn.Module, pruner: Pruner) -> None:
    """Register the hook with DDP, if there is one; Accelerate's settings offer only torch's."""
    ddp = getattr(model, "_orig_mod", model)  # Accelerate compiles the model that DDP has wrapped
    if isinstance(ddp, DistributedDataParallel):
        ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)


def _mixing(recipe: Recipe) -> nn.Module | None:
    """Mixup or cutmix of a batch and its labels; at random one of them if the recipe sets both."""
    kinds = ((v2.MixUp, recipe.training.mixup), (v2.CutMix, recipe.training.cutmix))
    mixes = [
        kind(alpha=alpha, num_classes=recipe.model.num_classes) for kind, alpha in kinds if alpha
    ]
    return v2.RandomChoice(mixes) if mixes else None


# Whether the ranks agree


def check_ranks_start_alike(
    recipe: Recipe, checkpoint: Path | None, accelerator: Accelerator
) -> None:
    """Raise RanksError if ranks have different recipes, or continue from different checkpoints.

    Only the location of the data may differ.

    Args:
        recipe: Recipe of this rank.
        checkpoint: Checkpoint from which this rank continues, if there is one.
        accelerator: The accelerator of this process.
    """
    settings = recipe.model_dump(mode="json")
    settings["data"].pop("root")
    _compare(settings, "recipes", accelerator, "give all of them the same recipe and --set")
    state = checkpoint / "state.json" if checkpoint is not None else None
    found = [checkpoint.name, state.read_text()] if checkpoint and state and state.exists() else []
    reason = "--output must be on a disk that all machines share"
    _compare(found, "checkpoints to continue from", accelerator, reason)


def check_ranks_data_alike(run: Run) -> None:
    """Raise RanksError if ranks have data of different sizes or classes."""
    parts = [len(part) for part in (run.datasets.train, run.datasets.val)]  # type: ignore[arg-type]
    found = [*parts, run.datasets.classes, len(run.train_loader), len(run.val_loader)]
    reason = "each machine must have the same data"
    _compare(found, "images and classes", run.accelerator, reason)


def _compare(value: object, what: str, accelerator: Accelerator, reason: str) -> None:
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    compare_across_ranks(lambda: digest, what, accelerator.device, reason)
