"""Accuracy of trained weights on the validation images, clean and under attacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from starfire_prune.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    Datasets,
    build_loader,
    digits_normalisation,
)
from starfire_prune.evaluation.attacks import (
    NORMALISED,
    Space,
    check_pgd,
    default_step_size,
    fgsm,
    pgd,
    pixel_space,
)
from starfire_prune.evaluation.results import Evaluation, Result, file_sha256
from starfire_prune.models import create_model
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.data import recipe_datasets
from starfire_prune.runs.environment import environment
from starfire_prune.runs.weights import WeightsWithRecipe, data_settings
from starfire_prune.serialization.pretrained import load_weights
from starfire_prune.utils.errors import EvaluationError, PretrainedError

__all__ = ["Attack", "chosen_device", "evaluate_subject"]


_PRECISIONS: Final = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_AUTOCAST: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}
Precision = Literal["fp32", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack with one epsilon; the other settings are PGD's, see `starfire_prune.attacks`.

    What is left out of PGD's is set to what it then is; without `seed` it starts from the images.

    Raises:
        ValueError: if a setting of PGD is out of its range.

    Example:
        >>> Attack("pgd", 0.04)
        Attack(kind='pgd', epsilon=0.04, steps=10, step_size=0.01, restarts=1, seed=None)
    """

    kind: Literal["fgsm", "pgd"]
    epsilon: float
    steps: int | None = None
    step_size: float | None = None
    restarts: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind != "pgd":
            return
        steps = 10 if self.steps is None else self.steps
        restarts = 1 if self.restarts is None else self.restarts
        check_pgd(steps, self.step_size if self.epsilon else None, restarts, self.seed)
        step_size = default_step_size(self.epsilon, steps)
        for name, value in {"steps": steps, "step_size": step_size, "restarts": restarts}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the class is frozen

    @property
    def pgd_settings(self) -> dict[str, Any]:
        """The settings that PGD alone has, by the names of its arguments."""
        return {name: getattr(self, name) for name in ("steps", "step_size", "restarts", "seed")}


def evaluate_subject(
    subject: WeightsWithRecipe,
    attacks: Sequence[Attack] = (),
    *,
    space: Literal["pixel", "normalised"] = "pixel",
    source: WeightsWithRecipe | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> Evaluation:
    """Measure top-1, top-5 and loss on the validation images, clean and under each attack.

    Clean images are measured in the recipe's mixed precision, as while training, and all else in
    float32. fp16, which is not for a CPU, is float32 there.

    Args:
        subject: the weights.
        attacks: to measure; those by FGSM share one gradient.
        space: of their epsilons.
        source: weights whose gradients the attacks follow, in place of the subject's own.
        limit: so many images, evenly spaced (of shards the first ones), from 1; all by default.
        batch_size: from 1; by default the recipe's in evaluation.
        device: to work on; by default the accelerator, if there is one.

    Returns:
        The results of this call alone.

    Raises:
        EvaluationError: if weights, recipe, source and data don't fit, or memory is too small.
        DataError: if the data can't be read.

    Example:
        >>> subject = find_weights(Path("runs/quickstart"))  # doctest: +SKIP
        >>> evaluate_subject(subject, [Attack("fgsm", 1 / 255)]).results[1].top1  # doctest: +SKIP
        0.9333
    """
    device = device or chosen_device()
    recipe = subject.recipe
    loader, total = _validation(subject, limit, batch_size)
    model = _model(subject, device)
    attacker = model if source is None else _source(source, subject, device)
    measured = _Measured(model, attacker, _space(recipe, space), _precision(recipe, device))
    with _repeatable(), _told():
        tallies = _measure(measured, loader, attacks, limit or total, device, subject.name)
    clean = Result(attack="none", epsilon=0.0, precision=measured.precision, **tallies[0].shares())
    attacked = [
        Result(
            attack=attack.kind,
            space=space,
            source=source.name if source is not None else None,
            **{name: value for name, value in vars(attack).items() if name != "kind"},
            **tally.shares(),
        )
        for attack, tally in zip(attacks, tallies[1:], strict=True)
    ]
    return Evaluation(
        weights_sha256=file_sha256(subject.weights),
        source_sha256={} if source is None else {source.name: file_sha256(source.weights)},
        data=data_settings(recipe),
        images=total,
        environment=environment(device),
        results=(clean, *attacked),
    )


def chosen_device(name: str | None = None) -> torch.device:
    """The device of that name, or the accelerator, or the CPU where there is none.

    Raises:
        EvaluationError: if there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise EvaluationError(f"--device (={name}) can't be used: {reason}") from error
    return device


# --- measuring ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model, the one that attacks follow, their space and the precision of clean passes."""

    model: nn.Module
    attacker: nn.Module
    space: Space
    precision: Precision


@dataclasses.dataclass
class _Tally:
    """Sums over images."""

    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    images: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())
        self.loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        self.images += len(labels)

    def shares(self) -> dict[str, Any]:
        loss = self.loss / self.images
        return {
            "images": self.images,
            "top1": self.top1 / self.images,
            "top5": self.top5 / self.images,
            "loss": loss if math.isfinite(loss) else None,
        }


