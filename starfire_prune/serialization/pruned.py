"""Saving and loading files of pruned models, which are small, and safetensors files for others.

`save_pruned` writes a model, `load_pruned` reads its tensors under plain names, `load_pruned_model`
a model, and `load_masks` the masks, so that training can continue. Both forms, `"dense"` and
`"compressed"`, are safetensors files with a CRC-32 of each tensor and of the header, verified
before anything is returned (docs/format.md). Nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from starfire_prune.serialization.architecture import (
    architecture_of,
    build_architecture,
    set_dtypes,
)
from starfire_prune.serialization.container import (
    MAX_BYTES,
    parse_json,
    read_tensor_file,
)
from starfire_prune.serialization.entries import (
    TENSORS_KEY,
    TensorEntry,
    decode_tensors,
    fill_tensors,
    read_entries,
)
from starfire_prune.serialization.files import (
    FileFormat,
    StrPath,
    check_format,
    is_writer,
    loading,
    write_state,
)
from starfire_prune.serialization.metadata import (
    METADATA_KEY,
    MODEL_KEY,
    QUANTIZATION_KEY,
    RECIPE_KEY,
    check_version,
    metadata_text,
    pruning_metadata,
    recipe_metadata,
)
from starfire_prune.serialization.state import (
    describe_mismatch,
    known_masks,
    masks_of_zeros,
    plain_state_dict,
)
from starfire_prune.utils.errors import CheckpointError, DamageError
from starfire_prune.utils.files import reason
from starfire_prune.utils.marks import check_finished, is_finished
from starfire_prune.utils.modules import clean_name, unwrap

if TYPE_CHECKING:
    from starfire_prune.engine.pruner import Pruner
    from starfire_prune.recipe.sections import Recipe

__all__ = [
    "PrunedFile",
    "convert_pruned",
    "is_pruned_file",
    "load_masks",
    "load_pruned",
    "load_pruned_model",
    "read_metadata",
    "read_pruned_file",
    "save_pruned",
]


def save_pruned(
    model: nn.Module,
    path: StrPath,
    format: FileFormat = "dense",
    *,
    deflate: bool = False,
    pruner: Pruner | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
    average_decay: float | None = None,
    unfinished: bool = False,
) -> None:
    """Write a pruned model to a safetensors file with plain keys.

    The write is atomic. The metadata give method, amount and era, the zeros of each pruned weight,
    the model and the recipe. Call it on every rank: masks are compared, and rank 0 writes.

    Args:
        model: The model that the pruner prunes, or mirrors, or a part with all its pruned layers.
        path: Path of the file.
        format: `"dense"`, with all zeros, which a new timm model loads strictly; `"compressed"`,
            with each tensor in the encoding that takes the fewest bytes, for this module's
            functions.
        deflate: Whether to deflate parts that get smaller by it, about a fifth for trained float32
            weights; such a file takes longer to load.
        pruner: The model's pruner. Without one, masks are those of `torch.nn.utils.prune`'s hooks,
            and in convolutions and linear layers without hooks every zero counts as pruned.
        recipe: The run's recipe, which is stored completely, including its paths.
        architecture: `{"name": "resnet50", "num_classes": 10, …}`, the arguments of
            `timm.create_model`. By default they are the recipe's, or name and classes of a timm
            model that has not been changed or built with other arguments.
        average_decay: Decay of the moving average, if the model is one.
        unfinished: Whether the pruning may be unfinished, which the metadata then say.

    Raises:
        PruningError, RanksError: From `pruner.check()`, or if a pruner of the model, passed or not,
            has not finished (`Pruner.check_finished`); nothing is written then.
        CheckpointError: If the disk is full, or a tensor's name, dtype or more than 16 dimensions
            can't be stored; an existing file at `path` is unchanged.
        ValueError: If `format` is unknown, `deflate` is used with a dense file, or `recipe` or
            `architecture` is not plain data or contains inf or NaN.

    Example:
        >>> save_pruned(model, "model.safetensors", "compressed")  # doctest: +SKIP
    """
    check_format(format, deflate)
    path = Path(path)
    if pruner is not None:
        pruner.check()
    check_finished(model, pruner, unfinished=unfinished)
    if not is_writer():
        return
    masks, finished = known_masks(model, pruner), is_finished(model, pruner)
    state = plain_state_dict(model, masks)
    if pruner is None:
        masks = {**masks_of_zeros(model, state), **masks}
    recipe_settings = recipe_metadata(recipe)
    pruning = pruning_metadata(model, state, masks, pruner, average_decay, finished=finished)
    metadata = {METADATA_KEY: metadata_text(pruning, "average_decay")}
    if recipe_settings:
        metadata[RECIPE_KEY] = metadata_text(recipe_settings, "recipe")
    arguments = architecture_of(unwrap(model), recipe_settings, architecture)
    if arguments:
        metadata[MODEL_KEY] = metadata_text(arguments, "architecture")
    write_state(path, state, masks, metadata, compress=format == "compressed", deflate=deflate)


def load_pruned(path: StrPath, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Load the tensors of a file of `save_pruned`, in either form, under plain names.

    Args:
        path: Path of the file.
        max_bytes: Most bytes that all decoded tensors may take; a small file can claim to hold a
            large model.

    Returns:
        A state dict of tensors on the CPU, as for `load_state_dict`.

    Raises:
        CheckpointError: If the file is damaged or too large; it names the file and the tensor.

    Example:
        >>> model.load_state_dict(load_pruned("model.safetensors"))  # doctest: +SKIP
    """
    entries = read_pruned_file(path, max_bytes=max_bytes).entries
    with loading(Path(path)):
        return decode_tensors(entries)


