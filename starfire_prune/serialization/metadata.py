"""The metadata of a pruned file: the pruning, the model and the recipe, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from starfire_prune.serialization.container import parse_json
from starfire_prune.utils.errors import DamageError
from starfire_prune.utils.files import reason
from starfire_prune.utils.modules import weight_key

if TYPE_CHECKING:
    from starfire_prune.engine.pruner import Pruner
    from starfire_prune.recipe.sections import Recipe

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "MODEL_KEY",
    "QUANTIZATION_KEY",
    "RECIPE_KEY",
    "check_version",
    "is_finished_pruning",
    "metadata_text",
    "pruning_metadata",
    "recipe_metadata",
]


FORMAT_VERSION = 1
METADATA_KEY = "starfire_prune"
MODEL_KEY = "starfire_prune.model"
QUANTIZATION_KEY = "starfire_prune.quantization"
RECIPE_KEY = "starfire_prune.recipe"


def check_version(pruning: Mapping[str, Any]) -> None:
    """Raise DamageError unless the metadata have the version that this package reads."""
    version = pruning.get("format_version")
    if version is None:
        raise DamageError("it is not a file of save_pruned: its metadata have no format_version")
    if version != FORMAT_VERSION:
        raise DamageError(
            f"its format_version is {version!r}, but this version of starfire_prune reads "
            f"{FORMAT_VERSION}: install the version that wrote it"
        )


def metadata_text(content: Mapping[str, Any], argument: str) -> str:
    """The JSON of metadata, which `parse_json` accepts.

    Args:
        content: Plain data.
        argument: Argument of `save_pruned` that the content comes from.

    Raises:
        ValueError: For inf, NaN, keys that are equal as text, more than 64 levels, and types that
            JSON does not have.
    """
    try:
        text = json.dumps(content, allow_nan=False)
        parse_json(text, "it")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{argument}` can't be stored in the file ({reason(error)}): it must consist of "
            f"finite numbers, strings, and lists and dicts of these"
        ) from error
    return text


def pruning_metadata(
    model: nn.Module,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    pruner: Pruner | None,
    average_decay: float | None,
    *,
    finished: bool = True,
) -> dict[str, Any]:
    """The metadata of the pruning: the settings of a run, and the zeros of each pruned weight.

    Args:
        model: The model that the pruner prunes, or mirrors.
        state: The model's plain state.
        masks: Masks of all pruned weights by parameter name.
        pruner: The model's pruner, if any.
        average_decay: Decay of the moving average, if the model is one.
        finished: Whether the pruning is finished.
    """
    sparsity = None if pruner is None else pruner.sparsity(model)
    names = {} if pruner is None else pruner.names_in(model)
    layers = {weight_key(within): (name, within) for name, within in names.items()}

    def weight(name: str) -> dict[str, Any]:
        own, within = layers.get(name, ("", ""))
        layer = pruner.layers[own] if pruner is not None and name in layers else None
        return {
            "method": None if layer is None else layer.method_name,
            "amount": None if layer is None else layer.amount,
            "zeros": int((state[name] == 0).sum()),
            "total": state[name].numel(),
            "free": 0 if layer is None or sparsity is None else sparsity[within].dead_input_zeros,
        }

    run: dict[str, Any] = {"method": None}
    if pruner is not None:
        pruning = pruner.pruning
        era = "era" if pruning.era is not None else "era_updates"
        run = {"method": pruning.method, "amount": pruning.amount}
        run |= {era: list(getattr(pruning, era)), "phase": pruner.phase}
    if not finished:
        run["finished"] = False
    average = {} if average_decay is None else {"average_decay": average_decay}
    weights = {name: weight(name) for name in masks}
    return {"format_version": FORMAT_VERSION, **run, **average, "weights": weights}


def is_finished_pruning(pruning: Mapping[str, Any]) -> bool:
    """Whether the metadata of a pruning are those of a finished one, or of none by a pruner."""
    return bool(pruning.get("finished", True))


def recipe_metadata(recipe: Recipe | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A recipe as plain data."""
    if recipe is None or isinstance(recipe, Mapping):
        return None if recipe is None else dict(recipe)
    return recipe.model_dump(mode="json")
