"""Comparisons of recipes: where two differ, and which differences matter to training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from starfire_prune.recipe.sections import Recipe
from starfire_prune.utils.settings import KeyPath

__all__ = [
    "WORKERS",
    "beyond_pruning",
    "dense_epochs",
    "differing_keys",
    "resume_differences",
    "shared_epochs",
    "training_differences",
]


# Keys that don't change training: the data may lie elsewhere, for example on a node's own disk
_MAY_DIFFER: Final = ("data.root", "training.trackers", "training.keep_checkpoints")

WORKERS: Final = "data.workers"
"""The key that may differ on resuming a run, although augmentation depends on it."""


def differing_keys(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """Where two recipes differ: dotted key to the values in `a` and in `b`; empty if nowhere.

    Example:
        >>> from starfire_prune.recipe import load_recipe
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> differing_keys(a, load_recipe("recipes/quickstart.yaml", ["pruning.amount=0.7"]))
        {'pruning.amount': (0.6, 0.7)}
    """
    return dict(_differences(a.model_dump(), b.model_dump(), ()))


def training_differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """`differing_keys` without keys that don't change training: paths, trackers, kept checkpoints.

    Example:
        >>> from starfire_prune.recipe import load_recipe
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> training_differences(
        ...     a, load_recipe("recipes/quickstart.yaml", ["training.keep_checkpoints=[3]"])
        ... )
        {}
    """
    return {key: value for key, value in differing_keys(a, b).items() if key not in _MAY_DIFFER}


def resume_differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """`training_differences` without the number of workers.

    It changes the random numbers of augmentation, but a machine may have too little memory for as
    many workers as a run began with.

    Example:
        >>> from starfire_prune.recipe import load_recipe
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> resume_differences(a, load_recipe("recipes/quickstart.yaml", ["data.workers=1"]))
        {}
    """
    return {key: values for key, values in training_differences(a, b).items() if key != WORKERS}


def beyond_pruning(
    differing: Mapping[str, tuple[object, object]],
) -> dict[str, tuple[object, object]]:
    """The differing keys that are within neither `pruning` nor `quantization`.

    Runs that differ in nothing else train the `shared_epochs` alike.
    """
    later = ("pruning", "quantization")
    return {key: value for key, value in differing.items() if key.partition(".")[0] not in later}


def dense_epochs(recipe: Recipe) -> int:
    """The number of epochs that a recipe trains dense: before its era, or all before quantization.

    It is 0 with `era_updates`, since the number of updates of an epoch depends on the data.

    Example:
        >>> from starfire_prune.recipe import load_recipe
        >>> dense_epochs(load_recipe("recipes/quickstart.yaml"))
        3
    """
    if recipe.pruning == "none":
        return recipe.epochs
    return recipe.pruning.era[0] if recipe.pruning.era is not None else 0


def shared_epochs(a: Recipe, b: Recipe) -> int:
    """The number of epochs that two recipes train alike if they differ in nothing else.

    These are the epochs before the first of their eras; with the same pruning, all before
    quantization.
    """
    return a.epochs if a.pruning == b.pruning else min(dense_epochs(a), dense_epochs(b))


def _differences(a: Any, b: Any, at: KeyPath) -> Iterator[tuple[str, tuple[object, object]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from _differences(a.get(key), b.get(key), (*at, key))
    elif a != b:
        yield ".".join(map(str, at)), (a, b)
