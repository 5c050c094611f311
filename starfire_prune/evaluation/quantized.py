"""Quantization of a run's weights on its training images, and the accuracy before and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, IterableDataset

from starfire_prune.data import build_loader
from starfire_prune.evaluation.evaluate import evenly_spaced, load_datasets_of, validation_loader
from starfire_prune.quantization.post_training import quantize
from starfire_prune.runs.weights import WeightsWithRecipe
from starfire_prune.utils.errors import EvaluationError
from starfire_prune.utils.limits import explained_limits
from starfire_prune.utils.tally import Tally

__all__ = ["QuantizedWeights", "measure_quantized", "quantize_weights"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeights:
    """A quantized model, and what was measured.

    Attributes:
        module: The quantized model.
        images: Number of validation images.
        top1: Share of them that the float model classifies rightly, in [0, 1].
        quantized_top1: Share of them that the quantized model classifies rightly, in [0, 1].
    """

    module: fx.GraphModule
    images: int
    top1: float
    quantized_top1: float


def quantize_weights(
    trained: WeightsWithRecipe,
    model: nn.Module,
    *,
    calibration_images: int = 512,
    limit: int | None = None,
    reduced_range: bool = False,
    unfinished: bool = False,
) -> QuantizedWeights:
    """Quantize the model of a run, and measure top-1 before and after.

    Scales are calibrated on evenly spaced training images, with the random crops of training but
    without other augmentation. Both models run on the CPU in float32.

    Args:
        trained: The weights with their recipe.
        model: The model with these weights.
        calibration_images: Number of training images, from 1.
        limit: Number of validation images, from 1, evenly spaced; default: all.
        reduced_range: As in `quantize`.
        unfinished: Whether the pruning may be unfinished.

    Raises:
        QuantizationError, PruningError, TraceError: As `quantize`.
        DataError: If the data can't be read.
        EvaluationError: If memory is too small.
    """
    with _limits():
        module = quantize(
            model,
            _calibration(trained, calibration_images),
            reduced_range=reduced_range,
            unfinished=unfinished,
        )
    return measure_quantized(trained, model, module, limit)


def measure_quantized(
    trained: WeightsWithRecipe, model: nn.Module, module: fx.GraphModule, limit: int | None = None
) -> QuantizedWeights:
    """Measure top-1 of the model of a run and of its quantized model, on the CPU in float32.

    Args:
        trained: The weights with their recipe.
        model: The model with these weights, in eval mode.
        module: The quantized model.
        limit: Number of validation images, from 1, evenly spaced; default: all.

    Raises:
        DataError: If the data can't be read.
        EvaluationError: If memory is too small.
    """
    with _limits():
        tallies = _measured([model, module], trained, limit)
    (top1, *_), (quantized_top1, *_) = (tally.means() for tally in tallies)
    return QuantizedWeights(module, tallies[0].images, top1, quantized_top1)


def _limits() -> AbstractContextManager[None]:
    return explained_limits(
        EvaluationError,
        less_memory="--set data.batch_size=16 --set data.eval_batch_size=16",
        fewer_workers="--set data.workers=0",
    )


def _calibration(trained: WeightsWithRecipe, count: int) -> Iterator[Tensor]:
    """Batches of training images, `count` in all."""
    plain = {"auto_augment": None, "random_erasing": None, "color_jitter": None, "hflip": None}
    recipe = trained.recipe
    data = recipe.data.model_copy(update=plain)
    recipe = recipe.model_copy(update={"data": data})
    train: Dataset[tuple[Tensor, int]] = load_datasets_of(
        dataclasses.replace(trained, recipe=recipe)
    ).train
    if not isinstance(train, IterableDataset):
        train = evenly_spaced(train, count)
    size = min(data.batch_size, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for images, _ in build_loader(train, size, train=False, workers=data.workers):
            yield images[:count]
            count -= len(images)
            if count <= 0:  # shards yield more
                return


@torch.no_grad()
def _measured(
    models: list[nn.Module], trained: WeightsWithRecipe, limit: int | None
) -> list[Tally]:
    loader, total = validation_loader(trained, limit)
    tallies, rest = [Tally() for _ in models], limit or total
    for images, labels in loader:
        images, labels = images[:rest], labels[:rest]
        for model, tally in zip(models, tallies, strict=True):
            tally.add(model(images), labels, 0.0)
        rest -= len(images)
        if rest <= 0:  # shards yield more
            break
    return tallies
