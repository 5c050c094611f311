"""Which model a file of weights is of: the arguments of `timm.create_model`, noted and built.

A file may come from anywhere. So of the arguments that it names only a few are followed, none of
which makes timm read or download anything or build a network of any depth; and before a model takes
memory its shapes are compared with the file's on the device `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from starfire_prune.tensor_file import DamageError

__all__ = ["architecture_of", "build_architecture"]

_FOLLOWED = frozenset(
    {
        *("name", "num_classes", "in_chans", "img_size", "global_pool"),
        *("drop_rate", "drop_path_rate", "drop_block_rate"),
    }
)
_WAY_OUT = "build it yourself and pass it as `model`"


def architecture_of(
    model: nn.Module,
    recipe: Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The arguments that build a model: those given, the recipe's, or what a timm model tells.

    Returns:
        `{"name": …, "num_classes": …, …}`, or None for a model that is not of timm.

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
    architecture: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """Build the model that a file names, if its tensors have the shapes of the file's.

    Args:
        architecture: as of `architecture_of`.
        shapes: of the file's tensors, by name.

    Raises:
        DamageError: if there is no such model, or it has other tensors.
    """
    if architecture is None:
        raise DamageError(f"it names no model of timm: {_WAY_OUT}")
    problem = _problem(architecture)
    unknown = sorted(architecture.keys() - _FOLLOWED)
    if problem or unknown:
        told = problem or f"has the argument {unknown[0]!r}, which no file may choose"
        raise DamageError(f"its model {told}: {_WAY_OUT}")
    with torch.device("meta"):
        sketch = _create(architecture)
    own = {name: tuple(value.shape) for name, value in sketch.state_dict().items()}
    if own != dict(shapes):
        differing = sorted(name for name in {*own, *shapes} if own.get(name) != shapes.get(name))
        raise DamageError(
            f"{architecture['name']} as it names it has other tensors than it holds, such as "
            f"{differing[0]!r}: {_WAY_OUT}"
        )
    return _create(architecture)


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
    """What a timm model tells of itself: the classes, and the channels of its first layer."""
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
    return value is None or isinstance(value, bool | int | float | str)
