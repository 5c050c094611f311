"""The input of an export: trained weights with what is known of their model and their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open
from torch import nn

from starfire_prune.export.image_settings import ImageSettings, class_names, image_settings
from starfire_prune.recipe.sections import Data
from starfire_prune.runs.weights import find_weights
from starfire_prune.serialization.files import FileFormat
from starfire_prune.serialization.metadata import is_finished_pruning
from starfire_prune.serialization.pruned import (
    convert_pruned,
    is_pruned_file,
    load_pruned_model,
    read_metadata,
    read_pruned_file,
    save_pruned,
)
from starfire_prune.utils.errors import (
    CheckpointError,
    ExportError,
    ModelError,
    PretrainedError,
)
from starfire_prune.utils.marks import mark_layers
from starfire_prune.utils.modules import prunable_layers

__all__ = ["ExportInput", "find_input", "load_input", "write_weights"]


_WAY_OUT = "give --recipe FILE or --model NAME"


@dataclasses.dataclass(frozen=True)
class ExportInput:
    """Weights, and what is known of them.

    Attributes:
        path: The path that the user gave: the folder of a run, or a file.
        weights: The safetensors file.
        data: The data settings of the recipe, which is the run's, one given by the user, or one in
            the file; None if there is none.
        architecture: Arguments of `timm.create_model` by the recipe, the name that the user gave,
            or the file; None if unknown.
        is_checked: Whether the file was written by `save_pruned`, with checksums.
        is_named: Whether the architecture is given by the user or the run, not by the file.
        may_read_folders: Whether the folders in `data` may be read. A recipe within a file may come
            from anywhere and name any folder of this machine.
    """

    path: Path
    weights: Path
    data: Data | None
    architecture: Mapping[str, Any] | None
    is_checked: bool
    is_named: bool
    may_read_folders: bool = False

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the images for a model of `load_input`.

        The size is that of the run; without a recipe it is the architecture's `img_size`, or that
        of timm's configuration.
        """
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        channels = (self.architecture or {}).get("in_chans", 3)
        images = self.images
        if images is not None:
            return channels, images.size, images.size
        _, *size = config.get("input_size", (3, 224, 224))
        size = (self.architecture or {}).get("img_size") or size
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @property
    def is_finished(self) -> bool:
        """Whether the file says nothing of an unfinished pruning."""
        return not self.is_checked or is_finished_pruning(read_metadata(self.weights))

    @property
    def images(self) -> ImageSettings | None:
        """How the images are prepared; None if unknown."""
        return None if self.data is None else image_settings(self.data)

    def label_names(self, model: nn.Module) -> tuple[str, ...] | None:
        """Names of the classes of a model of `load_input`; None if unknown."""
        if self.data is None:
            return None
        classes = getattr(model, "num_classes", 0)
        return class_names(self.data, classes, reads_folders=self.may_read_folders)


def find_input(
    path: Path,
    recipe: Path | None = None,
    model: str | None = None,
    *,
    unfinished: bool = False,
) -> ExportInput:
    """Find the weights in a run's folder, or a file of weights, and what is known of their model.

    Args:
        path: Folder of a finished run, or a safetensors file.
        recipe: Recipe of a safetensors file; a run has its own.
        model: Name of a timm model, instead of a recipe.
        unfinished: Whether the weights may be those of an unfinished pruning.

    Raises:
        ExportError: If `recipe` or `model` would have no effect, or if the weights were saved
            before their pruning was finished.
        EvaluationError: If there is nothing at `path`, or the run is unfinished.
        RecipeError, CheckpointError, RunError: If a file is damaged or of another kind.
    """
    if recipe is not None and model is not None:
        raise ExportError(
            "--model has no effect: the recipe names its model; leave one of them out"
        )
    if path.is_dir() and (recipe is not None or model is not None):
        option = "--model" if recipe is None else "--recipe"
        raise ExportError(f"{option} has no effect: {path} is a run, which has its own recipe")
    given = _find_file(path, model) if recipe is None and path.is_file() else _find(path, recipe)
    if not unfinished and not given.is_finished:
        raise ExportError(
            f"{given.weights} was saved before its pruning was finished: train on and save it "
            f"again, or give --unfinished (`unfinished=True`) to export it as it is"
        )
    return given


def load_input(given: ExportInput) -> nn.Module:
    """Build the model with its weights, dense and in eval mode.

    Raises:
        ExportError: If the model is unknown, or the file has other tensors.
        ModelError: If timm can't build the model.
        CheckpointError: If the file is damaged.
    """
    model = _loaded(given)
    if not given.is_finished:
        mark_layers(prunable_layers(model).items(), _UnfinishedFile(given.weights), {})
    return model


