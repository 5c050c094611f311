"""Weights to start training from: timm's, or those of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from starfire_prune.models import create_model
from starfire_prune.serialization.container import MAX_BYTES
from starfire_prune.serialization.pruned import is_pruned_file, load_pruned
from starfire_prune.serialization.state import check_tied, describe_mismatch
from starfire_prune.utils.errors import CheckpointError, PretrainedError
from starfire_prune.utils.modules import classifier_keys, model_bytes

__all__ = ["create_pretrained", "load_weights"]


def create_pretrained(
    name: str, num_classes: int, file: Path | None = None, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Create a model with pretrained weights.

    If the weights have another number of classes, the classifier is freshly initialized.

    Args:
        name: The name, as in `create_model`; its tag selects among timm's weights.
        num_classes: Number of outputs of the classifier.
        file: A safetensors file with the model's keys; by default timm's weights are downloaded.
        **options: Passed to the model.

    Returns:
        The model in training mode, and the keys that are freshly initialized.

    Raises:
        PretrainedError: If the weights can't be read or downloaded, or don't fit apart from the
            classifier.
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
    return model, () if trained_classes == num_classes else classifier_keys(model)


def load_weights(model: nn.Module, file: Path) -> tuple[str, ...]:
    """Load a safetensors file of plain keys, without the classifier if its shape differs.

    Files of `save_pruned` are read in both forms, and their checksums are verified.

    Args:
        model: A dense timm model.
        file: Path of the file, for example of a run's export. It must hold all keys other than the
            classifier's in the model's shapes.

    Returns:
        The keys of the classifier if it is not loaded; otherwise none.

    Raises:
        PretrainedError: If the file does not exist, is not a safetensors file, or does not fit.
    """
    own = model.state_dict()
    weights = _read_weights(file, max_bytes=max(MAX_BYTES, 2 * model_bytes(model)))
    classifier = classifier_keys(model)
    is_fresh = any(key in weights and weights[key].shape != own[key].shape for key in classifier)
    fresh = classifier if is_fresh else ()
    loaded, wanted = (
        {key: tensor for key, tensor in state.items() if key not in fresh}
        for state in (weights, own)
    )
    try:
        if mismatch := describe_mismatch(_shapes(wanted), _shapes(loaded)):
            raise ValueError(f"it {mismatch}")
        state = {**own, **loaded}
        check_tied(own, state.__getitem__)
    except ValueError as error:
        raise PretrainedError(f"{file} is of another model: {error}") from error
    model.load_state_dict(state)
    return fresh


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _read_weights(file: Path, max_bytes: int) -> dict[str, Tensor]:
    if not file.is_file():
        raise PretrainedError(f"there is no file {file}")
    try:
        return load_pruned(file, max_bytes=max_bytes) if is_pruned_file(file) else load_file(file)
    except CheckpointError as error:
        raise PretrainedError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise PretrainedError(
            f"{file} is not a complete safetensors file ({error}): restore it, or convert it by "
            f"safetensors.torch.save_file"
        ) from error
