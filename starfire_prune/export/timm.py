"""A folder that `timm.create_model("local-dir:…", pretrained=True)` loads, in the Hub's layout.

It holds `model.safetensors`, dense and with plain keys, and `config.json`: the architecture with
its arguments and, as `pretrained_cfg`, how the run prepared its images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from starfire_prune.export.image_settings import ImageSettings
from starfire_prune.export.source import Source, write_weights
from starfire_prune.serialization.pruned import read_pruned_file
from starfire_prune.utils.errors import ExportError
from starfire_prune.utils.files import replaced_folder, write_text, writing

__all__ = ["CONFIG", "WEIGHTS", "timm_config", "write_timm_folder"]


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What timm needs of a model's own configuration to adapt it to other images and classes
_ADAPTING = ("first_conv", "classifier", "fixed_input_size")


def write_timm_folder(source: Source, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write weights and configuration; into the folder of the weights only the configuration.

    Args:
        source: whose recipe tells how the images are prepared.
        model: of `load_source`.
        folder: appears whole or not at all; what it held before is gone.

    Returns:
        The configuration.

    Raises:
        ExportError: if nothing tells how the images were prepared, or the weights in the folder
            are in encodings that timm doesn't read.
        CheckpointError: if it can't be written.
    """
    images, architecture = source.images, source.architecture
    if images is None or architecture is None:
        raise ExportError(
            f"{source.weights} doesn't tell how its images are prepared, which config.json has to: "
            f"give --recipe FILE"
        )
    config = timm_config(model, architecture, images, source.label_names(model))
    text = json.dumps(config, indent=2) + "\n"
    if is_folder_of(source, folder):
        _check_plain(source)
        with writing(folder / CONFIG):
            write_text(folder / CONFIG, text)
        return config
    with writing(folder), replaced_folder(folder) as temporary:
        write_weights(source, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    return config


def is_folder_of(source: Source, folder: Path) -> bool:
    """Whether a folder is the one that holds the source's weights, under the name timm expects."""
    return source.weights.resolve() == (folder / WEIGHTS).resolve()


def _check_plain(source: Source) -> None:
    """Raise ExportError if timm can't read the tensors of the source's file."""
    if not source.is_checked:
        return
    for entry in read_pruned_file(source.weights).entries.values():
        if entry.encoded.encoding != "dense" or entry.deflated:
            raise ExportError(
                f"{source.weights} is compressed, which timm can't read: name another folder as "
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
        model: of timm.
        architecture: the arguments of `timm.create_model` that build it.
        images: how they are prepared.
        label_names: by label, if known.

    Example:
        >>> from starfire_prune.models import create_model
        >>> images = ImageSettings(32, "bilinear", 0.875, (0.5,) * 3, (0.5,) * 3)
        >>> architecture = {"name": "resnet18", "num_classes": 10}
        >>> config = timm_config(create_model(**architecture), architecture, images)
        >>> config["architecture"], config["pretrained_cfg"]["input_size"]
        ('resnet18', [3, 32, 32])
    """
    own: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
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
            **{key: own[key] for key in _ADAPTING if key in own},
            "pool_size": own.get("pool_size") if _is_own_size(own, images) else None,
            "num_classes": classes,
        },
    }


def _is_own_size(own: Mapping[str, Any], images: ImageSettings) -> bool:
    return tuple(own.get("input_size", ()))[1:] == (images.size, images.size)
