"""Files of compact models: dense models, smaller than those that timm builds.

Compaction changes the shapes of tensors, never the code that uses them. So a file holds only the
tensors and the name of the original model: that model is built, and its layers are resized to the
shapes of the file's tensors. Nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.compact.compaction import CompactReport, compact
from starfire_prune.serialization.architecture import Shapes, build_architecture
from starfire_prune.serialization.container import MAX_BYTES
from starfire_prune.serialization.entries import decode_tensors
from starfire_prune.serialization.files import StrPath
from starfire_prune.serialization.pruned import read_pruned_file, save_pruned
from starfire_prune.serialization.state import check_tied
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import CheckpointError, DamageError, ExportError
from starfire_prune.utils.files import checked_file, replaced_file
from starfire_prune.utils.modules import classifier_keys, is_depthwise, weight_key
from starfire_prune.utils.outputs import compare_outputs

__all__ = ["load_compact", "save_compact"]


_TOLERANCE = 1e-5  # of the largest output: the tensors are equal bit for bit


def save_compact(
    model: nn.Module,
    path: StrPath,
    example_input: Tensor,
    architecture: Mapping[str, Any],
    *,
    deflate: bool = False,
    unfinished: bool = False,
) -> CompactReport:
    """Compact a model and write the smaller model to a file.

    The remaining zeros are stored in the encoding that takes the fewest bytes, as by `save_pruned`
    with `format="compressed"`. The file is loaded again, and its model's outputs are compared,
    before it appears.

    Args:
        model: A timm model in any phase of pruning; it is not changed.
        path: Path of the file.
        example_input: A small batch of images.
        architecture: The arguments of `timm.create_model` that build the model.
        deflate: Whether parts are deflated, as in `save_pruned`.
        unfinished: Whether the pruning may be unfinished, as in `save_pruned`.

    Returns:
        What compaction did.

    Raises:
        ModuleNotFoundError, PruningError, RuntimeError: As `compact`.
        ExportError: If the model in the file has other outputs.
        CheckpointError: If the file can't be written.

    Example:
        >>> architecture = {"name": "resnet18", "num_classes": 10}
        >>> save_compact(model, "small.safetensors", images, architecture)  # doctest: +SKIP
    """
    smaller, report = compact(model, example_input, unfinished=unfinished)
    path = Path(path)
    with checked_file(path, replaced_file(path)) as temporary:
        try:
            save_pruned(
                smaller,
                temporary,
                "compressed",
                deflate=deflate,
                architecture=dict(architecture),
                unfinished=unfinished,
            )
        except CheckpointError as error:  # for example because the disk is full
            raise CheckpointError(str(error).replace(str(temporary), str(path))) from error
        loaded = load_compact(temporary, dense_copy(model))
        _check_same(smaller, loaded, example_input)
    return report


def load_compact(
    path: StrPath, model: nn.Module | None = None, *, max_bytes: int = MAX_BYTES
) -> nn.Module:
    """Load a model from a file of `save_compact`.

    Args:
        path: Path of the file.
        model: The model that was compacted, with any weights, on the CPU; its layers are resized
            to the shapes in the file. By default timm builds it by the name in the file.
        max_bytes: Most bytes that all tensors may take, as in `load_pruned`, and also the model
            before it is resized.

    Returns:
        `model`, or a new one, in eval mode.

    Raises:
        CheckpointError: If the file is damaged, does not name a model that timm can build, or its
            tensors do not fit the model; the message names the file.

    Example:
        >>> model = load_compact("small.safetensors")  # doctest: +SKIP
    """
    file = read_pruned_file(path, max_bytes=max_bytes)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    try:
        if model is None:
            model = build_architecture(file.model, shapes, max_bytes, _check_fits)
        _check_fits(model, shapes)
        _resize(model, shapes)
        state = decode_tensors(file.entries)
        check_tied(model.state_dict(), state.__getitem__)
    except ValueError as error:
        raise CheckpointError(f"{path} can't be loaded: {error}") from error
    model.load_state_dict(state)
    return model.eval()


def _check_fits(model: nn.Module, shapes: Shapes) -> None:
    """Raise DamageError unless removing channels can give the model's tensors these shapes."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    classifier = classifier_keys(model)
    wrong = sorted(
        name
        for name in {*own, *shapes}
        if name not in own
        or name not in shapes
        or not _is_part(shapes[name], own[name])
        or (name in classifier and shapes[name][0] != own[name][0])  # classes are never removed
    )
    if wrong:
        name = wrong[0]
        raise DamageError(
            f"tensor {name!r} does not fit: {shapes.get(name, 'missing')} in the file, "
            f"{own.get(name, 'missing')} in the model"
        )


def _is_part(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether a shape has fewer channels, but at least one, and otherwise equal dimensions."""
    return len(shape) == len(full) and all(
        size == whole or (1 <= size < whole and dim < 2)
        for dim, (size, whole) in enumerate(zip(shape, full, strict=True))
    )


@torch.no_grad()
def _resize(model: nn.Module, shapes: Shapes) -> None:
    """Give parameters and buffers new shapes, and layers the numbers of channels to match."""
    resized: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        depthwise = is_depthwise(module)
        for name, parameter in list(module._parameters.items()):
            shape = shapes.get(weight_key(prefix, name))
            if parameter is not None and shape is not None and shape != tuple(parameter.shape):
                key = (id(parameter), shape)  # modules that share a parameter still do
                if key not in resized:
                    resized[key] = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
                module._parameters[name] = resized[key]
        for name, buffer in list(module._buffers.items()):
            shape = shapes.get(weight_key(prefix, name))
            if buffer is not None and shape is not None and shape != tuple(buffer.shape):
                module._buffers[name] = buffer.new_empty(shape)
        _set_channels(module, depthwise)


def _set_channels(module: nn.Module, depthwise: bool) -> None:
    """Set the numbers of channels that a layer stores beside its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if depthwise and not module.transposed:
            module.groups = first * module.groups // module.out_channels
        inputs, outputs = (first, second) if module.transposed else (second, first)
        scale = module.groups
        module.in_channels = inputs if module.transposed else inputs * scale
        module.out_channels = outputs * scale if module.transposed else outputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = module.weight if module.affine else module.running_mean
        module.num_features = module.num_features if held is None else len(held)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)


@torch.no_grad()
def _check_same(model: nn.Module, loaded: nn.Module, images: Tensor) -> None:
    """Raise ExportError unless a loaded model has the outputs of the model that was written."""
    images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    expected = model(images)
    try:
        compare_outputs(expected, loaded(images), _TOLERANCE)
    except RuntimeError as error:
        raise _export_error(f"the model does not run ({error})") from error
    except ValueError as error:
        raise _export_error(f"the model's outputs {error} before") from error


def _export_error(text: str) -> ExportError:
    return ExportError(
        f"when the compact file is loaded again, {text}: its layers store numbers of channels that "
        f"loading can't restore; use --format onnx --compact"
    )