@dataclasses.dataclass(frozen=True)
class _UnfinishedFile:
    """Marks the layers of a file's model whose pruning is not finished."""

    path: Path

    def unfinished_text(self) -> str:
        return (
            f"{self.path} was saved before its pruning was finished: pass `unfinished=True` to "
            f"export it as it is"
        )


def _find(path: Path, recipe: Path | None) -> ExportInput:
    found = find_weights(path, recipe, needs_data=False)
    settings = found.recipe.model
    return ExportInput(
        path=path,
        weights=found.weights,
        data=found.recipe.data,
        architecture={
            "name": settings.name,
            "num_classes": settings.num_classes,
            **settings.options,
        },
        is_checked=is_pruned_file(found.weights),
        is_named=True,
        may_read_folders=True,
    )


def _loaded(given: ExportInput) -> nn.Module:
    from starfire_prune.models import create_model  # it imports timm

    architecture = _known_architecture(given)
    if not given.is_named:
        return _load_by_file(given)
    model = create_model(**architecture)
    if given.is_checked:
        return load_pruned_model(given.weights, model).eval()
    _load_unchecked(model, given)
    return model.eval()


def write_weights(
    given: ExportInput, path: Path, format: FileFormat = "dense", *, deflate: bool = False
) -> None:
    """Write the weights as `save_pruned` does, with the metadata of their file.

    Raises:
        ExportError, CheckpointError: As `load_input` and `save_pruned`, and for a file without
            weights.
    """
    if given.is_checked:
        if not any(e.size_bytes for e in read_pruned_file(given.weights).entries.values()):
            raise ExportError(f"{given.weights} holds no weights: name a file that does")
        convert_pruned(given.weights, path, format, deflate=deflate)
        return
    architecture = _known_architecture(given)
    model = load_input(given)
    # Without the recipe: it names folders of this machine, and exports are given to others
    save_pruned(model, path, format, deflate=deflate, architecture=architecture)


def _load_by_file(given: ExportInput) -> nn.Module:
    """The model that the file names."""
    try:
        return load_pruned_model(given.weights).eval()
    except CheckpointError as error:  # it is not damaged: find_input has verified it
        raise ExportError(
            f"{given.weights} does not describe its model well enough to build it: {_WAY_OUT} (a "
            f"compact file is read by starfire_prune.compact.load_compact)"
        ) from error


def _find_file(path: Path, model: str | None) -> ExportInput:
    """A safetensors file, without a recipe given by the user."""
    if not is_pruned_file(path):
        architecture = None if model is None else _named(model, path)
        return ExportInput(path, path, None, architecture, is_checked=False, is_named=True)
    file = read_pruned_file(path)
    architecture = file.model if model is None else _named(model, path)
    is_named = model is not None
    return ExportInput(path, path, _data_of(file.recipe), architecture, True, is_named)


def _data_of(recipe: Mapping[str, Any] | None) -> Data | None:
    """The data settings of the recipe in a file, if this version can read them."""
    data = (recipe or {}).get("data")
    if not isinstance(data, Mapping):
        return None
    given = {key: value for key, value in data.items() if value is not None}
    try:
        return Data.model_validate(given, context={"keep_unset": True})
    except ValidationError:
        return None


def _named(name: str, path: Path) -> dict[str, Any]:
    """The arguments for a named model with as many classes as the file's classifier has."""
    from starfire_prune.models import create_model  # it imports timm

    try:
        model: Any = create_model(name, 1)
    except ModelError as error:
        raise ExportError(f"--model: {error}") from error
    classifier = model.pretrained_cfg.get("classifier")
    first = classifier[0] if isinstance(classifier, list | tuple) else classifier
    shape = _shape_of(path, f"{first}.weight")
    if shape is None:
        raise ExportError(
            f"{path} is of another model than --model {name}: it lacks {first}.weight"
        )
    return {"name": name, "num_classes": shape[0]}


def _shape_of(path: Path, tensor: str) -> tuple[int, ...] | None:
    if is_pruned_file(path):
        entry = read_pruned_file(path).entries.get(tensor)
        return None if entry is None else entry.shape
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        return tuple(file.get_slice(tensor).get_shape()) if tensor in names else None


def _load_unchecked(model: nn.Module, given: ExportInput) -> None:
    from starfire_prune.serialization.pretrained import load_weights  # it imports timm

    try:
        fresh = load_weights(model, given.weights)
    except PretrainedError as error:
        raise ExportError(str(error)) from error
    if fresh:
        raise ExportError(
            f"{given.weights} has another number of classes than the recipe's model.num_classes: "
            f"its {fresh[0]} has another shape; give the recipe that it was trained by"
        )


def _known_architecture(given: ExportInput) -> Mapping[str, Any]:
    if given.architecture is None:
        raise ExportError(f"{given.weights} does not name a timm model: {_WAY_OUT}")
    return given.architecture
