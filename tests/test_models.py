import re
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from starfire_prune.models import create_model, resnet50_v1


@pytest.fixture(scope="module")
def v1() -> Any:
    return create_model("resnet50_v1", num_classes=1000)


@pytest.fixture(scope="module")
def v15() -> Any:
    return create_model("resnet50", num_classes=1000)


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The strides of all convolutions that have one above 1."""
    return {
        name: module.stride
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1)
    }


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_v1_strides_in_the_first_1x1_of_each_stage(v1):
    assert strides(v1) == {
        "conv1": (2, 2),
        "layer2.0.conv1": (2, 2),
        "layer2.0.downsample.0": (2, 2),
        "layer3.0.conv1": (2, 2),
        "layer3.0.downsample.0": (2, 2),
        "layer4.0.conv1": (2, 2),
        "layer4.0.downsample.0": (2, 2),
    }


def test_v1_differs_from_timms_resnet50_in_these_strides_alone(v1, v15):
    moved = {name.replace(".0.conv1", ".0.conv2"): stride for name, stride in strides(v1).items()}
    assert strides(v15) == moved


def test_v1_has_the_parameters_of_the_published_network(v1):
    assert sum(parameter.numel() for parameter in v1.parameters()) == 25_557_032


def test_v1_exchanges_weights_with_timms_resnet50(v1, v15):
    assert list(shapes(v1).items()) == list(shapes(v15).items())


def test_v1_gives_one_output_a_class():
    model = create_model("resnet50_v1", num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_v1_halves_the_resolution_at_each_stage_before_the_3x3(v1):
    inputs: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0].shape[-1])

    names = [f"layer{stage}.0.conv2" for stage in (1, 2, 3, 4)]
    hooks = [v1.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        v1.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert inputs == dict(zip(names, [16, 8, 4, 2], strict=True))


def test_v1_as_a_feature_extractor_keeps_its_strides():
    model: Any = create_model("resnet50_v1", num_classes=0, features_only=True)
    assert model.layer3[0].conv1.stride == (2, 2)
    assert model.layer3[0].conv2.stride == (1, 1)


def test_v1_is_listed_with_timms_models():
    assert "resnet50_v1" in timm.list_models("resnet50*")


def test_v1_has_the_data_settings_of_imagenet(v1, v15):
    settings = resolve_data_config({}, model=v1)
    assert settings["input_size"] == (3, 224, 224)
    assert settings["crop_pct"] == 0.875
    assert settings["interpolation"] == "bilinear"
    for key in ("mean", "std"):
        assert settings[key] == resolve_data_config({}, model=v15)[key]


@pytest.mark.parametrize("model_name", ["resnet50_v1", "resnet18"])
def test_options_reach_the_model(model_name):
    model: Any = create_model(model_name, num_classes=3, in_chans=1)
    assert model.conv1.in_channels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 8}, "output_stride (=8) of resnet50_v1 must be 32"),
        ({"aa_layer": nn.AvgPool2d}, f"aa_layer (={nn.AvgPool2d!r}) of resnet50_v1 must be None"),
        (
            {"pretrained": True},
            "resnet50_v1 has no pretrained weights: use pretrained=False",
        ),
    ],
)
def test_v1_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resnet50_v1(**options)


def test_an_output_stride_of_32_is_accepted():
    assert strides(resnet50_v1(output_stride=32, num_classes=2))["layer4.0.conv1"] == (2, 2)


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    with pytest.raises(
        ValueError, match=r"^unknown model 'resnet50_v2': did you mean .*resnet50_v1"
    ):
        create_model("resnet50_v2", num_classes=10)


def test_an_unknown_tag_is_refused_with_the_nearest_ones():
    with pytest.raises(
        ValueError, match=r"^unknown model 'resnet50\.a9_in1k': did you mean resnet50\."
    ):
        create_model("resnet50.a9_in1k", num_classes=10)


def test_a_name_like_no_other_is_refused_with_the_way_to_all_names():
    message = "unknown model '§': timm.list_models() gives all"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create_model("§", num_classes=10)


def test_a_name_with_a_tag_is_accepted():
    model: Any = create_model("resnet18.a1_in1k", num_classes=4)
    assert model.fc.out_features == 4


def test_importing_the_package_does_not_import_timm():
    program = "import sys, starfire_prune; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_timm_the_import_says_what_to_install():
    program = "import sys; sys.modules['timm'] = None; import starfire_prune.models"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.endswith(
        "ModuleNotFoundError: models need timm: pip install 'starfire-prune[train]'\n"
    )
