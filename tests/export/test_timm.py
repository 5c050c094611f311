"""Folders for timm: what create_model loads from them, and what their configuration says."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _hub as hub
from torch import Tensor, nn

from starfire_prune.data import load_datasets
from starfire_prune.export.image_settings import ImageSettings, class_names, image_settings
from starfire_prune.export.input import ExportInput, find_input, load_input, write_weights
from starfire_prune.export.timm import timm_config, write_timm_folder
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.serialization.pruned import save_pruned
from starfire_prune.utils.errors import CheckpointError, ExportError
from tests.support.processes import exported
from tests.support.runs import RECIPE, make_photographs

VERSION = tuple(map(int, importlib.metadata.version("timm").split(".")[:3]))
PHOTOGRAPHS = """\
model: {name: NAME, num_classes: 2, options: {channels: [8, 8, 16, 16]}}
data: {name: folder, root: ROOT, image_size: 48, batch_size: 4, interpolation: bicubic,
  crop_pct: 0.9, mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]}
optimizer: {name: sgd, lr: 0.05}
epochs: 1
pruning: none
"""

local_dir = pytest.mark.skipif(VERSION < (1, 0, 16), reason="timm reads folders from 1.0.16 on")


def recipe_of(folder: Path, text: str, **words: object) -> Recipe:
    for word, value in words.items():
        text = text.replace(word, str(value))
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def source_of(folder: Path, recipe: Recipe) -> tuple[ExportInput, nn.Module]:
    """Random weights of a recipe's model."""
    settings = recipe.model
    model = create_model(settings.name, settings.num_classes, **settings.options).eval()
    weights = folder / "weights.safetensors"
    save_file(model.state_dict(), weights)
    named = {"name": settings.name, "num_classes": settings.num_classes, **settings.options}
    source = ExportInput(
        weights, weights, recipe.data, named, is_checked=False, is_named=True, may_read_folders=True
    )
    return source, model


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a model has these weights, bit for bit."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own)