def load_pruned_model(
    path: StrPath, model: nn.Module | None = None, *, max_bytes: int = MAX_BYTES
) -> nn.Module:
    """Load a model from a file of `save_pruned`, in either form.

    Args:
        path: Path of the file.
        model: A dense model to load into, on any device. Its parameters and buffers must have the
            names and shapes of the file's; otherwise nothing is changed. It keeps its dtypes:
            floats are rounded to them, and values out of their range become inf. By default timm
            builds the model that the file names, with the file's dtypes.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Returns:
        `model`, or a new one in training mode, as timm builds it. It is dense, with zeros;
        `apply_masks(model, load_masks(path))` keeps them zero in further training.

    Raises:
        CheckpointError: If the file is damaged, does not name a model that timm can build, or does
            not fit the model; it names the file.
        ValueError: If `model` is on the device `meta`.

    Example:
        >>> model = load_pruned_model("model.safetensors").eval()  # doctest: +SKIP
    """
    path = Path(path)
    file = read_pruned_file(path, max_bytes=max_bytes)
    with loading(path):
        if QUANTIZATION_KEY in file.metadata:
            raise DamageError("it holds a quantized model: load it by load_quantized")
        if model is None:
            shapes = {name: entry.shape for name, entry in file.entries.items()}
            model = build_architecture(file.model, shapes, max_bytes)
            set_dtypes(model, {name: entry.dtype for name, entry in file.entries.items()})
        _fill(model, file.entries)
    return model


