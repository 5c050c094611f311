"""The model that a file names: built by timm, or refused."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import ck_structured, load_pruned_model
from starfire_prune.serialization.architecture import build_architecture
from starfire_prune.serialization.pruned import read_pruned_file
from starfire_prune.serialization.state import plain_state_dict
from starfire_prune.utils.errors import CheckpointError, DamageError
from tests.serialization.test_pruned import every_form, same, saved
from tests.support.networks import SmallNet


@every_form
@pytest.mark.parametrize("options", [{}, {"in_chans": 1}])
def test_timm_builds_the_model_that_the_file_names(form, options, tmp_path):
    import timm

    model = timm.create_model("test_resnet", num_classes=5, **options)
    ck_structured(model.layer4[0].conv2, amount=0.6)
    path = saved(tmp_path, form, model)
    loaded = load_pruned_model(path)
    assert type(loaded) is type(model)
    assert same(dict(loaded.state_dict()), plain_state_dict(model))
    assert read_pruned_file(path).model == {"name": "test_resnet", "num_classes": 5, **options}


def test_a_file_of_a_custom_model_names_no_model(tmp_path):
    path = saved(tmp_path, "dense")
    message = "it does not name a timm model: build the model yourself and pass it as `model`"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_pruned_model(path)


def changed(kind: str) -> nn.Module:
    """A model of timm that its name alone does not build, although its tensors have the shapes."""
    import timm

    name = "test_vit" if kind == "setting" else "test_resnet"
    options: dict[str, dict[str, Any]] = {
        "pooling": {"global_pool": "max"},
        "setting": {"dynamic_img_size": False},
    }
    model: Any = timm.create_model(name, num_classes=5, **options.get(kind, {}))
    if kind == "module":
        model.maxpool = nn.Identity()
    if kind == "stride":
        model.layer2[0].conv1.stride = (1, 1)
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("kind", ["pooling", "setting", "module", "stride"])
def test_a_model_that_its_name_does_not_build_is_not_named(kind, tmp_path):
    path = saved(tmp_path, "dense", changed(kind))
    assert read_pruned_file(path).model is None
    with pytest.raises(
        CheckpointError, match="it does not name a timm model: build the model yourself"
    ):
        load_pruned_model(path)


@pytest.mark.parametrize(
    "name",
    [
        "efficientvit_m0",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("levit_128s", "efficientformer_l1")),
    ],
)
def test_a_model_that_has_cached_tensors_is_named(name, tmp_path):
    import timm

    model: Any = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 224, 224))
        loaded = load_pruned_model(saved(tmp_path, "dense", model)).eval()
        torch.testing.assert_close(loaded(torch.ones(1, 3, 224, 224)), expected)


def test_finding_a_models_name_draws_no_random_numbers(tmp_path):
    import timm

    model = timm.create_model("test_resnet", num_classes=5)
    before = torch.get_rng_state()
    assert read_pruned_file(saved(tmp_path, "dense", model)).model is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "resnet10x"}, "its model can't be built: unknown model 'resnet10x'"),
        ({"name": "hf-hub:timm/test_resnet"}, "unknown model 'hf-hub:timm/test_resnet'"),
        (
            {"name": "test_resnet", "num_classes": 10**15},
            "it is not of the model that it names (",
        ),
        (
            {"name": "test_resnet", "img_size": 64},
            "its model can't be built: test_resnet can't be built with",
        ),
        (
            {"name": "test_resnet", "layers": [10**9] * 4},
            "the argument 'layers' of its model is not allowed",
        ),
        (
            {"name": "test_resnet", "pretrained": True},
            "the argument 'pretrained' of its model is not allowed",
        ),
        ({"name": "test_resnet", "checkpoint_path": "a"}, "argument 'checkpoint_path' of"),
        ({"name": "test_resnet"}, "and also holds '"),
    ],
)
def test_a_model_that_a_file_must_not_or_can_not_build_is_refused(architecture, message, tmp_path):
    path = saved(tmp_path, "compressed", SmallNet(), architecture=architecture)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_pruned_model(path)
    assert str(caught.value).startswith(f"{path} can't be loaded: ")
    assert "build the model yourself and pass it as `model`" in str(caught.value)
    assert isinstance(load_pruned_model(path, SmallNet(seed=1)), SmallNet)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"num_classes": 5}, "lacks `name`, the name of a timm model"),
        (
            {"name": "test_resnet", "act_layer": nn.ReLU},
            "the argument 'act_layer', which is not a ",
        ),
    ],
)
def test_an_architecture_that_is_not_plain_data_is_refused(architecture, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^`architecture` \(=.*{message}"):
        saved(tmp_path, "dense", SmallNet(), architecture=architecture)


def test_buffers_that_no_file_holds_count_against_max_bytes():
    import timm

    name = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    message = r"its model takes 3,\d{3},\d{3},\d{3} bytes, more than `max_bytes` \(=1,000,000,000\)"
    with pytest.raises(DamageError, match=message):
        build_architecture({"name": name, "img_size": 14336}, shapes, max_bytes=10**9)
