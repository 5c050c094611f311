"""The model that a file names: built by timm, or refused."""

import re

import pytest
from torch import nn

from starfire_prune import ck_structured, load_pruned_model
from starfire_prune.checkpoint import CheckpointError, plain_state_dict
from starfire_prune.pruned_file import read_pruned_file
from tests.networks import SmallNet
from tests.test_pruned_file import every_form, same, saved

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_custom_model_is_named_by_nobody(tmp_path):
    path = saved(tmp_path, "dense")
    message = "it names no model of timm: build it yourself and pass it as `model`"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_pruned_model(path)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "resnet10x"}, "its model 'resnet10x' can't be built (unknown model 'resnet10x'"),
        ({"name": "hf-hub:timm/test_resnet"}, "(unknown model 'hf-hub:timm/test_resnet'"),
        (
            {"name": "test_resnet", "num_classes": 10**15},
            "test_resnet as it names it has other tensors",
        ),
        ({"name": "test_resnet", "img_size": 64}, "its model 'test_resnet' can't be built ("),
        (
            {"name": "test_resnet", "layers": [10**9] * 4},
            "the argument 'layers', which no file may",
        ),
        (
            {"name": "test_resnet", "pretrained": True},
            "the argument 'pretrained', which no file may",
        ),
        ({"name": "test_resnet", "checkpoint_path": "a"}, "the argument 'checkpoint_path', which"),
        ({"name": "test_resnet"}, "has other tensors than it holds, such as '"),
    ],
)
def test_a_model_that_a_file_must_not_or_can_not_build_is_refused(architecture, message, tmp_path):
    path = saved(tmp_path, "compressed", SmallNet(), architecture=architecture)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_pruned_model(path)
    assert str(caught.value).startswith(f"{path} can't be loaded: ")
    assert str(caught.value).endswith(": build it yourself and pass it as `model`")
    assert isinstance(load_pruned_model(path, SmallNet(seed=1)), SmallNet)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"num_classes": 5}, "has no `name` of timm's"),
        (
            {"name": "test_resnet", "act_layer": nn.ReLU},
            "the argument 'act_layer', which is no plain",
        ),
    ],
)
def test_an_architecture_that_is_no_plain_data_is_refused(architecture, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^`architecture` \(=.*{message}"):
        saved(tmp_path, "dense", SmallNet(), architecture=architecture)