def load_masks(path: StrPath, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Load the masks of the pruned weights from a file of `save_pruned`, in either form.

    Args:
        path: Path of the file.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Returns:
        Bool tensors by parameter name (`layer1.0.conv1.weight`), True = kept, also for kept weights
        that are zero.

    Raises:
        CheckpointError: As `load_pruned`.

    Example:
        >>> model = load_pruned_model("model.safetensors")  # doctest: +SKIP
        >>> apply_masks(model, load_masks("model.safetensors"))  # doctest: +SKIP
    """
    file = read_pruned_file(path, max_bytes=max_bytes)
    with loading(Path(path)):
        return file.masks()


def convert_pruned(
    source: StrPath,
    path: StrPath,
    format: FileFormat = "compressed",
    *,
    deflate: bool = False,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write a file of `save_pruned` in another form, with the same tensors and metadata.

    Args:
        source: Path of the existing file.
        path: Path of the new file, which may be the same.
        format: `"dense"` or `"compressed"`.
        deflate: Whether to deflate parts, as in `save_pruned`.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Raises:
        CheckpointError, ValueError: As `load_pruned` and `save_pruned`.

    Example:
        >>> convert_pruned("export/model.safetensors", "small.safetensors")  # doctest: +SKIP
    """
    check_format(format, deflate)
    file = read_pruned_file(source, max_bytes=max_bytes)
    with loading(Path(source)):
        state = {name: entry.decode() for name, entry in file.entries.items()}
        masks = file.masks()
    keys = (METADATA_KEY, RECIPE_KEY, MODEL_KEY, *sorted(file.metadata))  # as save_pruned has them
    metadata = {key: file.metadata[key] for key in keys if key in file.metadata}
    del metadata[TENSORS_KEY]
    path, compress = Path(path), format == "compressed"
    write_state(path, state, masks, metadata, compress=compress, deflate=deflate)


class PrunedFile:
    """The content of a file of `save_pruned`, checked but not decoded.

    Attributes:
        path: Path of the file.
        entries: Entries of its tensors by name, in the order of the model's state dict.
        metadata: Strings of its header by name.
        size_bytes: Size of the file.
        pruning: Method, amount, era and phase, and the zeros of each pruned weight.
        model: Arguments of `timm.create_model`; None if unknown.
        recipe: The run's recipe; None if unknown.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        file = read_tensor_file(path)
        with loading(path):
            self.path, self.metadata, self.size_bytes = path, file.metadata, file.size_bytes
            self.pruning = self._content(METADATA_KEY) or {}
            check_version(self.pruning)
            self.entries = read_entries(file, max_bytes)
            self.model, self.recipe = self._content(MODEL_KEY), self._content(RECIPE_KEY)

    def masks(self) -> dict[str, Tensor]:
        """The masks of the pruned weights, bool, True = kept.

        Raises:
            DamageError: If the metadata name weights that the file does not hold.
        """
        weights = self.pruning.get("weights")
        if not isinstance(weights, dict) or not weights.keys() <= self.entries.keys():
            raise DamageError("its metadata name pruned weights that it does not hold")
        return {name: self.entries[name].mask() for name in weights}

    def _content(self, key: str) -> dict[str, Any] | None:
        text = self.metadata.get(key)
        return None if text is None else parse_json(text, f"its metadata {key!r}")


def read_pruned_file(path: StrPath, *, max_bytes: int = MAX_BYTES) -> PrunedFile:
    """Open a file of `save_pruned` and verify all its checksums.

    Args:
        path: Path of the file.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Raises:
        CheckpointError: As `load_pruned`.
    """
    return PrunedFile(Path(path), max_bytes)


def is_pruned_file(path: Path) -> bool:
    """Whether a safetensors file was written by `save_pruned`, even if one of its keys is damaged.

    Raises:
        CheckpointError: If it is not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({reason(error)}): restore it, export it "
            f"again, or convert it by safetensors.torch.save_file"
        ) from error
    return any(key.startswith(f"{METADATA_KEY}.") for key in metadata)


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata of the pruning in a file of `save_pruned`; empty for other safetensors files.

    Raises:
        CheckpointError: If the file does not exist, or is not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        return parse_json(metadata.get(METADATA_KEY, "{}"), "its metadata of the pruning")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {reason(error)}; export it again") from error


def _fill(model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Decode all tensors into a model's, after checking that they fit."""
    own = {clean_name(name): value for name, value in unwrap(model).state_dict().items()}
    if any(value.is_meta for value in own.values()):
        raise ValueError("`model` is on the device meta: call model.to_empty(device='cpu') first")
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    held = {name: entry.shape for name, entry in entries.items()}
    if mismatch := describe_mismatch(shapes, held):
        raise DamageError(f"it is of another model: it {mismatch}")
    fill_tensors(own, entries)
