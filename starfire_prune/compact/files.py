"""Files of compact models: dense, smaller than any model that timm builds, and loaded all the same.

Compaction changes the shapes of tensors, never the code that uses them. So a file needs no more
than the tensors and the name of the model that was cut: that model is built, its layers are given
the shapes of the file's tensors, and nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.compact.compaction import CompactReport, compact
from starfire_prune.serialization.container import MAX_BYTES
from starfire_prune.serialization.entries import decode_tensors
from starfire_prune.serialization.pruned import StrPath, read_pruned_file, save_pruned
from starfire_prune.serialization.state import check_tied
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import CheckpointError, ExportError
from starfire_prune.utils.files import checked_file, replaced_file
from starfire_prune.utils.modules import model_bytes

__all__ = ["load_compact", "save_compact"]


_FOLLOWED = frozenset({"name", "num_classes", "in_chans"})
_TOLERANCE = 1e-5  # of the largest output: the tensors are the same, bit for bit
_WAY_OUT = "build it by starfire_prune.models.create_model and pass it as `model`"


def save_compact(
    model: nn.Module,
    path: StrPath,
    example_input: Tensor,
    architecture: Mapping[str, Any],
    *,
    deflate: bool = False,
) -> CompactReport:
    """Compact a model, whose outputs are compared, and write what is left of it.

    What zeros are still there is stored in the encoding of the fewest bytes, as by `save_pruned`
    with `format="compressed"`. The file is loaded again before it appears.

    Args:
        model: of timm, in any phase of pruning; it is left as it is.
        path: of the file.
        example_input: a small batch of images.
        architecture: the arguments of `timm.create_model` that build the model.
        deflate: as in `save_pruned`.

    Returns:
        What compaction did.

    Raises:
        ModuleNotFoundError, RuntimeError: as `compact`.
        ExportError: if the file would be another model.
        CheckpointError: if it can't be written.

    Example:
        >>> architecture = {"name": "resnet18", "num_classes": 10}
        >>> save_compact(model, "small.safetensors", images, architecture)  # doctest: +SKIP
    """
    smaller, report = compact(model, example_input)
    path = Path(path)
    with checked_file(path, replaced_file(path)) as temporary:
        try:
            save_pruned(
                smaller, temporary, "compressed", deflate=deflate, architecture=dict(architecture)
            )
        except CheckpointError as error:  # such as of a full disk
            raise CheckpointError(str(error).replace(str(temporary), str(path))) from error
        loaded = load_compact(temporary, dense_copy(model))
        _check_same(smaller, loaded, example_input)
    return report


def load_compact(
    path: StrPath, model: nn.Module | None = None, *, max_bytes: int = MAX_BYTES
) -> nn.Module:
    """Load a model from a file of `save_compact`.

    Args:
        path: of the file.
        model: the model that was compacted, with any weights, on the CPU; its layers are cut to
            the shapes of the file. By default timm builds it by the name in the file.
        max_bytes: as in `load_pruned`; also what the model may take before it is cut.

    Returns:
        `model`, or a new one, in eval mode.

    Raises:
        CheckpointError: naming the file, if anything is damaged, names no model that timm can
            build, or is no part of the model.

    Example:
        >>> model = load_compact("small.safetensors")  # doctest: +SKIP
    """
    file = read_pruned_file(path, max_bytes=max_bytes)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    try:
        if model is None:
            model = _built(file.model, shapes, max_bytes)
        _check_part(model, shapes)
    except ExportError as error:
        raise CheckpointError(f"{path} can't be loaded: {error}") from error
    _cut(model, shapes)
    state = decode_tensors(file.entries)
    try:
        check_tied(model.state_dict(), state.__getitem__)
    except ValueError as error:
        raise CheckpointError(f"{path} can't be loaded: {error}") from error
    model.load_state_dict(state)
    return model.eval()


def _built(
    architecture: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], max_bytes: int
) -> nn.Module:
    """The model that a file names; first on the device meta, where it takes no memory."""
    from starfire_prune.models import create_model  # not before: it loads timm

    if architecture is None or not isinstance(architecture.get("name"), str):
        raise ExportError(f"it names no model of timm: {_WAY_OUT}")
    if others := architecture.keys() - _FOLLOWED:
        raise ExportError(f"its model has the argument {min(others)!r}: {_WAY_OUT}")
    try:
        with torch.device("meta"):
            sketch = create_model(**{"num_classes": 1000, **architecture})
        _check_part(sketch, shapes)
        if (size := model_bytes(sketch)) > max_bytes:
            raise ExportError(
                f"its model takes {size:,} bytes before it is cut, and `max_bytes` "
                f"(={max_bytes:,}) allows no more: raise it if you trust the file"
            )
        return create_model(**{"num_classes": 1000, **architecture})
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"its model {architecture['name']!r} can't be built ({error}): {_WAY_OUT}"
        ) from error


def _check_part(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ExportError if tensors of these shapes can't be cut out of the model's."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    classifier = _classifier_keys(own, model)
    unlike = sorted(
        name
        for name in {*own, *shapes}
        if name not in own
        or name not in shapes
        or not _is_part(shapes[name], own[name])
        or (name in classifier and shapes[name][0] != own[name][0])  # classes are never cut
    )
    if unlike:
        name = unlike[0]
        raise ExportError(
            f"it is no part of this model: {name!r} is {shapes.get(name, 'missing')} in the file "
            f"and {own.get(name, 'missing')} in the model"
        )


def _classifier_keys(names: Iterable[str], model: nn.Module) -> set[str]:
    """The tensors of a timm model's classifier, of one or several layers."""
    told = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    layers = {told} if isinstance(told, str) else set(told)
    return {name for name in names if name.rpartition(".")[0] in layers}


def _is_part(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether channels were cut: no other dimensions differ, and something is left."""
    pairs = list(zip(shape, of, strict=False))
    return len(shape) == len(of) and all(
        size == full or (1 <= size < full and place < 2) for place, (size, full) in enumerate(pairs)
    )


@torch.no_grad()
def _cut(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters and buffers other shapes, and layers the numbers of channels to match."""
    cut: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        depthwise = _is_depthwise(module)
        for name, parameter in list(module._parameters.items()):
            shape = shapes.get(f"{prefix}.{name}" if prefix else name)
            if parameter is not None and shape is not None and shape != tuple(parameter.shape):
                key = (id(parameter), shape)  # one that modules share stays shared
                if key not in cut:
                    cut[key] = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
                module._parameters[name] = cut[key]
        for name, buffer in list(module._buffers.items()):
            shape = shapes.get(f"{prefix}.{name}" if prefix else name)
            if buffer is not None and shape is not None and shape != tuple(buffer.shape):
                module._buffers[name] = buffer.new_empty(shape)
        _renumber(module, depthwise)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def _renumber(module: nn.Module, depthwise: bool) -> None:
    """Set the numbers of channels that a layer keeps beside its tensors."""
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
    """Raise ExportError if a model that was loaded again is not the one that was written."""
    images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    expected = model(images)
    try:
        output = loaded(images)
        difference = (output - expected).abs().max()
    except RuntimeError as error:
        raise _refusal(f"does not run ({error})") from error
    if not difference <= _TOLERANCE * expected.abs().max():
        raise _refusal(f"differs by {difference:.2g} in its outputs")


def _refusal(told: str) -> ExportError:
    return ExportError(
        f"the compact model {told} when it is loaded again: its layers keep numbers of channels "
        f"that loading doesn't know; write it by --format onnx --compact"
    )
