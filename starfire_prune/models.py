"""Models by their timm names, and ResNet-50 v1, which importing this module adds to timm's.

timm's ``resnet50`` is version 1.5: the first block of a stage strides in its 3×3 convolution. In
``resnet50_v1``, the network of He et al. (2015), it strides in the 1×1 convolution before.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from starfire_prune.architecture import model_bytes
from starfire_prune.file_errors import CheckpointError
from starfire_prune.pruned_file import is_pruned_file, load_pruned
from starfire_prune.tensor_file import MAX_BYTES
from starfire_prune.tied import check_tied

try:
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.resnet import Bottleneck, ResNet
except ModuleNotFoundError as error:
    package = (error.name or "timm").partition(".")[0]
    raise ModuleNotFoundError(
        f"models need {package}: pip install 'starfire-prune[train]'", name=error.name
    ) from error

__all__ = ["PretrainedError", "create_model", "create_pretrained", "load_weights", "resnet50_v1"]

# Read by register_model, which looks for this name
default_cfgs = generate_default_cfgs(
    {
        "resnet50_v1": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


class PretrainedError(ValueError):
    """Weights to start from that can't be had or don't fit; the message says why in a sentence."""


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Create a model by its name in timm's registry, ``resnet50_v1`` included.

    Args:
        name: The name, with or without the tag of its pretrained weights.
        num_classes: Outputs of the classifier; the model gives ``(N, num_classes)``.
        **options: Passed to the model, such as ``drop_path_rate`` or ``pretrained``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If there is no model, or no tag, of this name.

    Example:
        >>> model = create_model("resnet18", num_classes=10)
        >>> model.fc.out_features
        10
    """
    names = timm.list_models(include_tags="." in name)
    if name not in names:
        near = difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() gives all"
        raise ValueError(f"unknown model {name!r}: {hint}")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    return model


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
        ValueError: If there is no model, or no tag, of this name.

    Example:
        >>> model, fresh = create_pretrained("resnet18", 10)  # doctest: +SKIP
        >>> fresh  # doctest: +SKIP
        ('fc.weight', 'fc.bias')
    """
    if file is not None:
        model = create_model(name, num_classes, **options)
        return model, load_weights(model, file)
    try:
        model = create_model(name, num_classes, pretrained=True, **options)
    except (OSError, RuntimeError) as error:  # without a network, or without weights
        raise PretrainedError(
            f"timm's weights of {name} can't be had "
            f"({textwrap.shorten(str(error), 200, placeholder=' …')}): give a safetensors file"
        ) from error
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


def resnet50_v1(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ResNet-50 v1, whose weights have the names and shapes of timm's ``resnet50``.

    Args:
        pretrained: Load the weights that timm's ``pretrained_cfg`` names, as it does for
            ``local-dir:`` and ``hf-hub:``; otherwise False, as there are none to download.
        **options: Options of timm's ``ResNet``; ``output_stride`` other than 32 and ``aa_layer``
            are refused, as both move the strides themselves.

    Returns:
        The model, randomly initialised as timm does.

    Raises:
        PretrainedError: If pretrained weights are asked for and nothing names any.
        ValueError: If an option that moves the strides is given.

    Example:
        >>> resnet50_v1(num_classes=10).layer2[0].conv1.stride
        (2, 2)
    """
    if pretrained and not _names_weights(options.get("pretrained_cfg")):
        raise PretrainedError(
            "resnet50_v1 has no pretrained weights: give a safetensors file, or use "
            "pretrained=False"
        )
    return build_model_with_cfg(_build_resnet50_v1, "resnet50_v1", pretrained, **options)  # type: ignore[no-any-return]


def _names_weights(config: Any) -> bool:
    """Whether a configuration of timm's says where weights are."""
    return isinstance(config, Mapping) and any(config.get(key) for key in ("file", "hf_hub_id"))


def _build_resnet50_v1(output_stride: int = 32, aa_layer: Any = None, **options: Any) -> nn.Module:
    if output_stride != 32:
        raise ValueError(f"output_stride (={output_stride}) of resnet50_v1 must be 32")
    if aa_layer is not None:
        raise ValueError(f"aa_layer (={aa_layer!r}) of resnet50_v1 must be None")
    model: nn.Module = ResNet(block=Bottleneck, layers=(3, 4, 6, 3), **options)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return model


# Called rather than used as a decorator, which would hide the function's types: timm has none
register_model(resnet50_v1)