@torch.no_grad()
def _measure(
    measured: _Measured,
    loader: DataLoader[tuple[Tensor, Tensor]],
    attacks: Sequence[Attack],
    count: int,
    device: torch.device,
    name: str,
) -> list[_Tally]:
    """The tallies of clean images and of each attack, over the first `count` images."""
    clean, *attacked = [_Tally() for _ in range(1 + len(attacks))]
    for images, labels in tqdm(loader, desc=name, disable=None, leave=False):
        rest = count - clean.images
        if rest <= 0:  # of shards, which give more
            break
        first = clean.images
        images, labels = images[:rest].to(device), labels[:rest].to(device)
        with _autocast(measured.precision, device):
            logits = measured.model(images)
        clean.add(logits, labels)
        found = _adversarial(measured, images, labels, attacks, first)
        for tally, adversarial in zip(attacked, found, strict=True):
            tally.add(measured.model(adversarial), labels)
    return [clean, *attacked]


def _adversarial(
    measured: _Measured, images: Tensor, labels: Tensor, attacks: Sequence[Attack], first: int
) -> Iterator[Tensor]:
    """The images of each attack; those by FGSM from one gradient."""
    model, space = measured.attacker, measured.space
    epsilons = [attack.epsilon for attack in attacks if attack.kind == "fgsm"]
    by_fgsm = iter(fgsm(model, images, labels, epsilons, space))
    for attack in attacks:
        if attack.kind == "fgsm":
            yield next(by_fgsm)
        else:
            settings = attack.pgd_settings if attack.epsilon else {}  # at 0 it takes no step
            yield pgd(model, images, labels, attack.epsilon, space, first=first, **settings)


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _precision(recipe: Recipe, device: torch.device) -> Precision:
    precision = cast("Precision", _PRECISIONS[recipe.training.mixed_precision])
    return "fp32" if precision == "fp16" and device.type == "cpu" else precision


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN choose kernels that repeat their bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a machine is too small for into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError("the device has too little memory: lower --batch-size") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise EvaluationError(
            "a loader process was ended from outside, mostly for want of memory or of /dev/shm: "
            "--set data.workers=0"
        ) from error


# --- what is measured ---------------------------------------------------------------------------


def _validation(
    subject: WeightsWithRecipe, limit: int | None, batch_size: int | None
) -> tuple[DataLoader[tuple[Tensor, Tensor]], int]:
    """A loader of the validation images, or of an evenly spaced part, and how many there are."""
    data = subject.recipe.data
    val = _datasets(subject).val
    total = len(val)  # type: ignore[arg-type]
    if limit is not None and limit < total and not isinstance(val, IterableDataset):
        val = Subset(val, [index * total // limit for index in range(limit)])
    size = batch_size or data.eval_batch_size or data.batch_size
    loader = build_loader(val, size, train=False, workers=data.workers)
    return cast("DataLoader[tuple[Tensor, Tensor]]", loader), total


def _datasets(subject: WeightsWithRecipe) -> Datasets:
    root = subject.recipe.data.root
    try:
        return recipe_datasets(subject.recipe)
    except DataError as error:
        if root is None:
            raise
        raise DataError(
            f"{subject.name}: {error}; where the data lie elsewhere than data.root (={root}), give "
            f"--data FOLDER or --set data.root=FOLDER"
        ) from error


def _model(subject: WeightsWithRecipe, device: torch.device) -> nn.Module:
    """The model in evaluation, with the subject's weights and none of its own."""
    settings = subject.recipe.model
    model = create_model(settings.name, settings.num_classes, **settings.options)
    try:
        fresh = load_weights(model, subject.weights)
    except PretrainedError as error:
        raise EvaluationError(f"{error} (the recipe's model is {settings.name})") from error
    if fresh:
        raise EvaluationError(
            f"{subject.weights} is of other classes than the recipe's model.num_classes "
            f"(={settings.num_classes}): its {fresh[0]} is of another shape; give its own recipe"
        )
    if subject.recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def _source(
    source: WeightsWithRecipe, subject: WeightsWithRecipe, device: torch.device
) -> nn.Module:
    """The model whose gradients are followed, which must see images as the subject does."""
    own, other = source.recipe, subject.recipe
    pairs = {
        "model.num_classes": (own.model.num_classes, other.model.num_classes),
        "the normalisation": (_normalisation(own), _normalisation(other)),
    }
    for what, (its, ours) in pairs.items():
        if its != ours:
            raise EvaluationError(
                f"--source {source.name} can't attack {subject.name}: {what} is {its} there and "
                f"{ours} here"
            )
    return _model(source, device)


def _normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the channels of images are normalised."""
    data = recipe.data
    if data.name == "digits":
        mean, std = digits_normalisation()
        return (mean,), (std,)
    return data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD


def _space(recipe: Recipe, name: str) -> Space:
    if name == "normalised":
        return NORMALISED
    return pixel_space(*_normalisation(recipe))
