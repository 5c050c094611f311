"""Files of pruned models: what they hold, who reads them, and how training goes on from them."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import (
    Pruner,
    apply_masks,
    ck_structured,
    convert_pruned,
    load_masks,
    load_pruned,
    load_pruned_model,
    save_pruned,
    window_structured,
)
from starfire_prune.recipe.load import load_recipe
from starfire_prune.serialization.codec import bits_of
from starfire_prune.serialization.entries import TensorEntry
from starfire_prune.serialization.pruned import read_metadata, read_pruned_file
from starfire_prune.serialization.state import plain_state_dict
from starfire_prune.utils.errors import CheckpointError
from tests.support.networks import LAYERS, SmallNet, sgd, train_step
from tests.support.paths import ROOT

FORMS: dict[str, dict[str, Any]] = {
    "dense": {"format": "dense"},
    "compressed": {"format": "compressed"},
    "deflated": {"format": "compressed", "deflate": True},
}
every_form = pytest.mark.parametrize("form", FORMS)


def pruned(phase: str = "fixed", method: str = "intra") -> tuple[SmallNet, Pruner]:
    """A small network as far as pruning has brought it."""
    model = SmallNet()
    optimizer = sgd(model)
    settings = {"method": method, "amount": 0.6, "era": [1, 2]}
    pruner = Pruner(model, settings, updates_per_epoch=2, optimizer=optimizer)
    for update in range({"dense": 1, "era": 3, "fixed": 5}[phase]):
        train_step(model, optimizer, update)
        pruner.step()
        if update % 2:
            pruner.end_epoch(update // 2)
    assert pruner.phase == phase
    return model, pruner


def saved(folder: Path, form: str, model: nn.Module | None = None, **options: Any) -> Path:
    """The file of a model, by default of a pruned one."""
    if model is None:
        model, options["pruner"] = pruned()
    pruner = options.get("pruner")
    unfinished = pruner is not None and not pruner.finished
    path = folder / "model.safetensors"
    save_pruned(model, path, **FORMS[form], unfinished=unfinished, **options)
    return folder / "model.safetensors"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names, their order, dtypes and all bits are the same."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype
        and torch.equal(bits_of(one[name]), bits_of(other[name]))
        for name in one
    )


# Tensors


@every_form
@pytest.mark.parametrize("phase", ["dense", "era", "fixed"])
@pytest.mark.parametrize("method", ["ck", "window", "intra"])
def test_a_file_holds_the_plain_tensors(form, phase, method, tmp_path):
    model, pruner = pruned(phase, method)
    path = saved(tmp_path, form, model, pruner=pruner)
    loaded = load_pruned(path)
    assert same(loaded, plain_state_dict(model, pruner.masks()))
    assert list(loaded) == list(SmallNet().state_dict())


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_file_keeps_the_dtype(form, dtype, tmp_path):
    model = SmallNet().to(dtype)
    ck_structured(model.body, amount=0.6)
    loaded = load_pruned(saved(tmp_path, form, model))
    assert same(loaded, plain_state_dict(model))
    assert loaded["body.weight"].dtype == dtype
    assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


@every_form
def test_kept_weights_keep_all_bits(form, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    kinds = torch.tensor([-0.0, torch.inf, -torch.inf, 1e-45, 1.0, 0.0, -1.0])
    weight = kinds.repeat(100)[: 8 * 8 * 9].view(8, 8, 3, 3).clone()
    weight.view(torch.int32).view(-1)[::11] = 0x7FA00123  # a signalling NaN and its payload
    mask = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    mask[::2] = True
    model[0].weight = nn.Parameter(weight)
    apply_masks(model, {"0.weight": mask})
    loaded = load_pruned(saved(tmp_path, form, model))["0.weight"]
    assert torch.equal(bits_of(loaded)[::2], bits_of(weight)[::2])
    assert not bits_of(loaded)[1::2].any()


@every_form
def test_tensors_of_any_kind_are_stored(form, tmp_path):
    model = nn.Module()
    buffers = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4, 3, 3),
        "zeros": torch.zeros(30, 30),
        "flags": torch.arange(400) % 3 == 0,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "eights": torch.linspace(-2, 2, 300).to(torch.float8_e4m3fn),
        "conv3d": torch.eye(6).view(6, 6, 1, 1, 1).expand(6, 6, 3, 3, 3).contiguous(),
    }
    for name, value in buffers.items():
        model.register_buffer(name, value)
    assert same(load_pruned(saved(tmp_path, form, model)), buffers)


def test_a_dtype_that_no_such_file_holds_is_refused(tmp_path):
    model = nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"tensor 'phase' has the dtype torch\.complex64"):
        saved(tmp_path, "dense", model)
    assert list(tmp_path.iterdir()) == []


@every_form
def test_no_name_of_pruning_leaves(form, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 4), nn.ConvTranspose2d(4, 4, 3))
    ck_structured(model[0], amount=0.5)
    prune.l1_unstructured(model[1], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    prune.random_unstructured(model[2], "bias", amount=0.5)  # type: ignore[no-untyped-call]
    path = saved(tmp_path, form, model)
    loaded, masks = load_pruned(path), load_masks(path)
    assert sorted(loaded) == sorted(
        f"{index}.{name}" for index in range(3) for name in ("weight", "bias")
    )
    assert masks.keys() == {"0.weight", "1.weight", "2.bias"}
    for name, mask in masks.items():
        hooked = model.get_buffer(f"{name}_mask").bool()
        assert torch.equal(mask, hooked)
        assert not bits_of(loaded[name])[~mask].any()


# Other readers


def test_plain_safetensors_reads_a_dense_file(tmp_path):
    model, pruner = pruned()
    path = saved(tmp_path, "dense", model, pruner=pruner)
    plain = load_file(path)
    assert same({name: plain[name] for name in model.state_dict()}, load_pruned(path))
    SmallNet(seed=1).load_state_dict(plain, strict=True)


def test_timm_loads_a_dense_file_strictly(tmp_path):
    import timm

    model = timm.create_model("test_resnet", num_classes=5)
    ck_structured(model.layer4[0].conv2, amount=0.6)
    path = saved(tmp_path, "dense", model)
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=path).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model.eval()(images))


def test_plain_safetensors_lists_a_compressed_file(tmp_path):
    path = saved(tmp_path, "compressed")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        names = set(file.keys())
        values = file.get_tensor("body.weight:values")
    assert {"body.weight:kernels", "body.weight:patterns", "body.bias"} < names
    assert "body.weight" not in names
    weight = load_pruned(path)["body.weight"]
    assert torch.equal(values, weight[weight != 0])


def test_load_state_dict_refuses_a_compressed_file(tmp_path):
    state = load_file(saved(tmp_path, "compressed"))
    with pytest.raises(RuntimeError, match="Missing key"):
        SmallNet().load_state_dict(state)


# Into a model


@every_form
def test_a_file_is_loaded_into_the_memory_of_a_model(form, tmp_path):
    path = saved(tmp_path, form)
    model = SmallNet(seed=1)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert load_pruned_model(path, model) is model
    assert same(dict(model.state_dict()), load_pruned(path))
    assert places == {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_load_the_same(threads, tmp_path, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    path = saved(tmp_path, "deflated")
    expected = load_pruned(path)
    torch.set_num_threads(threads)
    assert same(load_pruned(path), expected)
    assert same(dict(load_pruned_model(path, SmallNet(seed=1)).state_dict()), expected)


@every_form
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(memory_format=torch.channels_last),
        nn.DataParallel,
        torch.compile,
    ],
    ids=["half", "channels_last", "wrapped", "compiled"],
)
def test_a_model_of_another_kind_gets_the_same_weights(form, change, tmp_path):
    path = saved(tmp_path, form)
    own, model = SmallNet(seed=1), SmallNet(seed=1)
    load_pruned_model(path, change(own))
    model.load_state_dict(load_pruned(path))
    for name, value in model.state_dict().items():
        assert torch.equal(own.state_dict()[name], value.to(own.state_dict()[name].dtype))


def other_model(kind: str) -> tuple[nn.Module, str]:
    model = SmallNet(seed=1)
    if kind == "fewer":
        del model.bn2
        return model, "it also holds 'bn2.weight', 'bn2.bias', 'bn2.running_mean' and 2 more"
    if kind == "more":
        model.extra = nn.Linear(2, 2)
        return model, "it lacks extra.weight, extra.bias"
    if kind == "hooked":
        ck_structured(model.body, amount=0.5)
        return model, "it lacks body.weight_orig, body.weight_mask and also holds 'body.weight'"
    model.head = nn.Linear(8, 7)
    return (
        model,
        "it has other shapes: head.weight (10, 8) instead of (7, 8), "
        "head.bias (10,) instead of (7,)",
    )


@pytest.mark.parametrize("kind", ["fewer", "more", "hooked", "shapes"])
def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(kind, tmp_path):
    path = saved(tmp_path, "compressed")
    model, message = other_model(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_pruned_model(path, model)
    assert str(caught.value) == f"{path} can't be loaded: it is of another model: {message}"
    assert same(dict(model.state_dict()), dict(before))


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path):
    path = saved(tmp_path, "compressed")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    model = SmallNet(seed=1)
    with pytest.raises(CheckpointError, match="CRC-32 mismatch"):
        load_pruned_model(path, model)
    assert same(dict(model.state_dict()), dict(SmallNet(seed=1).state_dict()))


def test_ints_are_not_filled_with_floats(tmp_path):
    source, model = nn.Module(), nn.Module()
    for name in ("a", "b"):
        source.register_buffer(name, torch.full((2,), 1.5))
        model.register_buffer(name, torch.zeros(2, dtype=torch.float if name == "a" else torch.int))
    message = r"tensor 'b' has the dtype torch\.float32, but torch\.int32"
    with pytest.raises(CheckpointError, match=message):
        load_pruned_model(saved(tmp_path, "dense", source), model)
    assert not model.get_buffer("a").any()


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_weight_that_was_pruned_in_one_place_only_is_refused(form, tmp_path):
    source, model = Tied(), Tied()
    path = saved(tmp_path, form, source)
    load_pruned_model(path, model)
    assert torch.equal(model.first.weight, source.first.weight)
    prune.l1_unstructured(source.second, "weight", amount=2)  # type: ignore[no-untyped-call]
    path = saved(tmp_path, form, source)
    message = r"tensors 'first.weight' and 'second.weight' share memory in the model"
    with pytest.raises(CheckpointError, match=message):
        load_pruned_model(path, model)
    assert bool(model.first.weight.all())


def test_a_model_is_unchanged_if_memory_runs_out(tmp_path, monkeypatch):
    def no_memory(entry: TensorEntry) -> Tensor:
        if entry.name == "head.bias":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return decode(entry)

    path, model = saved(tmp_path, "dense"), SmallNet(seed=1).double()
    decode, before = TensorEntry.decode, copy.deepcopy(model.state_dict())
    monkeypatch.setattr(TensorEntry, "decode", no_memory)
    with pytest.raises(CheckpointError, match=r"can't be loaded: there is not enough memory$"):
        load_pruned_model(path, model)
    assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("only", ["", "fc."])
def test_a_model_that_timm_builds_has_the_dtypes_of_the_file(only, tmp_path):
    import timm

    model = timm.create_model("test_resnet", num_classes=5)
    (model.fc if only else model).half()
    loaded = load_pruned_model(saved(tmp_path, "compressed", model))
    assert same(dict(loaded.state_dict()), plain_state_dict(model))


def test_a_model_without_memory_is_refused(tmp_path):
    path = saved(tmp_path, "dense")
    with torch.device("meta"):
        model = SmallNet()
    with pytest.raises(ValueError, match=r"`model` is on the device meta: call model\.to_empty"):
        load_pruned_model(path, model)


# Metadata


@every_form
def test_the_metadata_describe_the_pruning(form, tmp_path):
    model, pruner = pruned()
    path = saved(tmp_path, form, model, pruner=pruner, average_decay=0.9)
    metadata = read_metadata(path)
    weights = metadata.pop("weights")
    assert metadata == {
        "format_version": 1,
        "method": "intra",
        "amount": 0.6,
        "era": [1, 2],
        "phase": "fixed",
        "average_decay": 0.9,
    }
    assert list(weights) == [f"{name}.weight" for name in LAYERS]
    state = load_pruned(path)
    for name, entry in weights.items():
        assert entry["zeros"] == int((state[name] == 0).sum())
        assert entry["total"] == state[name].numel()


def test_without_a_pruner_the_metadata_give_the_zeros_of_each_pruned_weight(tmp_path):
    model = SmallNet()
    window_structured(model.body, amount=0.6)
    metadata = read_metadata(saved(tmp_path, "compressed", model))
    assert metadata["method"] is None
    assert {name: entry["zeros"] for name, entry in metadata["weights"].items()} == {
        "body.weight": 5 * 8 * 12
    }


@every_form
def test_the_recipe_is_kept_and_names_the_model(form, tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    path = saved(tmp_path, form, recipe=recipe)
    file = read_pruned_file(path)
    assert file.recipe == recipe.model_dump(mode="json")
    assert file.model == {"name": recipe.model.name, "num_classes": recipe.model.num_classes}
    plain = saved(tmp_path, form, recipe=recipe.model_dump(mode="json"))
    assert read_pruned_file(plain).metadata == file.metadata


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_a_converted_file_is_the_one_that_would_have_been_saved(first, second, tmp_path):
    model, pruner = pruned()
    source = saved(tmp_path, first, model, pruner=pruner, architecture={"name": "small"})
    convert_pruned(source, tmp_path / "new", **FORMS[second])
    expected = saved(tmp_path, second, model, pruner=pruner, architecture={"name": "small"})
    assert (tmp_path / "new").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("write", [saved, None])
def test_other_forms_are_refused(write, tmp_path):
    def save(**options: Any) -> None:
        if write is None:
            convert_pruned(tmp_path / "missing", tmp_path / "new", **options)
        else:
            save_pruned(SmallNet(), tmp_path / "new", **options)

    with pytest.raises(ValueError, match=r"`format` \(='zip'\) must be 'dense' or 'compressed'"):
        save(format="zip")
    with pytest.raises(ValueError, match="`deflate` needs format='compressed'"):
        save(format="dense", deflate=True)


def test_every_name_in_the_metadata_has_a_string(tmp_path):
    path = saved(tmp_path, "dense")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {
        "format",
        "starfire_prune",
        "starfire_prune.tensors",
        "starfire_prune.crc32",
    }
    assert json.loads(metadata["starfire_prune"])["format_version"] == 1
