"""Plain weights of pruned models, and files that `save_pruned` exports of them."""

import re
import stat
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from starfire_prune import ck_structured
from starfire_prune.serialization.pruned import read_metadata, save_pruned
from starfire_prune.serialization.state import plain_state_dict
from starfire_prune.utils.errors import CheckpointError
from tests.support.networks import SmallNet
from tests.support.training import PHASES, Training, same, updates_in

# Plain weights


@pytest.mark.parametrize("phase", PHASES)
def test_plain_weights_have_the_names_and_the_order_of_the_dense_model(phase):
    training = Training(updates_in(phase))
    assert list(plain_state_dict(training.model)) == list(SmallNet().state_dict())


@pytest.mark.parametrize("phase", PHASES)
def test_a_dense_model_with_the_plain_weights_computes_what_the_pruned_one_does(phase):
    training, dense = Training(updates_in(phase)), SmallNet(seed=1)
    dense.load_state_dict(plain_state_dict(training.model), strict=True)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(dense.eval()(images), training.model.eval()(images))


def test_plain_weights_are_never_stale():
    training = Training(5)
    with torch.no_grad():
        training.model.get_parameter("body.weight_orig").fill_(2.0)
    weight = plain_state_dict(training.model)["body.weight"]
    assert set(weight.flatten().tolist()) == {0.0, 2.0}


def test_plain_pruned_weights_are_positive_zeros():
    model = nn.Conv2d(2, 4, 3)
    nn.init.constant_(model.weight, -1.0)
    ck_structured(model, amount=0.5)
    weight = plain_state_dict(nn.Sequential(model))["0.weight"]
    assert int((weight == 0).sum()) == 36
    assert not torch.signbit(weight[weight == 0]).any()


def test_plain_weights_are_copies():
    training = Training(7)
    before = training.model.body.weight.detach().clone()
    for tensor in plain_state_dict(training.model).values():
        tensor.zero_()
    assert torch.equal(training.model.body.weight, before)


def test_plain_weights_are_contiguous():
    model = SmallNet().to(memory_format=torch.channels_last)
    assert all(tensor.is_contiguous() for tensor in plain_state_dict(model).values())


def test_plain_weights_of_a_model_pruned_by_torch_are_masked():
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    state = plain_state_dict(model)
    assert state.keys() == {"0.weight", "0.bias"}
    assert int((state["0.weight"] == 0).sum()) == 8


@pytest.mark.parametrize("part", ["model", "layer"])
def test_plain_weights_of_a_compiled_model_have_plain_names(part):
    model: Any = Training(5).model
    names = list(plain_state_dict(model))
    if part == "layer":
        model.body = torch.compile(model.body)
    else:
        model = torch.compile(model)
    assert list(plain_state_dict(model)) == names


def test_plain_weights_keep_their_dtype():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).half()
    ck_structured(model[0], amount=0.5)
    state = plain_state_dict(model)
    assert state["0.weight"].dtype == torch.float16
    assert state["1.num_batches_tracked"].dtype == torch.int64


# The export


def test_an_export_holds_the_plain_weights(tmp_path):
    training, path = Training(7), tmp_path / "export" / "model.safetensors"
    save_pruned(training.model, path, pruner=training.pruner)
    assert same(load_file(path), plain_state_dict(training.model))
    assert path.stat().st_mode & stat.S_IRUSR


def test_the_metadata_of_an_export_within_the_era_give_the_phase(tmp_path):
    training, path = Training(5), tmp_path / "model.safetensors"
    save_pruned(training.model, path, pruner=training.pruner, unfinished=True)
    metadata = read_metadata(path)
    assert (metadata["phase"], metadata["finished"]) == ("era", False)
    assert metadata["weights"]["body.weight"]["zeros"] == int(
        (load_file(path)["body.weight"] == 0).sum()
    )


def test_the_metadata_give_the_method_of_each_layer(tmp_path):
    training, path = Training(7, fc={"method": "block", "amount": 0.3}), tmp_path / "m.safetensors"
    save_pruned(training.model, path, pruner=training.pruner)
    weights = read_metadata(path)["weights"]
    assert {name: (entry["method"], entry["amount"]) for name, entry in weights.items()} == {
        "stem.weight": ("ck", 0.6),
        "body.weight": ("ck", 0.6),
        "point.weight": ("ck", 0.6),
        "head.weight": ("block", 0.3),
    }


def test_the_metadata_of_an_export_without_pruning_give_no_method(tmp_path):
    path = tmp_path / "model.safetensors"
    save_pruned(SmallNet(), path)
    assert read_metadata(path) == {"format_version": 1, "method": None, "weights": {}}


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 60_000, '{"a": NaN}'])
def test_metadata_that_are_no_json_object_are_refused(text, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata={"starfire_prune": text})
    with pytest.raises(CheckpointError, match=r"can't be read: its metadata of the pruning is not"):
        read_metadata(path)


@pytest.mark.parametrize("content", [None, b"", b"half of a header", b"\xff" * 100])
def test_metadata_of_a_damaged_file_is_refused_with_its_path(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))} can't be read: .+; export"):
        read_metadata(path)


def test_a_foreign_file_has_no_metadata(tmp_path):
    for name, metadata in (("a", None), ("b", {"format": "pt"})):
        save_file({"weight": torch.zeros(1)}, tmp_path / name, metadata=metadata)
        assert read_metadata(tmp_path / name) == {}
