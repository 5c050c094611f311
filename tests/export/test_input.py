"""What is exported: which model a run's folder or a file is of, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from starfire_prune.export.input import ExportInput, find_input, load_input, write_weights
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.serialization.pruned import load_pruned, read_pruned_file, save_pruned
from starfire_prune.utils.errors import CheckpointError, EvaluationError, ExportError, ModelError
from starfire_prune.utils.settings import RecipeError
from tests.support.networks import equal_states
from tests.support.processes import exported
from tests.support.runs import write_recipe

SMALL = {"name": "test_resnet", "num_classes": 5}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = create_model(**SMALL)  # type: ignore[arg-type]
    with torch.no_grad():
        network.get_parameter("conv1.0.weight")[:, 0] = 0.0
    return network


@pytest.fixture
def foreign(model: nn.Module, tmp_path: Path) -> Path:
    """A file of weights from somewhere else."""
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    return tmp_path / "foreign.safetensors"


@pytest.fixture
def checked(model: nn.Module, tmp_path: Path) -> Path:
    """A file of this package that names its model."""
    save_pruned(model, tmp_path / "checked.safetensors", architecture=SMALL)
    return tmp_path / "checked.safetensors"


def same(one: nn.Module, other: nn.Module) -> bool:
    return equal_states(dict(one.state_dict()), dict(other.state_dict()))


def test_a_run_is_loaded_by_its_recipe(finished):
    model = load_input(find_input(finished))
    weights = exported(finished)
    assert not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_images_of_a_run_are_those_of_its_recipe(finished):
    source = find_input(finished)
    assert source.images is not None
    assert source.images.size == 16
    assert source.input_size(nn.Identity()) == (3, 16, 16)


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_a_file_that_names_its_model_is_enough(format, model, tmp_path):
    save_pruned(model, tmp_path / "a.safetensors", format, architecture=SMALL)
    assert same(load_input(find_input(tmp_path / "a.safetensors")), model)


@pytest.mark.parametrize("kind", ["foreign", "checked"])
def test_a_model_that_is_named_gets_the_classes_of_the_file(kind, model, request):
    path = request.getfixturevalue(kind)
    source = find_input(path, model="test_resnet")
    assert source.architecture == SMALL
    assert same(load_input(source), model)


def test_a_recipe_names_the_model_of_a_file(finished):
    weights = finished / "export" / "model.safetensors"
    by_file = load_input(find_input(weights, recipe=finished / "recipe.yaml"))
    assert same(by_file, load_input(find_input(finished)))


def test_the_recipe_in_a_file_describes_the_images(model, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    path = tmp_path / "a.safetensors"
    save_pruned(model, path, recipe=recipe, architecture=SMALL)
    source = find_input(path)
    assert source.data == recipe.data
    assert same(load_input(source), model)


def test_an_invalid_recipe_in_a_file_is_ignored(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_pruned(model, path, recipe={"data": {"name": "x"}}, architecture=SMALL)
    assert find_input(path).data is None


def test_without_a_recipe_images_have_the_size_of_the_architecture(checked, model):
    source = find_input(checked)
    assert source.images is None
    assert source.input_size(model) == (3, 160, 160)


@pytest.mark.parametrize(("img_size", "size"), [(32, (32, 32)), ([32, 48], (32, 48))])
def test_without_a_recipe_images_have_the_size_that_the_file_names(img_size, size, foreign):
    named = {"name": "test_vit", "img_size": img_size}
    source = ExportInput(foreign, foreign, None, named, is_checked=True, is_named=False)
    assert source.input_size(nn.Identity()) == (3, *size)


def test_a_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "empty.safetensors"
    save_pruned(nn.ReLU(), path)
    with pytest.raises(ExportError, match=r"empty.safetensors holds no weights: name a file that"):
        write_weights(find_input(path), tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_channels_are_those_of_the_file(tmp_path):
    grey = {**SMALL, "in_chans": 1}
    model = create_model(**grey)  # type: ignore[arg-type]
    save_pruned(model, tmp_path / "grey.safetensors", architecture=grey)
    assert find_input(tmp_path / "grey.safetensors").input_size(model) == (1, 160, 160)


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_weights_of_a_foreign_file_are_written_with_checksums(format, foreign, model, tmp_path):
    write_weights(find_input(foreign, model="test_resnet"), tmp_path / "new.safetensors", format)
    assert same(load_input(find_input(tmp_path / "new.safetensors")), model)


def test_weights_are_written_with_the_metadata_of_their_file(finished, tmp_path):
    source = find_input(finished)
    write_weights(source, tmp_path / "new.safetensors", "compressed", deflate=True)
    old, new = read_pruned_file(source.weights), read_pruned_file(tmp_path / "new.safetensors")
    assert new.pruning == old.pruning
    assert equal_states(load_pruned(source.weights), load_pruned(new.path))


def test_no_folder_of_this_machine_is_written(finished, tmp_path):
    old = tmp_path / "old"
    (old / "export").mkdir(parents=True)
    (old / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    save_file(exported(finished), old / "export" / "model.safetensors")
    write_weights(find_input(old), tmp_path / "new.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "new.safetensors").read_bytes()


# What is refused


def test_nothing_there_is_refused_with_what_is_near(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(EvaluationError, match=r"^there is no run or file \S+rum; in \S+: run$"):
        find_input(tmp_path / "rum")


def test_an_unfinished_run_is_refused_with_how_to_continue(finished, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(EvaluationError, match=r"run is unfinished, 4 of 4 epochs are done: cont"):
        find_input(tmp_path / "run")


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"is not a run's folder: it holds no recipe.yaml"):
        find_input(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "model", "option"), [(Path("a.yaml"), None, "recipe"), (None, "resnet18", "model")]
)
def test_a_run_accepts_no_other_model(recipe, model, option, finished):
    with pytest.raises(ExportError, match=rf"^--{option} has no effect: \S+ is a run, which has"):
        find_input(finished, recipe, model)


def test_a_recipe_and_a_model_are_refused(foreign):
    with pytest.raises(ExportError, match=r"^--model has no effect: the recipe names its model"):
        find_input(foreign, Path("recipe.yaml"), "resnet18")


def test_a_foreign_file_without_a_model_is_refused(foreign):
    with pytest.raises(
        ExportError, match=r"does not name a timm model: give --recipe FILE or --model"
    ):
        load_input(find_input(foreign))


def test_a_foreign_file_without_a_model_is_not_written(foreign, tmp_path):
    with pytest.raises(
        ExportError, match=r"does not name a timm model: give --recipe FILE or --model"
    ):
        write_weights(find_input(foreign), tmp_path / "new.safetensors")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "no.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(
        CheckpointError, match=r"no.safetensors is not a complete safetensors file \("
    ):
        find_input(tmp_path / "no.safetensors")


@pytest.mark.parametrize("kind", ["foreign", "checked"])
def test_a_file_that_is_cut_short_is_refused(kind, request):
    path = request.getfixturevalue(kind)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not a complete safetensors file \("):
        find_input(path)


def test_a_damaged_file_is_refused(checked):
    content = bytearray(checked.read_bytes())
    content[-1] ^= 1
    checked.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"checked.safetensors can't be loaded: tensor '.*CRC-32 mismatch"
    ):
        find_input(checked)


def test_an_unknown_name_is_refused_with_the_nearest(foreign):
    with pytest.raises(ExportError, match=r"^--model: unknown model 'test_resnit': did you mean"):
        find_input(foreign, model="test_resnit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"foreign.safetensors is of another model: it "),
        ("test_vit", r"is of another model than --model test_vit: it lacks head.weight"),
    ],
)
def test_weights_of_another_model_are_refused(name, message, foreign):
    with pytest.raises(ExportError, match=message):
        load_input(find_input(foreign, model=name))


def test_a_recipe_of_other_classes_is_refused(foreign, tmp_path):
    recipe = write_recipe(tmp_path)
    _, rest = recipe.read_text().split("\n", 1)
    recipe.write_text("model: {name: test_resnet, num_classes: 10}\n" + rest)
    with pytest.raises(ExportError, match=r"has another number of classes than the recipe's mod"):
        load_input(find_input(foreign, recipe=recipe))


def test_options_that_the_model_refuses_are_reported(foreign, tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("layers: [1, 1, 1, 1]", "layers: 3"))
    with pytest.raises(ModelError, match=r"^resnet18 can't be built with the options "):
        load_input(find_input(foreign, recipe=recipe))


def test_an_invalid_recipe_is_refused(foreign, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: 3")
    with pytest.raises(RecipeError, match=r"bad.yaml: model: "):
        find_input(foreign, recipe=tmp_path / "bad.yaml")


def test_a_file_that_describes_its_model_too_little_is_refused(finished, tmp_path):
    path = tmp_path / "a.safetensors"
    save_pruned(load_input(find_input(finished)), path, architecture={"name": "resnet18"})
    with pytest.raises(
        ExportError, match=r"does not describe its model well enough to build it: give"
    ):
        load_input(find_input(path))
