"""The data sets that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence

from starfire_prune.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    Datasets,
    digits_normalisation,
    load_datasets,
)
from starfire_prune.recipe.sections import Data, Recipe
from starfire_prune.utils.text import listed

__all__ = ["normalisation", "recipe_datasets"]


def recipe_datasets(recipe: Recipe) -> Datasets:
    """Load the training and the validation images of a recipe.

    Raises:
        DataError: If the data can't be read, or have another number of classes than the model.
    """
    of_loaders = {"batch_size", "eval_batch_size", "workers"}
    settings = recipe.data.model_dump(exclude=of_loaders, exclude_none=True)
    num_classes = recipe.model.num_classes
    datasets = load_datasets(**settings, num_classes=num_classes)
    if len(datasets.classes) != num_classes:
        raise DataError(
            f"model.num_classes (={num_classes}) must be the number of classes in the data, "
            f"{len(datasets.classes)}{_named(datasets.classes)}: correct it, or give other data"
        )
    return datasets


def normalisation(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which images are normalised, per channel or one for all."""
    if data.name == "digits":
        mean, std = digits_normalisation()
        return (mean,), (std,)
    return data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD


def _named(classes: Sequence[str]) -> str:
    """The names of the classes, unless they are only numbers."""
    numbers = [str(label) for label in range(len(classes))]
    return "" if list(classes) == numbers else f" ({listed(classes)})"
