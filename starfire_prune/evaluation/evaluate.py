"""Accuracy of trained weights on the validation images, clean and under attacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm import tqdm

from starfire_prune.data import DataError, Datasets, build_loader
from starfire_prune.evaluation.attacks import Attack, Precision, fgsm, pgd
from starfire_prune.evaluation.results import Evaluation, Result, file_sha256
from starfire_prune.evaluation.spaces import NORMALISED, Space, SpaceName, pixel_space
from starfire_prune.models import create_model
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.data import normalisation, recipe_datasets
from starfire_prune.runs.environment import environment
from starfire_prune.runs.weights import WeightsWithRecipe, data_settings
from starfire_prune.serialization.pretrained import load_weights
from starfire_prune.utils.errors import EvaluationError, PretrainedError
from starfire_prune.utils.limits import explained_limits
from starfire_prune.utils.tally import Tally
from starfire_prune.utils.text import first_line

__all__ = [
    "chosen_device",
    "evaluate_weights",
    "evenly_spaced",
    "load_datasets_of",
    "validation_loader",
]


_PRECISIONS: Final = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_AUTOCAST: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}


def evaluate_weights(
    trained: WeightsWithRecipe,
    attacks: Sequence[Attack] = (),
    *,
    source: WeightsWithRecipe | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> Evaluation:
    """Measure top-1, top-5 and loss on the validation images, clean and under each attack.

    Clean images are measured in the recipe's mixed precision, as in training, and attacks in
    float32. On a CPU, fp16 is replaced by float32.

    Args:
        trained: The weights with their recipe.
        attacks: The attacks to measure; those by FGSM in a space share one gradient.
        source: Weights whose gradients the attacks follow, in place of those of `trained`.
        limit: Number of images, from 1, evenly spaced (of shards the first ones); default: all.
        batch_size: Batch size, from 1; default: the recipe's for evaluation.
        device: Device to use; default: the accelerator, if there is one.

    Returns:
        The results of this call only.

    Raises:
        EvaluationError: If weights, recipe, source and data don't fit, or memory is too small.
        DataError: If the data can't be read.

    Example:
        >>> trained = find_weights(Path("runs/quickstart"))  # doctest: +SKIP
        >>> evaluate_weights(trained, [Attack("fgsm", 1 / 255)]).results[1].top1  # doctest: +SKIP
        0.9333
    """
    device = device or chosen_device()
    recipe = trained.recipe
    loader, total = validation_loader(trained, limit, batch_size)
    model = _model(trained, device)
    attacker = model if source is None else _source(source, trained, device)
    spaces = {name: _space(recipe, name) for name in {attack.space for attack in attacks}}
    measured = _Measured(model, attacker, spaces, _precision(recipe, device))
    limits = explained_limits(
        EvaluationError, less_memory="lower --batch-size", fewer_workers="--set data.workers=0"
    )
    with _repeatable(), limits:
        tallies = _measure(measured, loader, attacks, limit or total, device, trained.name)
    followed = None if source is None else source.name
    settings = [
        Attack("none", precision=measured.precision),
        *(dataclasses.replace(attack, source=followed).completed() for attack in attacks),
    ]
    return Evaluation(
        weights_sha256=file_sha256(trained.weights),
        source_sha256={} if source is None else {source.name: file_sha256(source.weights)},
        data=data_settings(recipe),
        images=total,
        environment=environment(device),
        results=tuple(
            _result(attack, tally) for attack, tally in zip(settings, tallies, strict=True)
        ),
    )


def chosen_device(name: str | None = None) -> torch.device:
    """The device with this name; without a name the accelerator, or the CPU if there is none.

    Raises:
        EvaluationError: If there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise EvaluationError(f"--device (={name}) can't be used: {first_line(error)}") from error
    return device


