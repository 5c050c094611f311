"""A folder that `timm.create_model("local-dir:…", pretrained=True)` loads, in the Hub's layout.

The folder holds `model.safetensors`, dense and with plain keys, and `config.json`: the architecture
with its arguments and, as `pretrained_cfg`, how the run prepared its images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from starfire_prune.export.image_settings import ImageSettings
from starfire_prune.export.input import ExportInput, write_weights
from starfire_prune.serialization.pruned import read_pruned_file
from starfire_prune.utils.errors import ExportError
from starfire_prune.utils.files import replaced_folder, write_text, writing

__all__ = ["CONFIG", "WEIGHTS", "timm_config", "write_timm_folder"]


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Keys of a model's configuration that timm needs to adapt it to other images and classes
_ADAPTING = ("first_conv", "classifier", "fixed_input_size")


def write_timm_folder(given: ExportInput, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write weights and configuration, or only the configuration if the folder holds the weights.

    Args:
        given: The weights, whose recipe describes how the images are prepared.
        model: The model of `load_input`.
        folder: The folder to write, atomically; its former content is removed.

    Returns:
        The configuration.

    Raises:
        ExportError: If it is unknown how the images were prepared, or the weights in the folder
            have encodings that timm can't read.
        CheckpointError: If the folder can't be written.
    """
    images, architecture = given.images, given.architecture
    if images is None or architecture is None:
        raise ExportError(
            f"{given.weights} does not describe how its images are prepared, which config.json "
            f"needs: give --recipe FILE"
        )
    config = timm_config(model, architecture, images, given.label_names(model))
    text = json.dumps(config, indent=2) + "\n"
    if is_folder_of(given, folder):
        _check_plain(given)
        with writing(folder / CONFIG):
            write_text(folder / CONFIG, text)
        return config
    with writing(folder), replaced_folder(folder) as temporary:
        write_weights(given, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    return config


def is_folder_of(given: ExportInput, folder: Path) -> bool:
    """Whether a folder holds the weights under the name that timm expects."""
    return given.weights.resolve() == (folder / WEIGHTS).resolve()


def _check_plain(given: ExportInput) -> None:
    """Raise ExportError if timm can't read the tensors of the file."""
    if not given.is_checked:
        return
    for entry in read_pruned_file(given.weights).entries.values():
        if entry.encoded.encoding != "dense" or entry.deflated:
            raise ExportError(
                f"{given.weights} is compressed, which timm can't read: name another folder as "
                f"--output, where the weights are written dense"
            )


def timm_config(
    model: nn.Module,
    architecture: Mapping[str, Any],
    images: ImageSettings,
    label_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: A timm model.
        architecture: The arguments of `timm.create_model` that build it.
        images: How the images are prepared.
        label_names: Names of the classes by label, if known.

    Example:
        >>> from starfire_prune.models import create_model
        >>> images = ImageSettings(32, "bilinear", 0.875, (0.5,) * 3, (0.5,) * 3)
        >>> architecture = {"name": "resnet18", "num_classes": 10}
        >>> config = timm_config(create_model(**architecture), architecture, images)
        >>> config["architecture"], config["pretrained_cfg"]["input_size"]
        ('resnet18', [3, 32, 32])
    """
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    arguments = {
        key: value for key, value in architecture.items() if key not in ("name", "num_classes")
    }
    classes = getattr(model, "num_classes", architecture.get("num_classes"))
    names = {} if label_names is None else {"label_names": list(label_names)}
    return {
        "architecture": str(architecture["name"]).partition(".")[0],
        "num_classes": classes,
        "num_features": getattr(model, "num_features", None),
        **names,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **images.as_timm(),
            **{key: config[key] for key in _ADAPTING if key in config},
            "pool_size": config.get("pool_size") if _is_default_size(config, images) else None,
            "num_classes": classes,
        },
    }


def _is_default_size(config: Mapping[str, Any], images: ImageSettings) -> bool:
    return tuple(config.get("input_size", ()))[1:] == (images.size, images.size)
