"""Models by their names, ResNet-50 v1, and weights to start from."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from starfire_prune import save_pruned
from starfire_prune.models import create_model, resnet50_v1
from starfire_prune.serialization.pretrained import create_pretrained, load_weights
from starfire_prune.utils.errors import PretrainedError

CLASSIFIERS = {
    "test_resnet": ("fc.weight", "fc.bias"),
    "test_efficientnet": ("classifier.weight", "classifier.bias"),
    "mobilenetv2_035": ("classifier.weight", "classifier.bias"),
}


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


@pytest.mark.parametrize(
    ("name", "multiplications"), [("resnet50_v1", 3_857_973_248), ("resnet50", 4_089_184_256)]
)
def test_v1_multiplies_less_than_timms_resnet50(name, multiplications):
    """He et al. (2015) give 3.8 billion; v1.5 has the 3x3 of a stage's start at twice the size."""
    model = create_model(name, num_classes=1000).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * multiplications


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
            "resnet50_v1 has no pretrained weights: give a safetensors file, or use "
            "pretrained=False",
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


def test_without_timm_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "starfire_prune.models")
    message = "models need timm: pip install 'starfire-prune[train]'"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        importlib.import_module("starfire_prune.models")


# Weights to start from


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of a model of three classes."""
    path = tmp_path / "weights.safetensors"
    save_file(state_of("test_resnet", 3), path)
    return path


def state_of(name: str, num_classes: int) -> dict[str, Tensor]:
    return create_model(name, num_classes).state_dict()


def refusal_of(call: Callable[..., object], *arguments: Any) -> str:
    """The sentence of the PretrainedError."""
    with pytest.raises(PretrainedError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loading_gives_the_model_every_weight_of_the_file(file):
    model = create_model("test_resnet", 3)
    saved = load_file(file)
    assert load_weights(model, file) == ()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_other_classes_is_left_as_it_was(name, tmp_path):
    saved, model = state_of(name, 5), create_model(name, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(saved, tmp_path / "weights.safetensors")
    fresh = load_weights(model, tmp_path / "weights.safetensors")
    assert fresh == CLASSIFIERS[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else saved[key])


def test_weights_keep_the_type_of_the_model(file):
    save_file({key: value.half() for key, value in state_of("test_resnet", 3).items()}, file)
    model = create_model("test_resnet", 3)
    load_weights(model, file)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_create_pretrained_reads_a_file(file):
    model, fresh = create_pretrained("test_resnet", 3, file)
    saved = load_file(file)
    assert fresh == ()
    assert model.training
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("num_classes", "fresh"), [(1000, ()), (7, ("fc.weight", "fc.bias"))])
def test_create_pretrained_tells_what_timm_has_not_loaded(num_classes, fresh, monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda *args, **options: asked.append(True)
    )
    _, keys = create_pretrained("test_resnet.r160_in1k", num_classes)
    assert (asked, keys) == ([True], fresh)


def test_options_reach_a_pretrained_model(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(create_model("test_resnet", 3, in_chans=1).state_dict(), path)
    model: Any
    model, _ = create_pretrained("test_resnet", 3, path, in_chans=1)
    assert model.conv1[0].in_channels == 1


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("no weights")])
def test_weights_that_cannot_be_downloaded_are_refused(error, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    reason = str(error).replace("\n", " ")
    assert refusal_of(create_pretrained, "test_resnet", 3) == (
        f"timm's weights of test_resnet can't be had ({reason}): give a safetensors file"
    )


def test_a_file_that_is_not_there_is_refused(tmp_path):
    model = create_model("test_resnet", 3)
    sentence = refusal_of(load_weights, model, tmp_path / "none.safetensors")
    assert sentence == f"there is no file {tmp_path}/none.safetensors"


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_weights_of_save_pruned_are_loaded_in_either_form_and_checked(form, tmp_path):
    path, model = tmp_path / "model.safetensors", create_model("test_resnet", 3)
    source = create_model("test_resnet", 3)
    save_pruned(source, path, form)
    assert load_weights(model, path) == ()
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "CRC-32 mismatch in its" in refusal_of(load_weights, model, path)


@pytest.mark.parametrize("damage", ["cut short", "empty", "another format"])
def test_a_file_that_is_no_whole_safetensors_file_is_refused(damage, file):
    content = {"cut short": file.read_bytes()[:-100], "empty": b"", "another format": b"PK" * 50}
    file.write_bytes(content[damage])
    sentence = refusal_of(load_weights, create_model("test_resnet", 3), file)
    assert sentence.startswith(f"{file} is not a complete safetensors file (")
    assert sentence.endswith(
        "): restore it, export it again, or convert it by safetensors.torch.save_file"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fc.bias": None}, "lacks fc.bias"),
        ({"more": torch.zeros(1)}, "also holds 'more'"),
        (
            {"conv1.0.weight": torch.zeros(2)},
            "has other shapes: conv1.0.weight (2,) instead of (16, 3, 3, 3)",
        ),
        (
            {"bn1.bias": None, "more": torch.zeros(1)},
            "lacks bn1.bias and also holds 'more'",
        ),
        (
            {f"more{index}": torch.zeros(1) for index in range(5)},
            "also holds 'more0', 'more1', 'more2' and 2 more",
        ),
    ],
)
def test_a_file_of_another_model_is_refused_with_what_differs(change, fault, file):
    state = {**state_of("test_resnet", 3), **change}
    save_file({name: value for name, value in state.items() if value is not None}, file)
    model = create_model("test_resnet", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert refusal_of(load_weights, model, file) == f"{file} is of another model: it {fault}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
