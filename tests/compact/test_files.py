"""Files of compact models: what is loaded from them, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import filter_structured
from starfire_prune.compact import files as compact_file
from starfire_prune.compact.compaction import CompactReport
from starfire_prune.compact.files import load_compact, save_compact
from starfire_prune.models import create_model
from starfire_prune.serialization.pruned import load_pruned, read_pruned_file, save_pruned
from starfire_prune.utils.errors import CheckpointError, ExportError
from tests.runs.test_checkpoint import files_of_at_most
from tests.support.networks import SmallNet, equal_states
from tests.support.sparse_networks import (
    FULL,
    NARROW,
    difference,
    images,
    randomize,
    sparse_network,
)

SMALL = {"name": "test_resnet", "num_classes": 5}


def sparse(model: nn.Module, share: float = 0.5) -> nn.Module:
    """A model of random batch norms whose convolutions have lost filters, in eval mode."""
    randomize(model, torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels > 3:
            filter_structured(module, amount=share)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sparse(create_model(**SMALL))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(
    model: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompactReport]:
    path = tmp_path_factory.mktemp("compact") / "small.safetensors"
    return path, save_compact(model, path, images(), SMALL)


@pytest.fixture
def path(written: tuple[Path, CompactReport]) -> Path:
    return written[0]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def with_model(path: Path, target: Path, **architecture: object) -> Path:
    """The file with another model named in it."""
    small = load_compact(path)
    arguments = {key: value for key, value in architecture.items() if value is not None}
    save_pruned(small, target, "compressed", architecture={"name": "x", **arguments})
    return target


def test_a_loaded_model_gives_the_outputs_of_the_sparse_one(path, model):
    assert difference(model, load_compact(path), images(seed=3)) < 1e-5


def test_a_loaded_model_is_as_small_as_the_report_says(written):
    path, report = written
    before, after = report.parameters
    assert parameters(load_compact(path)) == after < before


def test_layers_know_their_channels(path):
    for module in load_compact(path).modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert module.weight.shape[:2] == shape
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == (module.num_features,)


def test_a_model_that_is_given_is_cut_in_place(path, model):
    given = create_model(**SMALL)  # type: ignore[arg-type]
    assert load_compact(path, given) is given
    assert difference(model, given, images()) < 1e-5


def test_a_loaded_model_is_in_eval_mode_and_can_be_trained(path):
    loaded = load_compact(path)
    assert not loaded.training
    loaded.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_loaded_model_is_written_and_loaded_again(path, tmp_path):
    first = load_compact(path)
    save_compact(first, tmp_path / "again.safetensors", images(), SMALL)
    second = load_compact(tmp_path / "again.safetensors")
    assert difference(first, second, images()) < 1e-5


def test_the_file_is_one_of_save_pruned(path):
    assert equal_states(dict(load_compact(path).state_dict()), load_pruned(path))
    assert read_pruned_file(path).model == SMALL


def test_remaining_zeros_are_compressed(tmp_path):
    network = sparse_network(NARROW["resnet18"], dtype=torch.float32)
    save_compact(network, tmp_path / "small.safetensors", images(), {"name": "resnet18"})
    entries = read_pruned_file(tmp_path / "small.safetensors").entries
    assert "ck" in {entry.encoded.encoding for entry in entries.values()}


def test_a_deflated_file_is_smaller(path, model, tmp_path):
    save_compact(model, tmp_path / "small.safetensors", images(), SMALL, deflate=True)
    assert (tmp_path / "small.safetensors").stat().st_size < path.stat().st_size
    weights = load_pruned(tmp_path / "small.safetensors")
    assert equal_states(dict(load_compact(path).state_dict()), weights)


def test_shared_parameters_are_still_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return self.head((self.first(x) + self.second(x)).mean((2, 3)))

    network = Tied()
    with torch.no_grad():
        network.first.weight[:5] = 0.0
        network.head.weight[:, 5] = 0.0
    save_compact(network, tmp_path / "tied.safetensors", images(), {"name": "tied"})
    loaded: Any = load_compact(tmp_path / "tied.safetensors", Tied())
    assert loaded.first.out_channels < 8
    assert loaded.first.weight is loaded.second.weight
    assert difference(network, loaded, images()) < 1e-5


# What is refused


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "resnet18"}, r"tensor '.*' does not fit: "),
        ({"name": "test_resnet", "num_classes": 7}, r"\(5,\) in the file, \(7,\) in the model"),
        ({"name": "test_resnest"}, r"its model can't be built: unknown model 'test_resnest'"),
        (
            {"name": "test_resnet", "pretrained": True},
            r"the argument 'pretrained' of its model is not allowed",
        ),
        (
            {"name": "test_resnet", "layers": [9]},
            r"the argument 'layers' of its model is not allowed",
        ),
    ],
)
def test_a_file_that_names_another_model_is_refused(architecture, message, path, tmp_path):
    wrong = with_model(path, tmp_path / "wrong.safetensors", **architecture)
    with pytest.raises(CheckpointError, match=rf"wrong.safetensors can't be loaded: .*{message}"):
        load_compact(wrong)


def test_a_file_without_a_model_is_refused(tmp_path):
    save_pruned(SmallNet(), tmp_path / "small.safetensors")
    with pytest.raises(
        CheckpointError, match=r"it does not name a timm model: build the model yourself"
    ):
        load_compact(tmp_path / "small.safetensors")


def test_a_model_that_is_too_large_before_it_is_cut_is_refused(path):
    size = sum(value.nbytes for value in load_pruned(path).values())
    with pytest.raises(
        CheckpointError, match=r"its model takes [\d,]+ bytes, more than `max_bytes`"
    ):
        load_compact(path, max_bytes=size)


def test_a_model_that_does_not_fit_is_left_as_it_is(path):
    other = create_model("test_resnet", 7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"tensor '.*' does not fit: "):
        load_compact(path, other)
    assert equal_states(before, dict(other.state_dict()))


def test_a_damaged_file_is_refused(path, tmp_path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.safetensors can't be loaded: .*mismatch"):
        load_compact(tmp_path / "damaged.safetensors")


def test_a_file_that_would_be_another_model_is_not_written(model, tmp_path, monkeypatch):
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return 2 * self.inner(x)

    load = load_compact
    monkeypatch.setattr(compact_file, "load_compact", lambda *args: Doubled(load(*args)))
    with pytest.raises(ExportError, match=r"the model's outputs differ by .* --format onnx --comp"):
        save_compact(model, tmp_path / "small.safetensors", images(), SMALL)
    assert list(tmp_path.iterdir()) == []


def test_metadata_hold_no_more_than_json(path):
    for key, text in read_pruned_file(path).metadata.items():
        if key.startswith("starfire_prune"):
            json.loads(text)


# Real networks


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_networks_are_loaded_as_they_were(name, tmp_path):
    network = sparse_network(NARROW[name], dtype=torch.float32)
    path = tmp_path / "small.safetensors"
    report = save_compact(network, path, images(), {"name": name})
    loaded = load_compact(path, NARROW[name]())
    assert parameters(loaded) == report.parameters[1]
    assert difference(network, loaded, images(seed=5)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100", "efficientnet_b0", "regnety_002"])
def test_full_networks_are_loaded_by_their_names(name, tmp_path):
    network = sparse_network(FULL[name], dtype=torch.float32)
    path = tmp_path / "small.safetensors"
    report = save_compact(network, path, images(size=64), {"name": name, "num_classes": 10})
    loaded = load_compact(path)
    assert parameters(loaded) == report.parameters[1]
    assert difference(network, loaded, images(size=64, seed=5)) < 1e-5


def test_a_failed_check_is_not_reported_as_a_failed_write(model, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("of the forward pass")

    monkeypatch.setattr(compact_file, "_check_same", fail)
    with pytest.raises(RuntimeError, match=r"^of the forward pass$"):
        save_compact(model, tmp_path / "small.safetensors", images(), SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_full_disk_names_the_file(model, tmp_path):
    path = tmp_path / "small.safetensors"
    with (
        files_of_at_most(1000),
        pytest.raises(CheckpointError, match=rf"^{path} can't be written: File too large"),
    ):
        save_compact(model, path, images(), SMALL)
    assert list(tmp_path.iterdir()) == []
