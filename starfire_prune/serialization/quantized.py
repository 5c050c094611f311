"""Saving and loading files of quantized models, which load without torchao.

`save_quantized` writes what `starfire_prune.quantization.quantize` returns: int8 weights and scales
under plain names, in a file of the same format as those of pruned models (docs/format.md).
`load_quantized` builds the float model that the file names, and its graph with the file's weights
and scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization.assembling import assemble
from starfire_prune.quantization.checks import check_masks
from starfire_prune.quantization.exporting import exported_module
from starfire_prune.quantization.names import bias_name, scale_name
from starfire_prune.quantization.origin import Method, Origin, model_on_meta, origin_of, set_origin
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.quantization.scheme import Place, QuantizedInput, QuantizedWeight, Scheme
from starfire_prune.serialization.architecture import (
    Shapes,
    architecture_of,
    build_architecture,
)
from starfire_prune.serialization.container import MAX_BYTES, checked_shape, parse_json
from starfire_prune.serialization.entries import decode_tensors
from starfire_prune.serialization.files import (
    FileFormat,
    StrPath,
    check_format,
    is_writer,
    loading,
    write_state,
)
from starfire_prune.serialization.metadata import (
    FORMAT_VERSION,
    METADATA_KEY,
    MODEL_KEY,
    QUANTIZATION_KEY,
    RECIPE_KEY,
    metadata_text,
    recipe_metadata,
)
from starfire_prune.serialization.pruned import PrunedFile, read_pruned_file
from starfire_prune.serialization.state import describe_mismatch
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import DamageError, PruningError, QuantizationError
from starfire_prune.utils.text import first_line, listed

if TYPE_CHECKING:
    from starfire_prune.recipe.sections import Recipe

__all__ = ["load_quantized", "save_quantized"]


_SCALE, _ZERO_POINT = "input_scale", "input_zero_point"
_METHODS = ("post_training", "training")


def save_quantized(
    module: nn.Module,
    path: StrPath,
    format: FileFormat = "dense",
    *,
    deflate: bool = False,
    recipe: Recipe | Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> None:
    """Write a quantized model to a safetensors file with plain keys.

    The file holds each layer's `weight` (int8), `weight_scale` and `bias`, what is not quantized,
    and `input_scale` with `input_zero_point` for each layer or operation with quantized inputs. The
    metadata give the model, the zeros of pruned weights and the calibration. The write is atomic.
    Masks that are loaded also prune what was rounded to zero.

    Args:
        module: What `quantize` returned, or `load_quantized`.
        path: Path of the file.
        format: `"dense"`, with all zeros, or `"compressed"`, as in `save_pruned`.
        deflate: Whether to deflate parts that get smaller by it; compressed files only.
        recipe: The run's recipe, which is stored completely, including its paths.
        architecture: Arguments of `timm.create_model`, as in `save_pruned`.

    Raises:
        QuantizationError: If `module` is not a quantized model.
        PruningError: If a pruned weight is not zero.
        CheckpointError, ValueError: As `save_pruned`.

    Example:
        >>> save_quantized(quantize(model, batches), "int8.safetensors")  # doctest: +SKIP
    """
    check_format(format, deflate)
    origin = origin_of(module)
    graph = cast(fx.GraphModule, module)
    check_masks(graph)
    if not is_writer():
        return
    scheme, settings = read_scheme(graph), recipe_metadata(recipe)
    state = {**_weights_of(scheme), **_inputs_of(scheme), **_others_of(graph, scheme, origin)}
    # Not the model's masks: a hundredth of kept weights is rounded to zero, and naming these would
    # take a quarter of a compressed file
    masks = {name: state[name] != 0 for name in origin.masks}
    metadata = {
        METADATA_KEY: metadata_text(_pruning_of(masks), "masks"),
        QUANTIZATION_KEY: metadata_text(_quantization_of(scheme, origin), "calibration"),
    }
    if settings:
        metadata[RECIPE_KEY] = metadata_text(settings, "recipe")
    if arguments := architecture_of(origin.model, settings, architecture):
        metadata[MODEL_KEY] = metadata_text(arguments, "architecture")
    write_state(
        Path(path), state, masks, metadata, compress=format == "compressed", deflate=deflate
    )


def load_quantized(
    path: StrPath, model: nn.Module | None = None, *, max_bytes: int = MAX_BYTES
) -> fx.GraphModule:
    """Load a quantized model from a file of `save_quantized`. This does not need torchao.

    Args:
        path: Path of the file.
        model: A float model of the architecture, which is not changed and whose weights are not
            read. By default timm builds the model that the file names.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Returns:
        A model whose outputs equal those of the saved one, bit for bit with the same torch.

    Raises:
        CheckpointError: If the file is damaged or does not hold a quantized model, does not name a
            model that timm can build, or does not fit the model; it names the file.

    Example:
        >>> outputs = load_quantized("int8.safetensors")(images)  # doctest: +SKIP
    """
    path = Path(path)
    file = read_pruned_file(path, max_bytes=max_bytes)
    with loading(path):
        try:
            return _loaded(file, model, max_bytes)
        except (QuantizationError, PruningError) as error:
            raise DamageError(str(error)) from error


# What is written


def _weights_of(scheme: Scheme) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, weight in scheme.weights.items():
        state[name], state[scale_name(name)] = weight.values, weight.scales
        if weight.bias is not None:
            state[bias_name(name)] = weight.bias
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _inputs_of(scheme: Scheme) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in _indices_of(scheme):
        inputs = [each for place, each in scheme.inputs.items() if place[0] == name]
        scales = [each.scale for each in inputs]
        zero_points = [each.zero_point for each in inputs]
        state[f"{name}.{_SCALE}"] = torch.tensor(scales, dtype=torch.float32)
        state[f"{name}.{_ZERO_POINT}"] = torch.tensor(zero_points, dtype=torch.uint8)
    return state


def _others_of(module: fx.GraphModule, scheme: Scheme, origin: Origin) -> dict[str, Tensor]:
    """The tensors that are not quantized, such as batch norms that no layer precedes."""
    others = _not_quantized(module, scheme, origin.model)
    zeros = {name: ~mask for name, mask in origin.masks.items()}
    return {
        name: tensor.detach().masked_fill(zeros[name], 0.0) if name in zeros else tensor.detach()
        for name, tensor in others.items()
    }


def _not_quantized(module: fx.GraphModule, scheme: Scheme, model: nn.Module) -> dict[str, Tensor]:
    """A quantized model's tensors that its float model has, too, apart from weights and biases."""
    replaced = {*scheme.weights, *map(bias_name, scheme.weights)}
    own = model.state_dict().keys() - replaced
    return {name: value for name, value in module.state_dict().items() if name in own}


