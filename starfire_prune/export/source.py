"""What is exported: the weights of a finished run or of a file, their model and their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import safe_open
from torch import nn

from starfire_prune.recipe.sections import Data
from starfire_prune.runs.weights import find_weights
from starfire_prune.serialization.pruned import (
    FileFormat,
    convert_pruned,
    is_pruned_file,
    load_pruned_model,
    read_pruned_file,
    save_pruned,
)
from starfire_prune.utils.errors import CheckpointError, ExportError

if TYPE_CHECKING:
    from starfire_prune.export.image_settings import ImageSettings

__all__ = ["Source", "find_source", "load_source", "write_weights"]


_WAY_OUT = "give --recipe FILE or --model NAME"


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights, and what is known of them.

    Attributes:
        path: that was named, the folder of a run or a file.
        weights: the safetensors file.
        data: of its recipe, the run's, the one that was given or that in the file, if any.
        architecture: arguments of `timm.create_model`, if known: by the recipe that was given, the
            name that was given, or by the file.
        is_checked: whether the file is of `save_pruned`, with checksums.
        named: whether the model is named from outside, not by the file.
        has_own_recipe: whether `data` is of a recipe that the user named, of a run or of a file:
            the folders of one within weights, which come from anywhere, are not looked into.
    """

    path: Path
    weights: Path
    data: Data | None
    architecture: Mapping[str, Any] | None
    is_checked: bool
    named: bool
    has_own_recipe: bool = False

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the images for a model of `load_source`.

        The size is that of the run, or else that of the architecture, by its `img_size` or as
        timm gives it.
        """
        own: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        channels = (self.architecture or {}).get("in_chans", 3)
        images = self.images
        if images is not None:
            return channels, images.size, images.size
        _, *size = own.get("input_size", (3, 224, 224))
        size = (self.architecture or {}).get("img_size") or size
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @property
    def images(self) -> ImageSettings | None:
        """How the images were prepared, if it is known."""
        from starfire_prune.export.image_settings import image_settings

        return None if self.data is None else image_settings(self.data)

    def label_names(self, model: nn.Module) -> tuple[str, ...] | None:
        """The names of the classes of a model of `load_source`, if they are known here."""
        from starfire_prune.export.image_settings import class_names

        if self.data is None:
            return None
        classes = getattr(model, "num_classes", 0)
        return class_names(self.data, classes, reads_folders=self.has_own_recipe)


def find_source(path: Path, recipe: Path | None = None, model: str | None = None) -> Source:
    """Find the weights of a run's folder, or of a file, and what is known of their model.

    Args:
        path: folder of a finished run, or a safetensors file.
        recipe: file of the recipe of a safetensors file; a run has its own.
        model: name of a timm model, in place of a recipe.

    Raises:
        ExportError: for a recipe or a model that has no effect.
        EvaluationError: if there is nothing at `path`, or an unfinished run.
        RecipeError, CheckpointError, RunError: if a file is none or is damaged.
    """
    if recipe is not None and model is not None:
        raise ExportError(
            "--model has no effect: the recipe names its model; leave one of them out"
        )
    if path.is_dir() and (recipe is not None or model is not None):
        option = "--model" if recipe is None else "--recipe"
        raise ExportError(f"{option} has no effect: {path} is a run, which has its own recipe")
    if recipe is None and path.is_file():
        return _file(path, model)
    subject = find_weights(path, recipe, needs_data=False)
    settings = subject.recipe.model
    named = {"name": settings.name, "num_classes": settings.num_classes, **settings.options}
    checked = is_pruned_file(subject.weights)
    data = subject.recipe.data
    return Source(path, subject.weights, data, named, checked, named=True, has_own_recipe=True)


def load_source(source: Source) -> nn.Module:
    """Build the model of a source with its weights, dense and in eval mode.

    Raises:
        ExportError: if nothing names the model, or it has other tensors than the file.
        CheckpointError: if the file is damaged.
    """
    if source.architecture is None:
        raise ExportError(f"{source.weights} names no model of timm: {_WAY_OUT}")
    if not source.named:
        return _told_by_file(source)
    model = _created(source.architecture)
    if source.is_checked:
        return load_pruned_model(source.weights, model).eval()
    _load_unchecked(model, source)
    return model.eval()


def write_weights(
    source: Source, path: Path, format: FileFormat = "dense", *, deflate: bool = False
) -> None:
    """Write a source's weights as `save_pruned` does, with what the file tells of its pruning.

    Raises:
        ExportError, CheckpointError: as `load_source` and `save_pruned`; also for a file that
            holds no weights.
    """
    if source.is_checked:
        if not any(e.size_bytes for e in read_pruned_file(source.weights).entries.values()):
            raise ExportError(f"{source.weights} holds no weights: name a file that does")
        convert_pruned(source.weights, path, format, deflate=deflate)
        return
    architecture = _plain_architecture(source)
    model = load_source(source)
    # Without the recipe: it names folders of this machine, and exports are given away
    save_pruned(model, path, format, deflate=deflate, architecture=architecture)


def _told_by_file(source: Source) -> nn.Module:
    try:
        return load_pruned_model(source.weights).eval()
    except CheckpointError as error:  # it is not damaged: find_source has verified it
        raise ExportError(
            f"{source.weights} does not tell its model well enough to build it: {_WAY_OUT} (a "
            f"compact file is read by starfire_prune.compact_file.load_compact)"
        ) from error


def _file(path: Path, model: str | None) -> Source:
    """A safetensors file without a recipe beside it."""
    if not is_pruned_file(path):
        architecture = None if model is None else _named(model, path)
        return Source(path, path, None, architecture, is_checked=False, named=True)
    file = read_pruned_file(path)
    data = _data_of(file.recipe)
    if model is None:
        return Source(path, path, data, file.model, is_checked=True, named=False)
    return Source(path, path, data, _named(model, path), is_checked=True, named=True)


def _data_of(recipe: Mapping[str, Any] | None) -> Data | None:
    """The data of the recipe in a file, if it holds any that this version understands."""
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
    from starfire_prune.models import create_model

    try:
        sketch: Any = create_model(name, 1)
    except ValueError as error:
        raise ExportError(f"--model: {error}") from error
    classifier = sketch.pretrained_cfg.get("classifier")
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


def _created(architecture: Mapping[str, Any]) -> nn.Module:
    from starfire_prune.models import create_model  # not before: it loads timm

    return create_model(**architecture)


def _load_unchecked(model: nn.Module, source: Source) -> None:
    from starfire_prune.serialization.pretrained import load_weights
    from starfire_prune.utils.errors import PretrainedError

    try:
        fresh = load_weights(model, source.weights)
    except PretrainedError as error:
        raise ExportError(str(error)) from error
    if fresh:
        raise ExportError(
            f"{source.weights} is of other classes than the recipe's model.num_classes: its "
            f"{fresh[0]} is of another shape; give its own recipe"
        )


def _plain_architecture(source: Source) -> Mapping[str, Any]:
    if source.architecture is None:
        raise ExportError(f"{source.weights} names no model of timm: {_WAY_OUT}")
    return source.architecture
