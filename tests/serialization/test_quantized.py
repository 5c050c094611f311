"""Files of quantized models: what they hold, loading without torchao, and forged ones."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from starfire_prune import load_masks, load_pruned, load_pruned_model
from starfire_prune.models import create_model
from starfire_prune.quantization import check_masks, quantize
from starfire_prune.quantization.origin import origin_of
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.serialization.entries import decode_tensors
from starfire_prune.serialization.files import write_state
from starfire_prune.serialization.pruned import read_pruned_file
from starfire_prune.serialization.quantized import load_quantized, save_quantized
from starfire_prune.utils.errors import CheckpointError, PruningError, QuantizationError
from tests.support.quantized_networks import PRUNED, ResidualNet, images, pruned_net

pytest.importorskip("torchao")

LAYERS = ("stem", *PRUNED, "head")
FORMS: list[dict[str, Any]] = [
    {},
    {"format": "compressed"},
    {"format": "compressed", "deflate": True},
]


@pytest.fixture(scope="module")
def quantized() -> fx.GraphModule:
    return quantize(pruned_net(), [images()], reduced_range=True)


@pytest.fixture(scope="module")
def path(quantized, tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("quantized") / "int8.safetensors"
    save_quantized(quantized, path)
    return path


# What a file holds


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_loaded_model_equals_the_saved_one(quantized, tmp_path, form):
    save_quantized(quantized, tmp_path / "model.safetensors", **form)
    loaded = load_quantized(tmp_path / "model.safetensors", ResidualNet())
    state = quantized.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert read_scheme(loaded).inputs == read_scheme(quantized).inputs
    assert torch.equal(loaded(images()), quantized(images()))


def test_a_file_loads_without_torchao(quantized, path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert torch.equal(load_quantized(path, ResidualNet())(images()), quantized(images()))


def test_the_tensors_have_plain_names(quantized, path):
    tensors = load_pruned(path)
    kinds = {"weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32}
    kinds |= {"input_scale": torch.float32, "input_zero_point": torch.uint8}
    names = {f"{name}.{kind}" for name in LAYERS for kind in kinds}
    assert tensors.keys() == names | {"add.input_scale", "add.input_zero_point"}
    for name, tensor in tensors.items():
        assert tensor.dtype == kinds[name.rpartition(".")[2]]
    scheme = read_scheme(quantized)
    assert tensors["conv1.input_scale"].tolist() == [scheme.inputs["conv1", 0].scale]
    assert tensors["add.input_zero_point"].tolist() == [scheme.inputs["add", 1].zero_point]


def test_the_metadata_give_the_calibration(path):
    file = read_pruned_file(path)
    settings = json.loads(file.metadata["starfire_prune.quantization"])
    assert settings.pop("versions").keys() == {"torch", "torchao"}
    assert settings == {
        "method": "post_training",
        "images": 16,
        "input_shape": [3, 8, 8],
        "largest_input": 127,
        "inputs": {**{name: [0] for name in LAYERS}, "add": [1]},
    }


def test_masks_are_the_zeros_of_pruned_weights(quantized, path):
    masks, state = load_masks(path), quantized.state_dict()
    assert set(masks) == {f"{name}.weight" for name in PRUNED}
    assert all(torch.equal(mask, state[name] != 0) for name, mask in masks.items())
    loaded = load_quantized(path, ResidualNet())
    counts = check_masks(loaded)
    assert all(counts[name].pruned == counts[name].zeros for name in masks)
    assert origin_of(loaded).images == 16


def test_a_compressed_file_stores_no_pruned_kernels(quantized, tmp_path):
    last = nn.Conv2d(64, 64, 3)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), last).eval()
    with torch.no_grad():
        last.weight[:, 16:] = 0
    module = quantize(wide, [images()])
    for form in ("dense", "compressed"):
        save_quantized(module, tmp_path / form, form)
    entries = read_pruned_file(tmp_path / "compressed").entries
    values = np.count_nonzero(module.state_dict()["2.weight"].numpy())
    # Of the kept 9,216 weights those that are not zero, 4,096 bits for kernels, 9,216 for patterns
    assert entries["2.weight"].stored_bytes <= values + 512 + 1152
    assert entries["2.weight"].stored_bytes < 64 * 64 * 9 / 3
    loaded = load_quantized(tmp_path / "compressed", wide)
    assert torch.equal(loaded(images()), module(images()))


def test_timm_builds_the_model_that_a_file_names(tmp_path):
    model = create_model("test_resnet", 10).eval()
    batch = torch.rand(4, 3, 32, 32)
    module = quantize(model, [batch])
    save_quantized(module, tmp_path / "model.safetensors")
    loaded = load_quantized(tmp_path / "model.safetensors")
    assert torch.equal(loaded(batch), module(batch))
    assert read_pruned_file(tmp_path / "model.safetensors").model == {
        "name": "test_resnet",
        "num_classes": 10,
    }


def before_a_batch_norm() -> nn.Module:
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    return nn.Sequential(*layers).eval()


def test_batch_norms_that_no_layer_precedes_are_stored_in_float(tmp_path):
    torch.manual_seed(0)
    model, other = before_a_batch_norm(), before_a_batch_norm()
    mean = nn.init.uniform_(model.state_dict()["2.running_mean"])
    module = quantize(model, [images()])
    save_quantized(module, tmp_path / "model.safetensors")
    tensors = load_pruned(tmp_path / "model.safetensors")
    assert torch.equal(tensors["2.running_mean"], mean)
    loaded = load_quantized(tmp_path / "model.safetensors", other)
    assert torch.equal(loaded(images()), module(images()))
    assert not other.state_dict()["2.running_mean"].any()  # the given model is not changed


def test_a_loaded_model_can_be_saved_again(path, tmp_path):
    save_quantized(load_quantized(path, ResidualNet()), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


# What is not saved


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(
        QuantizationError, match=r"^ResidualNet is not a quantized model: pass what"
    ):
        save_quantized(ResidualNet(), tmp_path / "model.safetensors")


def test_pruned_weights_that_are_not_zero_are_not_saved(tmp_path):
    module = quantize(pruned_net(), [images()])
    module.state_dict()["conv1.weight"].fill_(1)
    with pytest.raises(PruningError, match=r"^conv1.weight: 432 pruned weights are not zero"):
        save_quantized(module, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# Files that are refused


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="it holds a quantized model: load it by load_quan"):
        load_pruned_model(path, ResidualNet())
    from starfire_prune import save_pruned

    save_pruned(pruned_net(), tmp_path / "float.safetensors")
    with pytest.raises(CheckpointError, match="it does not hold a quantized model: load it by loa"):
        load_quantized(tmp_path / "float.safetensors", ResidualNet())


def test_a_file_without_a_model_needs_one(path):
    with pytest.raises(CheckpointError, match="it does not name a timm model: build the model you"):
        load_quantized(path)


def test_another_model_is_refused(path):
    with pytest.raises(
        CheckpointError, match=r"the model has no layers with the weights conv1.wei"
    ):
        load_quantized(path, nn.Sequential(nn.Conv2d(3, 4, 1)))


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def forged(path: Path, copy: Path, change: Change) -> Path:
    """A copy of a file with other tensors and settings, whose checksums are right."""
    file = read_pruned_file(path)
    state, masks = decode_tensors(file.entries), file.masks()
    metadata = dict(file.metadata)
    settings = json.loads(metadata["starfire_prune.quantization"])
    change(state, settings)
    metadata["starfire_prune.quantization"] = json.dumps(settings)
    write_state(copy, state, masks, metadata, compress=False, deflate=False)
    return copy


def put(name: str, *values: Any) -> Change:
    """Write values at the beginning of a tensor."""

    def change(state: dict[str, Tensor], _: object) -> None:
        state[name].view(-1)[: len(values)] = torch.tensor(values).to(state[name].dtype)

    return change


def replace(name: str, tensor: Tensor | None) -> Change:
    def change(state: dict[str, Tensor], _: object) -> None:
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor

    return change


def setting(key: str, value: Any) -> Change:
    return lambda _, settings: settings.update({key: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("conv1.weight_scale", 0), "conv1.weight: its weight_scale must be above 0 in all ch"),
        (put("conv1.weight_scale", -1), "conv1.weight: its weight_scale must be above 0 in all c"),
        (
            put("conv1.weight_scale", torch.nan),
            "conv1.weight: its weight_scale contains NaN or infinite numbers",
        ),
        (
            replace("conv1.weight_scale", torch.ones(3)),
            "conv1.weight: its weight_scale must be float32 of shape (12,), but is torch.float32 "
            "of shape (3,)",
        ),
        (replace("conv1.weight_scale", None), "it lacks conv1.weight_scale, the scales of an int"),
        (
            replace("conv1.bias", torch.ones(12, dtype=torch.float64)),
            "conv1.weight: its bias must be float32 of shape (12,), but is torch.float64",
        ),
        (put("conv1.bias", torch.inf), "conv1.weight: its bias contains NaN or infinite numbers"),
        (put("stem.weight", -128), "stem.weight: its weight contains -128, but int8 weights are"),
        (
            replace("stem.weight", torch.ones(216, dtype=torch.int8)),
            "stem.weight: its weight must be int8 with two dimensions or more, but is torch.int8",
        ),
        (
            replace("stem.weight", torch.ones(8, 3, 1, 1, dtype=torch.int8)),
            "stem.weight has the shape (8, 3, 1, 1), but (8, 3, 3, 3) in the model",
        ),
        (put("head.input_scale", 0), "head: its input_scale (=0.0) must be a finite number above"),
        (put("head.input_scale", -2), "head: its input_scale (=-2.0) must be a finite number abo"),
        (put("head.input_scale", torch.nan), "head: its input_scale (=nan) must be a finite numb"),
        (put("add.input_zero_point", 128), "add: its input_zero_point (=128) must be in [0, 127]"),
        (
            replace("add.input_scale", torch.ones(2)),
            "add.input_scale must be torch.float32 of shape (1,), but is torch.float32 of shape",
        ),
        (replace("add.input_zero_point", None), "it lacks add.input_zero_point"),
        (
            replace("more", torch.ones(2)),
            "it is of another model: it also holds 'more'",
        ),
        (
            put("conv2.weight", *range(1, 100)),
            "weights of conv2.weight are zero, but its metadata give another number",
        ),
        (setting("inputs", {"lost": [0]}), "it lacks lost.input_scale"),
        (setting("inputs", {"add": [1, 1]}), "its quantization has a wrong 'inputs'"),
        (setting("inputs", {"add": [-1]}), "its quantization has a wrong 'inputs'"),
        (setting("inputs", []), "its quantization has a wrong 'inputs': []"),
        (setting("method", "guess"), "its quantization has a wrong 'method': 'guess'"),
        (setting("images", True), "its quantization has a wrong 'images': True"),
        (setting("largest_input", 300), "its quantization has a wrong 'largest_input': 300"),
        (setting("versions", {"torch": 2}), "its quantization has a wrong 'versions'"),
        (setting("input_shape", [2**20, 2**20]), "its quantization has a wrong 'input_shape'"),
        (setting("input_shape", [3, 0, 8]), "its quantization has a wrong 'input_shape'"),
        (setting("input_shape", 3), "its shape must be a list of at most 16 ints"),
        (
            setting("input_shape", [4, 8, 8]),
            "its model can't be traced for images of shape (4, 8, 8): Given groups=1",
        ),
        (setting("more", 1), "its quantization must have the keys images, input_shape, inputs, l"),
    ],
)
def test_forged_files_are_refused(path, tmp_path, change, text):
    copy = forged(path, tmp_path / "forged.safetensors", change)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_quantized(copy, ResidualNet())
    assert str(caught.value).startswith(f"{copy} can't be loaded: ")


def test_an_input_that_the_model_lacks_is_refused(path, tmp_path):
    def change(state: dict[str, Tensor], settings: dict[str, Any]) -> None:
        settings["inputs"]["add"] = [2]

    copy = forged(path, tmp_path / "forged.safetensors", change)
    with pytest.raises(CheckpointError, match=re.escape("the model's graph has no inputs add[2]")):
        load_quantized(copy, ResidualNet())