def _indices_of(scheme: Scheme) -> dict[str, list[int]]:
    """The indices of the quantized inputs of each layer and operation, by its name."""
    indices: dict[str, list[int]] = {}
    for name, index in scheme.inputs:
        indices.setdefault(name, []).append(index)
    return indices


def _pruning_of(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    def weight(mask: Tensor) -> dict[str, Any]:
        zeros = mask.numel() - int(mask.sum())
        return {"method": None, "amount": None, "zeros": zeros, "total": mask.numel(), "free": 0}

    weights = {name: weight(mask) for name, mask in masks.items()}
    return {"format_version": FORMAT_VERSION, "method": None, "weights": weights}


def _quantization_of(scheme: Scheme, origin: Origin) -> dict[str, Any]:
    return {
        "method": origin.method,
        "images": origin.images,
        "input_shape": list(origin.input_shape),
        "largest_input": max((each.largest for each in scheme.inputs.values()), default=255),
        "inputs": _indices_of(scheme),
        "versions": dict(origin.versions),
    }


# What is read


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The metadata of a quantized file, checked."""

    method: Method
    images: int
    input_shape: tuple[int, ...]
    largest_input: int
    inputs: Mapping[str, list[int]]
    versions: Mapping[str, str]

    @classmethod
    def read(cls, file: PrunedFile, max_bytes: int) -> _Settings:
        text = file.metadata.get(QUANTIZATION_KEY)
        if text is None:
            raise DamageError("it does not hold a quantized model: load it by load_pruned_model")
        content = parse_json(text, f"its metadata {QUANTIZATION_KEY!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        if content.keys() != names:
            raise DamageError(f"its quantization must have the keys {listed(names, len(names))}")
        settings = cls(**{**content, "input_shape": checked_shape(content["input_shape"])})
        for key, is_right in settings._checks(max_bytes).items():
            if not is_right:
                raise DamageError(f"its quantization has a wrong {key!r}: {content[key]!r:.80}")
        return settings

    def _checks(self, max_bytes: int) -> dict[str, bool]:
        shape: Any = self.input_shape
        return {
            "method": self.method in _METHODS,
            "images": type(self.images) is int and self.images >= 0,
            "input_shape": 0 < len(shape) < 5 and 0 < math.prod(shape) <= max_bytes // 16,
            "largest_input": self.largest_input in (127, 255) and type(self.largest_input) is int,
            "inputs": isinstance(self.inputs, dict) and all(map(_is_indices, self.inputs.values())),
            "versions": isinstance(self.versions, dict)
            and all(isinstance(version, str) for version in self.versions.values()),
        }


def _is_indices(indices: object) -> bool:
    return (
        isinstance(indices, list)
        and bool(indices)
        and all(type(index) is int and index >= 0 for index in indices)
        and len(set(indices)) == len(indices)
    )


def _loaded(file: PrunedFile, model: nn.Module | None, max_bytes: int) -> fx.GraphModule:
    settings = _Settings.read(file, max_bytes)
    tensors = decode_tensors(file.entries)
    scheme = Scheme(_read_weights(tensors), _read_inputs(tensors, settings))
    if model is None:
        shapes = {name: weight.values.shape for name, weight in scheme.weights.items()}
        model = build_architecture(file.model, shapes, max_bytes, _check_weights)
    dense = dense_copy(model).cpu().float().eval()
    module = assemble(_exported(dense, settings.input_shape), scheme)
    _fill_others(_not_quantized(module, scheme, dense), tensors)
    masks = _checked_masks(file)
    origin = Origin(
        model_on_meta(dense),
        masks,
        settings.input_shape,
        settings.images,
        settings.method,
        settings.versions,
    )
    check_masks(set_origin(module, origin))
    return module


def _check_weights(model: nn.Module, shapes: Shapes) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if name in shapes}
    if mismatch := describe_mismatch(own, shapes):
        raise DamageError(f"it is not of the model that it names: it {mismatch}")


def _exported(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    try:
        return exported_module(model, torch.zeros(1, *input_shape))
    except Exception as error:  # the model's code raises errors of every kind
        raise DamageError(
            f"its model can't be traced for images of shape {input_shape}: {first_line(error)}"
        ) from error


def _read_weights(tensors: dict[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The quantized weights of a file, which are removed from its tensors."""
    weights = {}
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        if scale_name(name) not in tensors:
            raise DamageError(f"it lacks {scale_name(name)}, the scales of an int8 weight")
        try:
            weights[name] = QuantizedWeight(
                tensors.pop(name), tensors.pop(scale_name(name)), tensors.pop(bias_name(name), None)
            )
        except QuantizationError as error:
            raise DamageError(f"{name}: {error}") from error
    return weights


def _read_inputs(tensors: dict[str, Tensor], settings: _Settings) -> dict[Place, QuantizedInput]:
    """The scales of a file's activations, which are removed from its tensors."""
    inputs: dict[Place, QuantizedInput] = {}
    for name, indices in settings.inputs.items():
        scales = _vector(tensors, f"{name}.{_SCALE}", torch.float32, len(indices))
        zero_points = _vector(tensors, f"{name}.{_ZERO_POINT}", torch.uint8, len(indices))
        for index, scale, zero_point in zip(indices, scales, zero_points, strict=True):
            try:
                inputs[name, index] = QuantizedInput(scale, zero_point, settings.largest_input)
            except QuantizationError as error:
                raise DamageError(f"{name}: {error}") from error
    return inputs


def _vector(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, length: int) -> list[Any]:
    vector = tensors.pop(name, None)
    if vector is None:
        raise DamageError(f"it lacks {name}")
    if vector.dtype != dtype or tuple(vector.shape) != (length,):
        raise DamageError(
            f"{name} must be {dtype} of shape {(length,)}, but is {vector.dtype} of shape "
            f"{tuple(vector.shape)}"
        )
    return vector.tolist()


@torch.no_grad()
def _fill_others(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    own = {name: tuple(target.shape) for name, target in targets.items()}
    if mismatch := describe_mismatch(
        own, {name: tuple(each.shape) for name, each in tensors.items()}
    ):
        raise DamageError(f"it is of another model: it {mismatch}")
    for name, target in targets.items():
        if tensors[name].dtype != target.dtype:
            raise DamageError(f"{name} must be {target.dtype}, but is {tensors[name].dtype}")
        target.copy_(tensors[name])


def _checked_masks(file: PrunedFile) -> dict[str, Tensor]:
    """The masks of a file, if as many weights are zero as its metadata say."""
    masks = file.masks()
    for name, mask in masks.items():
        said = file.pruning["weights"][name]
        zeros = mask.numel() - int(mask.sum())
        if not isinstance(said, dict) or said.get("zeros") != zeros:
            raise DamageError(
                f"{zeros:,} weights of {name} are zero, but its metadata give another number"
            )
    return masks
