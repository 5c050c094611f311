"""timm's models by name, and ResNet-50 v1, which importing this module registers with timm.

timm's ``resnet50`` is version 1.5: the first block of a stage has its stride in the 3×3
convolution. In ``resnet50_v1``, the network of He et al. (2015), the stride is in the 1×1
convolution before it.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from starfire_prune.utils.errors import ModelError, PretrainedError
from starfire_prune.utils.text import first_line

__all__ = ["create_model", "resnet50_v1"]


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


# register_model reads this name
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


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Create a model by its name in timm's registry, ``resnet50_v1`` included.

    Args:
        name: The name, with or without the tag of its pretrained weights.
        num_classes: Number of outputs of the classifier; the model returns ``(N, num_classes)``.
        **options: Passed to the model, such as ``drop_path_rate`` or ``pretrained``.

    Returns:
        The model, in training mode.

    Raises:
        ModelError: If timm has no model, or no tag, of this name, or can't build the model.
        PretrainedError: If the pretrained weights don't exist or can't be downloaded.

    Example:
        >>> model = create_model("resnet18", num_classes=10)
        >>> model.fc.out_features
        10
    """
    names = timm.list_models(include_tags="." in name)
    if name not in names:
        near = difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() gives all"
        raise ModelError(f"unknown model {name!r}: {hint}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    except PretrainedError:
        raise
    except Exception as error:  # timm's constructors raise errors of every kind
        if options.get("pretrained") and isinstance(error, (OSError, RuntimeError)):
            raise PretrainedError(
                f"timm's weights of {name} can't be had "
                f"({textwrap.shorten(str(error), 200, placeholder=' …')}): give a safetensors file"
            ) from error
        raise ModelError(
            f"{name} can't be built with the options {options}: {first_line(error)}"
        ) from error
    return model


def resnet50_v1(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ResNet-50 v1, whose weights have the names and shapes of timm's ``resnet50``.

    Args:
        pretrained: Load the weights that timm's ``pretrained_cfg`` names, for example for
            ``local-dir:`` and ``hf-hub:``. There are no weights to download otherwise.
        **options: Options of timm's ``ResNet``, except ``aa_layer`` and an ``output_stride`` other
            than 32, which change the strides.

    Returns:
        The model, randomly initialized as by timm.

    Raises:
        PretrainedError: If pretrained weights are requested but ``pretrained_cfg`` names none.
        ValueError: If an option that changes the strides is given.

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
    """Whether a configuration of timm contains the location of weights."""
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


# Called, because as a decorator it would hide the function's types: timm has none
register_model(resnet50_v1)
