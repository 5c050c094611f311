"""Weights to start from: of timm, or from a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from starfire_prune.models import create_model
from starfire_prune.serialization.container import MAX_BYTES
from starfire_prune.serialization.pruned import is_pruned_file, load_pruned
from starfire_prune.serialization.state import check_tied
from starfire_prune.utils.errors import CheckpointError, PretrainedError
from starfire_prune.utils.modules import model_bytes

__all__ = ["create_pretrained", "load_weights"]


def create_pretrained(
    name: str, num_classes: int, file: Path | None = None, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Create a model with weights that were trained before.

    Args:
        name: As for `create_model`; its tag chooses among timm's weights.
        num_classes: Outputs of the classifier, which is left freshly initialised where the weights
            are of another number of classes.
        file: A safetensors file with the model's keys; by default timm's weights are downloaded.
        **options: Passed to the model.

    Returns:
        The model in training mode, and the keys that are freshly initialised.

    Raises:
        PretrainedError: If the weights can't be had, or don't fit but for the classifier.
        ModelError: If there is no model, or no tag, of this name, or it can't be built.

    Example:
        >>> model, fresh = create_pretrained("resnet18", 10)  # doctest: +SKIP
        >>> fresh  # doctest: +SKIP
        ('fc.weight', 'fc.bias')
    """
    if file is not None:
        model = create_model(name, num_classes, **options)
        return model, load_weights(model, file)
    model = create_model(name, num_classes, pretrained=True, **options)
    trained_classes = model.pretrained_cfg["num_classes"]  # type: ignore[index]
    return model, () if trained_classes == num_classes else _classifier_keys(model)


def load_weights(model: nn.Module, file: Path) -> tuple[str, ...]:
    """Load a safetensors file of plain keys, but a classifier of another number of classes.

    Files of `save_pruned` are read in either form, and their checksums verified.

    Args:
        model: Of timm, dense, in any state.
        file: Such as the export of a run; it has to hold every other key in the model's shape.

    Returns:
        The keys of the classifier that are left as they were; none where its shape is the same.

    Raises:
        PretrainedError: If there is no such file, it is no safetensors file, or it doesn't fit.
    """
    own = model.state_dict()
    weights = _read_weights(file, max_bytes=max(MAX_BYTES, 2 * model_bytes(model)))
    misshapen = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    classifier = _classifier_keys(model)
    fresh = classifier if set(misshapen) & set(classifier) else ()
    _check_keys(file, own, {key: weights[key] for key in weights if key not in fresh}, fresh)
    state = {**own, **{key: weights[key] for key in own if key not in fresh}}
    try:
        check_tied(own, state.__getitem__)
    except ValueError as error:
        raise PretrainedError(f"{file} is of another model: {error}") from error
    model.load_state_dict(state)
    return fresh


def _read_weights(file: Path, max_bytes: int) -> dict[str, Tensor]:
    if not file.is_file():
        raise PretrainedError(f"there is no file {file}")
    try:
        return load_pruned(file, max_bytes=max_bytes) if is_pruned_file(file) else load_file(file)
    except CheckpointError as error:  # of its checksums
        raise PretrainedError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise PretrainedError(
            f"{file} is no whole safetensors file ({error}): restore it, or convert it by "
            f"safetensors.torch.save_file"
        ) from error


def _check_keys(
    file: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], fresh: Iterable[str]
) -> None:
    shared = [key for key in own if key in weights]
    differing = [key for key in shared if weights[key].shape != own[key].shape]
    shapes = [f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}" for key in differing]
    problems = {
        "lacks": [key for key in own if key not in weights and key not in fresh],
        "also holds": [key for key in weights if key not in own],
        "has other shapes:": shapes,
    }
    told = [f"{what} {_few(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise PretrainedError(f"{file} is of another model: it {' and '.join(told)}")


def _few(keys: list[str], most: int = 3) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest


def _classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """The keys of timm's classifier, which its configuration names, one or several."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return tuple(key for key in model.state_dict() if key.startswith(prefixes))
