"""The timm model that a file names: its arguments for `timm.create_model`, found and built again.

A file may come from anywhere. So only a few of the arguments in it are accepted; none of them makes
timm read or download anything, or build a network of any depth. The model is first built on the
device `meta`, where its shapes are compared with the file's before it takes any memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from starfire_prune.serialization.state import describe_mismatch
from starfire_prune.utils.errors import DamageError, ModelError
from starfire_prune.utils.modules import model_bytes

__all__ = ["Shapes", "architecture_of", "build_architecture", "check_shapes", "set_dtypes"]


Shapes = Mapping[str, tuple[int, ...]]
_ACCEPTED = frozenset(
    {
        *("name", "num_classes", "in_chans", "img_size", "global_pool"),
        *("drop_rate", "drop_path_rate", "drop_block_rate"),
    }
)
_WITHOUT_EFFECT = frozenset({"training", "grad_checkpointing"})  # on the outputs
_WAY_OUT = "build the model yourself and pass it as `model`"


def architecture_of(
    model: nn.Module,
    recipe: Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The arguments that build a model: `architecture`, or the recipe's, or those of a timm model.

    Returns:
        `{"name": …, "num_classes": …, …}`, or None for a model that timm does not build by its name
        alone, because it has other modules, strides, activations or pooling.

    Raises:
        ValueError: If arguments are not numbers, strings, or lists and dicts of these.
    """
    if architecture is None and recipe is not None and isinstance(recipe.get("model"), Mapping):
        settings = recipe["model"]
        named = {key: settings[key] for key in ("name", "num_classes") if key in settings}
        architecture = {**named, **settings.get("options", {})}
    if architecture is None:
        return _found_in(model)
    problem = _problem(architecture)
    if problem:
        raise ValueError(f"`architecture` (={dict(architecture)!r}) {problem}")
    return dict(architecture)


def check_shapes(model: nn.Module, shapes: Shapes) -> None:
    """Raise DamageError unless a model's tensors have exactly these names and shapes."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if mismatch := describe_mismatch(own, shapes):
        raise DamageError(f"it is not of the model that it names ({_WAY_OUT}): it {mismatch}")


def build_architecture(
    architecture: Mapping[str, Any] | None,
    shapes: Shapes,
    max_bytes: int,
    check: Callable[[nn.Module, Shapes], None] = check_shapes,
) -> nn.Module:
    """Build the model that a file names.

    Args:
        architecture: As `architecture_of` returns it.
        shapes: Shapes of the file's tensors by name.
        max_bytes: Most bytes that the model may take, with the buffers that its code adds to the
            file's tensors.
        check: Raises DamageError if the model, which is on the device `meta`, does not fit the
            shapes.

    Raises:
        DamageError: If there is no such model, it does not fit, or takes more bytes.
    """
    if architecture is None:
        raise DamageError(f"it does not name a timm model: {_WAY_OUT}")
    refused = sorted(architecture.keys() - _ACCEPTED)
    if refused:
        raise DamageError(
            f"the argument {refused[0]!r} of its model is not allowed in a file: {_WAY_OUT}"
        )
    if problem := _problem(architecture):
        raise DamageError(f"its model {problem}: {_WAY_OUT}")
    sketch = _create_on_meta(architecture)
    check(sketch, shapes)
    if (size := model_bytes(sketch)) > max_bytes:
        raise DamageError(
            f"its model takes {size:,} bytes, more than `max_bytes` (={max_bytes:,}) allows: raise "
            f"it if you trust the file"
        )
    return _create(architecture)


def set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give a model's floats the dtypes of a file's tensors, in place.

    Buffers that no file holds get the file's float dtype, too, if it has only one.

    Args:
        model: The model.
        dtypes: Dtypes by the names of its state dict.
    """
    floats = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    if len(floats) == 1:
        model.to(floats.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = dtypes.get(name, tensor.dtype)
        if dtype.is_floating_point and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _create(architecture: Mapping[str, Any]) -> nn.Module:
    from starfire_prune.models import create_model  # it imports timm

    try:
        return create_model(**{"num_classes": 1000, **architecture})
    except ModelError as error:
        raise DamageError(f"its model can't be built: {error}; {_WAY_OUT}") from error


def _create_on_meta(architecture: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return _create(architecture)


def _found_in(model: nn.Module) -> dict[str, Any] | None:
    """The arguments in a timm model's configuration, or None if they would build another model."""
    claimed = _claimed_by(model)
    if claimed is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # saving must not change training
            sketch = _create_on_meta(claimed)
    except (DamageError, ModuleNotFoundError):
        return None
    return claimed if _same_structure(sketch, model) else None


def _claimed_by(model: nn.Module) -> dict[str, Any] | None:
    """The name in a timm model's configuration, its classes and its first layer's channels."""
    config = getattr(model, "pretrained_cfg", None)
    classes = getattr(model, "num_classes", None)
    if not isinstance(config, Mapping) or not isinstance(config.get("architecture"), str):
        return None
    claimed: dict[str, Any] = {"name": config["architecture"]}
    if isinstance(classes, int):
        claimed["num_classes"] = classes
    first = config.get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first) if isinstance(first, str) else None, "in_channels", 3)
    return claimed if channels == 3 else {**claimed, "in_chans": channels}


def _same_structure(sketch: nn.Module, model: nn.Module) -> bool:
    """Whether models are equal apart from their tensors: in modules, settings and printed text.

    What a forward pass caches makes no difference: tensors where a new model has nothing.
    """
    pairs = zip_longest(*(each.named_modules(remove_duplicate=False) for each in (sketch, model)))
    for one, other in pairs:
        if one is None or other is None or one[0] != other[0]:
            return False
        (_, new), (_, module) = one, other
        if type(new) is not type(module) or new.extra_repr() != module.extra_repr():
            return False
        if _settings(new, module) != _settings(module, new):
            return False
    return True


def _settings(module: nn.Module, other: nn.Module) -> dict[str, object]:
    """The plain attributes of a module, without those that are caches in it or in the other one."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _WITHOUT_EFFECT
        and _is_plain(value)
        and not _is_cache(value, getattr(other, key, None))
        and not _is_cache(getattr(other, key, None), value)
    }


def _is_cache(empty: object, filled: object) -> bool:
    """Whether a value contains only tensors, and the other one nothing."""
    if not isinstance(empty, dict | list | tuple | None) or empty:
        return False
    leaves = tree_leaves(filled)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _problem(architecture: Mapping[str, Any]) -> str | None:
    """What is wrong with arguments, as the end of a sentence, or None."""
    if not isinstance(architecture.get("name"), str):
        return "lacks `name`, the name of a timm model"
    for key, value in architecture.items():
        if not _is_plain(value):
            return (
                f"has the argument {key!r}, which is not a finite number, a string, or a list or "
                f"dict of these"
            )
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)
