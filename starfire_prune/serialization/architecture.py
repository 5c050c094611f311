"""Which model a file of weights is of: the arguments of `timm.create_model`, noted and built.

A file may come from anywhere. So of the arguments that it names only a few are followed, none of
which makes timm read or download anything or build a network of any depth; and before a model takes
memory its shapes are compared with the file's on the device `meta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from starfire_prune.utils.errors import DamageError
from starfire_prune.utils.modules import model_bytes

__all__ = ["architecture_of", "build_architecture", "set_dtypes"]


_FOLLOWED = frozenset(
    {
        *("name", "num_classes", "in_chans", "img_size", "global_pool"),
        *("drop_rate", "drop_path_rate", "drop_block_rate"),
    }
)
_PASSING = frozenset({"training", "grad_checkpointing"})  # they change no output
_WAY_OUT = "build it yourself and pass it as `model`"


def architecture_of(
    model: nn.Module,
    recipe: Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The arguments that build a model: those given, the recipe's, or what a timm model tells.

    Returns:
        `{"name": …, "num_classes": …, …}`, or None for a model that is not of timm, or not as
        timm builds it by its name: of other modules, strides, activations or pooling.

    Raises:
        ValueError: for arguments that are no plain numbers and strings.
    """
    if architecture is None and recipe is not None and isinstance(recipe.get("model"), Mapping):
        settings = recipe["model"]
        named = {key: settings[key] for key in ("name", "num_classes") if key in settings}
        architecture = {**named, **settings.get("options", {})}
    if architecture is None:
        return _told_by(model)
    problem = _problem(architecture)
    if problem:
        raise ValueError(f"`architecture` (={dict(architecture)!r}) {problem}")
    return dict(architecture)


def build_architecture(
    architecture: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], max_bytes: int
) -> nn.Module:
    """Build the model that a file names, if its tensors have the shapes of the file's.

    Args:
        architecture: as of `architecture_of`.
        shapes: of the file's tensors, by name.
        max_bytes: that the model may take, with what its code adds to the file's tensors.

    Raises:
        DamageError: if there is no such model, it has other tensors, or takes more bytes.
    """
    if architecture is None:
        raise DamageError(f"it names no model of timm: {_WAY_OUT}")
    unknown = sorted(architecture.keys() - _FOLLOWED)
    told = f"has the argument {unknown[0]!r}, which no file may choose" if unknown else None
    told = told or _problem(architecture)
    if told:
        raise DamageError(f"its model {told}: {_WAY_OUT}")
    sketch = _sketch(architecture)
    own = {name: tuple(value.shape) for name, value in sketch.state_dict().items()}
    if own != dict(shapes):
        differing = sorted(name for name in {*own, *shapes} if own.get(name) != shapes.get(name))
        raise DamageError(
            f"{architecture['name']} as it names it has other tensors than it holds, such as "
            f"{differing[0]!r}: {_WAY_OUT}"
        )
    if (size := model_bytes(sketch)) > max_bytes:
        raise DamageError(
            f"its model takes {size:,} bytes, and `max_bytes` (={max_bytes:,}) allows no more: "
            f"raise it if you trust the file"
        )
    return _create(architecture)


def set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give a model's floats the dtypes of a file's; buffers that no file holds follow if all agree.

    Args:
        model: whose floats are changed in place.
        dtypes: by the names of its state dict.
    """
    floats = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    if len(floats) == 1:
        model.to(floats.pop())
    own = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in own:
        dtype = dtypes.get(name, tensor.dtype)
        if dtype.is_floating_point and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _create(architecture: Mapping[str, Any]) -> nn.Module:
    from starfire_prune.models import create_model  # not before: it loads timm

    arguments = {"num_classes": 1000, **architecture}
    try:
        return create_model(**arguments)
    except Exception as error:  # whatever timm's constructors raise for arguments that don't fit
        raise DamageError(
            f"its model {architecture['name']!r} can't be built ({error}): {_WAY_OUT}"
        ) from error


def _told_by(model: nn.Module) -> dict[str, Any] | None:
    """What a timm model tells of itself, unless what that builds would be another model."""
    told = _claimed_by(model)
    if told is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # a run that saves goes on as one that doesn't
            sketch = _sketch(told)
    except (DamageError, ModuleNotFoundError):
        return None
    return told if _structure(sketch) == _structure(model) else None


def _claimed_by(model: nn.Module) -> dict[str, Any] | None:
    """The name in a timm model's configuration, its classes and its first layer's channels."""
    config = getattr(model, "pretrained_cfg", None)
    classes = getattr(model, "num_classes", None)
    if not isinstance(config, Mapping) or not isinstance(config.get("architecture"), str):
        return None
    told: dict[str, Any] = {"name": config["architecture"]}
    if isinstance(classes, int):
        told["num_classes"] = classes
    first = config.get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first) if isinstance(first, str) else None, "in_channels", 3)
    return told if channels == 3 else {**told, "in_chans": channels}


def _structure(model: nn.Module) -> list[tuple[object, ...]]:
    """What makes out a model but its tensors: types, and settings that are plain values."""
    return [
        (name, type(module), module.extra_repr(), _settings(module))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _PASSING and _is_plain(value)
    }


def _sketch(architecture: Mapping[str, Any]) -> nn.Module:
    """The model on the device meta, where it takes no memory."""
    with torch.device("meta"):
        return _create(architecture)


def _problem(architecture: Mapping[str, Any]) -> str | None:
    """What is wrong with arguments, or None."""
    if not isinstance(architecture.get("name"), str):
        return "has no `name` of timm's"
    for key, value in architecture.items():
        if not _is_plain(value):
            return f"has the argument {key!r}, which is no plain number or string, or made of these"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)