# Measuring


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model, the model that attacks follow, their spaces and the precision of clean passes."""

    model: nn.Module
    attacker: nn.Module
    spaces: Mapping[SpaceName, Space]
    precision: Precision


@torch.no_grad()
def _measure(
    measured: _Measured,
    loader: DataLoader[tuple[Tensor, Tensor]],
    attacks: Sequence[Attack],
    count: int,
    device: torch.device,
    name: str,
) -> list[Tally]:
    """The tallies of clean images and of each attack, over the first `count` images."""
    clean, *attacked = [Tally() for _ in range(1 + len(attacks))]
    for images, labels in tqdm(loader, desc=name, disable=None, leave=False):
        rest = count - clean.images
        if rest <= 0:  # shards yield more
            break
        first = clean.images
        images, labels = images[:rest].to(device), labels[:rest].to(device)
        with _autocast(measured.precision, device):
            logits = measured.model(images)
        _add(clean, logits, labels)
        found = _adversarial(measured, images, labels, attacks, first)
        for tally, adversarial in zip(attacked, found, strict=True):
            _add(tally, measured.model(adversarial), labels)
    return [clean, *attacked]


def _add(tally: Tally, logits: Tensor, labels: Tensor) -> None:
    logits = logits.float()
    tally.add(logits, labels, functional.cross_entropy(logits, labels, reduction="sum"))


def _result(attack: Attack, tally: Tally) -> Result:
    top1, top5, loss = tally.means()
    finite = loss if math.isfinite(loss) else None
    return Result(attack=attack, images=tally.images, top1=top1, top5=top5, loss=finite)


def _adversarial(
    measured: _Measured, images: Tensor, labels: Tensor, attacks: Sequence[Attack], first: int
) -> Iterator[Tensor]:
    """The images of each attack; those by FGSM in a space from one gradient."""
    model = measured.attacker
    by_fgsm = {
        name: iter(fgsm(model, images, labels, _fgsm_epsilons(attacks, name), space))
        for name, space in measured.spaces.items()
    }
    for attack in attacks:
        if attack.name == "fgsm":
            yield next(by_fgsm[attack.space])
        else:
            settings = attack.pgd_settings if attack.epsilon else {}  # at 0 it moves nothing
            space = measured.spaces[attack.space]
            yield pgd(model, images, labels, attack.epsilon, space, first=first, **settings)


def _fgsm_epsilons(attacks: Sequence[Attack], space: SpaceName) -> list[float]:
    return [attack.epsilon for attack in attacks if (attack.name, attack.space) == ("fgsm", space)]


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _precision(recipe: Recipe, device: torch.device) -> Precision:
    precision = cast("Precision", _PRECISIONS[recipe.training.mixed_precision])
    return "fp32" if precision == "fp16" and device.type == "cpu" else precision


@contextmanager
def _repeatable() -> Iterator[None]:
    """Make cuDNN choose deterministic kernels."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


# Data and models


def validation_loader(
    trained: WeightsWithRecipe, limit: int | None = None, batch_size: int | None = None
) -> tuple[DataLoader[tuple[Tensor, Tensor]], int]:
    """A loader of the validation images, or of evenly spaced ones, and their total number."""
    data = trained.recipe.data
    val = load_datasets_of(trained).val
    total = len(val)  # type: ignore[arg-type]
    if limit is not None and not isinstance(val, IterableDataset):
        val = evenly_spaced(val, limit)
    size = batch_size or data.eval_batch_size or data.batch_size
    loader = build_loader(val, size, train=False, workers=data.workers)
    return cast("DataLoader[tuple[Tensor, Tensor]]", loader), total


def evenly_spaced(images: Dataset[tuple[Tensor, int]], count: int) -> Dataset[tuple[Tensor, int]]:
    """So many images of a data set with a length, evenly spaced; all of them if it has fewer."""
    total = len(images)  # type: ignore[arg-type]
    if count >= total:
        return images
    return Subset(images, [index * total // count for index in range(count)])


def load_datasets_of(trained: WeightsWithRecipe) -> Datasets:
    """Load the data sets of a recipe; an error names the options that give other data."""
    root = trained.recipe.data.root
    try:
        return recipe_datasets(trained.recipe)
    except DataError as error:
        if root is None:
            raise
        raise DataError(
            f"{trained.name}: {error}; if the data are not in data.root (={root}), give "
            f"--data FOLDER or --set data.root=FOLDER"
        ) from error


def _model(trained: WeightsWithRecipe, device: torch.device) -> nn.Module:
    """The model in evaluation mode, with all its weights from the file."""
    settings = trained.recipe.model
    model = create_model(settings.name, settings.num_classes, **settings.options)
    try:
        fresh = load_weights(model, trained.weights)
    except PretrainedError as error:
        raise EvaluationError(f"{error} (the recipe's model is {settings.name})") from error
    if fresh:
        raise EvaluationError(
            f"{trained.weights} has another number of classes than the recipe's model.num_classes "
            f"(={settings.num_classes}): its {fresh[0]} has another shape; give its own recipe"
        )
    if trained.recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def _source(
    source: WeightsWithRecipe, trained: WeightsWithRecipe, device: torch.device
) -> nn.Module:
    """The model whose gradients are followed; its images must be normalised in the same way."""
    mine, other = source.recipe, trained.recipe
    pairs = {
        "model.num_classes": (mine.model.num_classes, other.model.num_classes),
        "the normalisation": (normalisation(mine.data), normalisation(other.data)),
    }
    for what, (its, ours) in pairs.items():
        if its != ours:
            raise EvaluationError(
                f"--source {source.name} can't attack {trained.name}: {what} is {its} there and "
                f"{ours} here"
            )
    return _model(source, device)


def _space(recipe: Recipe, name: SpaceName) -> Space:
    if name == "normalised":
        return NORMALISED
    return pixel_space(*normalisation(recipe.data))