def from_folder(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.fixture
def from_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets timm find a folder's files as if they were in a repository of the Hub."""

    def load(folder: Path) -> nn.Module:
        def download(*names: str, filename: str | None = None, **options: Any) -> str:
            return str(folder / (filename or names[1]))

        monkeypatch.setattr(hub, "_has_hf_hub", True)
        monkeypatch.setattr(hub, "hf_hub_download", download)
        model: nn.Module = timm.create_model("hf-hub:somebody/model", pretrained=True)
        return model

    return load


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The folder of the small run: options of the model, and digits."""
    source = find_input(finished)
    write_timm_folder(source, load_input(source), tmp_path / "timm")
    return tmp_path / "timm"


@local_dir
def test_timm_loads_a_folder_with_the_weights_of_the_run(folder, finished):
    assert same(from_folder(folder), exported(finished))


def test_timm_loads_the_files_from_the_hub(folder, finished, from_hub):
    assert same(from_hub(folder), exported(finished))


def test_the_folder_holds_the_two_files_of_the_hub(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_timm_resolves_the_preprocessing_of_the_run(tmp_path, from_hub):
    source, model = source_of(tmp_path, recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT="x"))
    write_timm_folder(source, model, tmp_path / "timm")
    config = timm.data.resolve_model_data_config(from_hub(tmp_path / "timm"))
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()} == {
        "input_size": (3, 48, 48),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_become_the_tensors_of_the_run(interpolation, tmp_path, from_hub):
    root = make_photographs(tmp_path / "photographs", train=1, val=1)
    text = PHOTOGRAPHS.replace("bicubic", interpolation)
    recipe = recipe_of(tmp_path, text, NAME="resnet18", ROOT=root)
    source, model = source_of(tmp_path, recipe)
    write_timm_folder(source, model, tmp_path / "timm")
    config = timm.data.resolve_model_data_config(from_hub(tmp_path / "timm"))
    transform = timm.data.create_transform(**config, is_training=False)
    data = recipe.data.model_dump(exclude={"batch_size", "eval_batch_size", "workers"})
    given = {key: value for key, value in data.items() if value is not None}
    expected, _ = load_datasets(**given).val[0]
    from PIL import Image

    with Image.open(root / "val" / "ant" / "0.png") as image:
        assert torch.equal(transform(image.convert("RGB")), expected)


def test_digits_are_normalized_by_their_own_mean_and_deviation(tmp_path):
    digits = load_datasets("digits", image_size=8)
    images = torch.stack([digits.train[index][0] for index in range(50)])
    settings = image_settings(recipe_of(tmp_path, RECIPE).data)
    pixels = images * settings.std[0] + settings.mean[0]
    assert settings.crop_pct == 1.0
    torch.testing.assert_close(pixels * 16, (pixels * 16).round(), atol=1e-4, rtol=0)
    assert pixels.min().item() == pytest.approx(0.0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["resnet50_v1", "resnet50"])
def test_each_variant_of_resnet50_keeps_its_strides(name, tmp_path, from_hub):
    source, model = source_of(tmp_path, recipe_of(tmp_path, PHOTOGRAPHS, NAME=name, ROOT="x"))
    write_timm_folder(source, model, tmp_path / "timm")
    loaded = from_hub(tmp_path / "timm")
    assert loaded.get_submodule("layer2.0.conv1").stride == (
        (2, 2) if name == "resnet50_v1" else (1, 1)
    )
    assert same(loaded, dict(model.state_dict()))


def test_the_tag_of_pretrained_weights_is_left_out():
    images = ImageSettings(224, "bicubic", 0.95, (0.5,) * 3, (0.5,) * 3)
    architecture = {"name": "resnet18.a1_in1k", "num_classes": 2}
    config = timm_config(create_model(**architecture), architecture, images)  # type: ignore[arg-type]
    assert config["architecture"] == "resnet18"
    assert not {"tag", "url", "hf_hub_id", "license"} & config["pretrained_cfg"].keys()


@pytest.mark.parametrize(("size", "pool_size"), [(224, (7, 7)), (64, None)])
def test_the_pool_size_is_written_for_timms_image_size_only(size, pool_size):
    images = ImageSettings(size, "bicubic", 0.95, (0.5,) * 3, (0.5,) * 3)
    architecture: dict[str, Any] = {"name": "resnet18", "num_classes": 2}
    config = timm_config(create_model(**architecture), architecture, images)
    assert config["pretrained_cfg"]["pool_size"] == pool_size


# Names of the classes


def test_the_classes_of_the_digits_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list("0123456789")


def test_the_classes_of_folders_are_named(tmp_path, from_hub):
    root = make_photographs(tmp_path / "photographs", train=1, val=1)
    recipe = recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT=root)
    source, model = source_of(tmp_path, recipe)
    write_timm_folder(source, model, tmp_path / "timm")
    assert from_hub(tmp_path / "timm").pretrained_cfg["label_names"] == ["ant", "bee"]


def test_classes_of_folders_that_are_not_at_hand_have_no_names(tmp_path):
    recipe = recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT=tmp_path / "nowhere")
    assert class_names(recipe.data, 2) is None


def test_folders_of_another_number_of_classes_give_no_names(tmp_path):
    root = make_photographs(tmp_path / "photographs", train=1, val=1)
    (root / "train" / "cat").mkdir()
    recipe = recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT=root)
    assert class_names(recipe.data, 2) is None


@pytest.mark.parametrize("root", ["~nobody-of-this-name/x", "a\0b"])
def test_folders_that_can_not_be_there_give_no_names(root, tmp_path):
    data = recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT="x").data
    assert class_names(data.model_copy(update={"root": root}), 2) is None


def test_digits_name_no_other_number_of_classes(tmp_path):
    data = recipe_of(tmp_path, RECIPE).data
    assert class_names(data, 10) == tuple("0123456789")
    assert class_names(data, 4) is None


def test_a_recipe_within_a_file_shows_no_folders_of_this_machine(tmp_path):
    root = make_photographs(tmp_path / "photographs", train=1, val=1)
    recipe = recipe_of(tmp_path, PHOTOGRAPHS, NAME="resnet18", ROOT=root)
    _, model = source_of(tmp_path, recipe)
    save_pruned(model, tmp_path / "foreign.safetensors", recipe=recipe)
    weights = tmp_path / "foreign.safetensors"
    assert find_input(weights).data == recipe.data
    assert find_input(weights).label_names(model) is None
    given = find_input(weights, recipe=tmp_path / "recipe.yaml")
    assert given.label_names(model) == ("ant", "bee")


# Writing


def test_beside_the_weights_of_a_run_only_the_configuration_is_written(finished, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((finished / "export" / "model.safetensors").read_bytes())
    before = weights.stat().st_mtime_ns
    source = find_input(weights, recipe=finished / "recipe.yaml")
    write_timm_folder(source, load_input(source), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize("deflate", [False, True])
def test_compressed_weights_are_not_made_a_folder_for_timm(deflate, finished, tmp_path):
    weights = tmp_path / "model.safetensors"
    write_weights(find_input(finished), weights, "compressed", deflate=deflate)
    source = find_input(weights, recipe=finished / "recipe.yaml")
    with pytest.raises(ExportError, match=r"model.safetensors is compressed, .*another folder as"):
        write_timm_folder(source, load_input(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_without_a_recipe_it_is_refused(finished, tmp_path):
    weights = finished / "export" / "model.safetensors"
    source = ExportInput(
        weights, weights, None, {"name": "resnet18"}, is_checked=True, is_named=True
    )
    with pytest.raises(
        ExportError, match=r"does not describe how its images are prepared.*--recipe"
    ):
        write_timm_folder(source, nn.Identity(), tmp_path / "timm")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("")
    source = find_input(finished)
    with pytest.raises(CheckpointError, match=r"file/timm can't be written"):
        write_timm_folder(source, load_input(source), tmp_path / "file" / "timm")
