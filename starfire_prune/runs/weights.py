"""Weights with their recipe: those of a finished run, or of a safetensors file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import exported_file, read_metrics
from starfire_prune.utils.errors import EvaluationError
from starfire_prune.utils.settings import RecipeError

__all__ = ["WeightsWithRecipe", "data_settings", "find_weights"]


_IMAGES: Final = {
    *("name", "root", "val_split", "options"),
    *("image_size", "interpolation", "crop_pct", "mean", "std"),
}


@dataclasses.dataclass(frozen=True)
class WeightsWithRecipe:
    """Weights, and the recipe that describes their model and their data.

    Attributes:
        name: Name of the run's folder, or of the file.
        weights: The safetensors file.
        recipe: The recipe with all overrides.
        folder: Folder of the run; None for a file.
        other_settings: Keys whose overrides choose other images or another model than the run's.
    """

    name: str
    weights: Path
    recipe: Recipe
    folder: Path | None = None
    other_settings: tuple[str, ...] = ()

    @property
    def keeps_evaluation(self) -> bool:
        """Whether an evaluation is kept in the folder of the run."""
        return self.folder is not None and not self.other_settings


def find_weights(
    path: Path,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    root: Path | None = None,
    *,
    needs_data: bool = True,
) -> WeightsWithRecipe:
    """Find the weights in a run's folder, or a file of weights, and read their recipe.

    Args:
        path: Folder of a finished run, or a safetensors file such as its export.
        recipe: Recipe file that belongs to a safetensors file; a run has its own.
        overrides: Settings that replace the recipe's, each `"KEY=VALUE"`.
        root: Folder of the images, in place of `data.root`.
        needs_data: Raise an error if `data.root` is an environment variable that is not set.

    Raises:
        EvaluationError: If there is nothing at `path`, the run is unfinished, or a file comes
            without a recipe.
        RecipeError: If the recipe with the overrides is not valid.
        RunError: If the metrics of an unfinished run are damaged.
    """
    settings = [*overrides, *([] if root is None else [f"data.root={json.dumps(str(root))}"])]
    if path.is_dir():
        return _weights_of_run(path, settings, needs_data)
    if not path.is_file():
        raise EvaluationError(f"there is no run or file {path}{_neighbours(path)}")
    if recipe is None:
        raise EvaluationError(
            f"{path} needs the recipe of its model and its data: give --recipe FILE, or the folder "
            f"of its run in place of the file"
        )
    return WeightsWithRecipe(path.name, path, _load(recipe, settings, needs_data))


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """The data settings of a recipe that decide on which images weights are evaluated."""
    return recipe.data.model_dump(mode="json", include=_IMAGES)


def _weights_of_run(folder: Path, settings: Sequence[str], needs_data: bool) -> WeightsWithRecipe:
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise EvaluationError(f"{folder} is not a run's folder: it holds no {saved.name}")
    recipe = _load(saved, settings, needs_data)
    weights = exported_file(folder)
    if not weights.is_file():
        raise EvaluationError(
            f"{folder} is unfinished, {len(read_metrics(folder))} of {recipe.total_epochs} epochs "
            f"are done: continue with starfire train {saved} --output {folder}"
        )
    trained, asked = _identity(_load(saved, [], needs_data=False)), _identity(recipe)
    other = tuple(key for key in trained if trained[key] != asked[key])
    return WeightsWithRecipe(folder.resolve().name, weights, recipe, folder, other)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The settings, by their keys, that decide which model is evaluated on which images."""
    data = {f"data.{key}": value for key, value in data_settings(recipe).items() if key != "root"}
    model = recipe.model.model_dump(mode="json", exclude={"pretrained"})
    return {**{f"model.{key}": value for key, value in model.items()}, **data}


def _load(path: Path, settings: Sequence[str], needs_data: bool) -> Recipe:
    try:
        return load_recipe(path, settings, keep_unset=not needs_data)
    except RecipeError as error:
        fixable = re.search(": data.root: (is required|the environment variable).*$", str(error))
        if fixable is None:
            raise
        raise RecipeError(f"{error}; or give --data FOLDER") from error


def _neighbours(path: Path) -> str:
    """The end of an error about a path that doesn't exist: similar names in its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = sorted(other.name for other in folder.iterdir() if not other.name.startswith("."))
    near = difflib.get_close_matches(path.name, names) or names[:5]
    return f"; in {folder}: {', '.join(near)}" if near else f"; {folder} is empty"
