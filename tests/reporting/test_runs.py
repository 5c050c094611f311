"""Runs to report: what is read from their folders, what is refused, and what is a variant."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from starfire_prune.recipe.sections import Recipe
from starfire_prune.reporting.runs import ReportError, read_run, settings_key, variants_of
from tests.support.reported import TOP1, leave_dense, leave_evaluation, leave_run, write_metrics


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_run(tmp_path_factory.mktemp("runs") / "ck-seed3")


@pytest.fixture
def folder(untouched: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(untouched, tmp_path / "ck-seed3"))


def export_of(folder: Path) -> Path:
    return folder / "export" / "model.safetensors"


def error_of(folder: Path, *, unfinished: bool = False) -> str:
    """The sentence that refuses a run, without the folders above it."""
    with pytest.raises(ReportError) as caught:
        read_run(folder, unfinished=unfinished)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder.parent}/", "")


# Reading


def test_a_finished_run_has_its_numbers_and_the_sparsity_of_its_layers(folder):
    run = read_run(folder)
    assert (run.name, run.finished, run.recipe.seed) == ("ck-seed3", True, 3)
    assert (run.numbers.last_top1, run.numbers.best_epoch, run.numbers.asked) == (75.0, 2, 60.0)
    assert run.sparsity is not None
    assert run.sparsity["conv1"].selected
    assert 100 * run.sparsity.network == pytest.approx(run.numbers.reached)


def test_masks_are_the_zeros_of_the_exported_weights(folder):
    run = read_run(folder)
    weight = load_file(export_of(folder))["layer2.0.conv1.weight"]
    assert run.mask("layer2.0.conv1").equal(weight != 0)


def test_a_dense_run_prunes_no_layer(tmp_path):
    run = read_run(leave_dense(tmp_path / "dense"))
    assert run.sparsity is not None
    assert not any(layer.selected for layer in run.sparsity.layers)
    assert run.numbers.asked == 0.0


def test_a_trained_run_is_read(finished):
    run = read_run(finished)
    assert run.finished
    assert len([layer for layer in run.sparsity.layers if layer.selected]) > 3  # type: ignore[union-attr]


def test_an_evaluation_belongs_to_the_exported_weights(folder):
    leave_evaluation(folder, {"attack": "none", "epsilon": 0.0, "top1": 0.5})
    evaluation = read_run(folder).evaluation
    assert evaluation is not None
    assert evaluation.results[0].top1 == 0.5


# Errors


def test_a_folder_that_is_not_there_raises(tmp_path):
    assert error_of(tmp_path / "gone") == (
        "there is no folder gone: give a run's folder, which starfire train creates"
    )


def test_a_folder_of_something_else_raises(tmp_path):
    (tmp_path / "else").mkdir()
    assert error_of(tmp_path / "else") == "else is not a run's folder: it holds no recipe.yaml"


def test_a_folder_of_runs_raises_and_suggests_them(folder):
    parent = folder.parent
    assert error_of(parent) == (
        f"{parent.name} is not a run's folder: it holds no recipe.yaml; it holds runs, give "
        f"their folders: {parent.name}/ck-seed3 …"
    )


def test_a_damaged_recipe_raises_its_first_error(folder):
    (folder / "recipe.yaml").write_text("epochs: 4\n", encoding="utf-8")
    assert error_of(folder) == (
        "ck-seed3/recipe.yaml: model: is required (the network) (and 3 more); restore that file, "
        "or leave the run out"
    )


def test_damaged_metrics_raise(folder):
    (folder / "metrics.jsonl").write_text("{\n", encoding="utf-8")
    assert error_of(folder).startswith("ck-seed3/metrics.jsonl is damaged (")


def test_metrics_that_are_not_text_raise(folder):
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert error_of(folder).startswith("ck-seed3/metrics.jsonl is damaged ('utf-8' codec can't")


def test_metrics_without_an_epoch_raise(folder):
    write_metrics(folder, [{"epoch": 1, "top1": 0.5, "sparsity_network": 0.0}])
    assert "its epochs are not 0, 1, 2 …: restore it" in error_of(folder)


def test_metrics_without_accuracy_raise(folder):
    write_metrics(folder, [{"epoch": 0, "sparsity_network": 0.0}])
    assert "is damaged: epoch 0 has no top1: restore it" in error_of(folder)


def test_metrics_of_more_epochs_than_the_recipes_raise(folder):
    rows = [{"epoch": e, "top1": 0.5, "sparsity_network": 0.6} for e in range(5)]
    write_metrics(folder, rows)
    assert "belongs to another run: it has 5 epochs, and the recipe beside it 4" in error_of(folder)


def test_metrics_that_end_before_the_exported_weights_raise(folder):
    rows = [{"epoch": e, "top1": 0.5, "sparsity_network": 0.6} for e in range(3)]
    write_metrics(folder, rows)
    assert "it ends after 3 of 4 epochs, though the run has exported" in error_of(
        folder, unfinished=True
    )


def test_a_run_whose_pruning_is_unfinished_raises_unless_it_is_asked_for(tmp_path):
    folder = leave_run(tmp_path / "run", finishes=False)
    assert error_of(folder) == (
        "run has exported its weights before its pruning was finished: leave it out, or add "
        "--unfinished to report it as it is"
    )
    assert not read_run(folder, unfinished=True).is_pruned
    assert read_run(leave_run(tmp_path / "other")).is_pruned


def test_an_unfinished_run_raises_unless_it_is_asked_for(tmp_path):
    folder = leave_run(tmp_path / "ck", top1=TOP1[:3], exports=False)
    assert error_of(folder) == (
        "ck isn't finished (3 of 4 epochs are done): wait for it, leave it out, or add "
        "--unfinished to report the epochs that are done"
    )
    run = read_run(folder, unfinished=True)
    assert (run.finished, run.numbers.epochs, run.sparsity) == (False, 3, None)


def test_weights_that_are_not_safetensors_raise(folder):
    export_of(folder).write_bytes(b"nothing")
    assert error_of(folder).startswith("ck-seed3/export/model.safetensors can't be read: ")


def test_weights_of_another_model_raise(folder):
    metadata = {"starfire_prune": json.dumps({"weights": {}})}
    state = load_file(export_of(folder))
    state["head.weight"] = state.pop("fc.weight")
    save_file(state, export_of(folder), metadata)
    assert error_of(folder) == (
        "ck-seed3/export/model.safetensors is of another model: it lacks fc.weight and also holds "
        "'head.weight'; restore it, or leave the run out"
    )


def test_weights_of_other_classes_raise(folder):
    metadata = {"starfire_prune": json.dumps({"weights": {}})}
    state = load_file(export_of(folder))
    state |= {"fc.weight": state["fc.weight"][:7], "fc.bias": state["fc.bias"][:7]}
    save_file(state, export_of(folder), metadata)
    assert "has another number of classes than the recipe beside it (10)" in error_of(folder)


def test_weights_without_metadata_raise(folder):
    save_file(load_file(export_of(folder)), export_of(folder))
    assert "was not exported by starfire train" in error_of(folder)


def test_weights_of_another_run_of_the_same_model_raise(folder, tmp_path):
    shutil.copy(export_of(leave_dense(tmp_path / "dense")), export_of(folder))
    assert (
        "belongs to another run: 0.00% of its weights are zero, and metrics.jsonl ends"
        in error_of(folder)
    )


def test_a_damaged_evaluation_raises(folder):
    (folder / "evaluation.json").write_text("{", encoding="utf-8")
    assert error_of(folder).startswith("ck-seed3/evaluation.json can't be read: ")


def test_an_evaluation_of_other_weights_raises(folder, tmp_path):
    other = leave_dense(tmp_path / "dense")
    leave_evaluation(other, {"attack": "none", "epsilon": 0.0, "top1": 0.5})
    shutil.copy(other / "evaluation.json", folder / "evaluation.json")
    assert error_of(folder) == (
        "ck-seed3/evaluation.json belongs to other weights than ck-seed3/export/model.safetensors: "
        "evaluate again, or delete it"
    )


# Variants


def test_runs_that_differ_only_in_the_seed_are_a_variant(tmp_path):
    seeds = [leave_run(tmp_path / f"ck-seed{seed}", f"seed={seed}") for seed in (1, 0)]
    dense = leave_dense(tmp_path / "dense-seed0", "seed=0")
    variants = variants_of(read_run(path) for path in (seeds[0], dense, seeds[1]))
    assert [(own.name, own.method) for own in variants] == [("ck", "ck"), ("dense", "dense")]
    assert [run.recipe.seed for run in variants[0].runs] == [0, 1]


def test_variants_of_the_same_name_are_named_with_the_folder_above(tmp_path):
    paths = [
        leave_run(tmp_path / f"at{amount}" / "ck-seed3", f"pruning.amount=0.{amount}")
        for amount in (4, 5)
    ]
    variants = variants_of(read_run(path) for path in paths)
    assert [own.name for own in variants] == ["at4/ck-seed3", "at5/ck-seed3"]


def test_kept_checkpoints_and_seed_make_no_other_variant(folder):
    recipe = read_run(folder).recipe
    training = recipe.training.model_copy(update={"keep_checkpoints": (2,)})
    moved = recipe.model_copy(update={"training": training, "seed": 9})
    assert settings_key(moved) == settings_key(recipe)


def at(recipe: Recipe, name: str, root: str) -> Recipe:
    """The recipe with other data."""
    data = recipe.data.model_copy(update={"name": name, "root": root})
    return recipe.model_copy(update={"data": data})


@pytest.mark.parametrize("name", ["folder", "wds/photographs", "torch/image_folder"])
def test_runs_on_different_folders_of_photographs_are_different_variants(name, folder):
    recipe = read_run(folder).recipe
    birds, moved, cars = (at(recipe, name, root) for root in ("/a/birds", "/b/birds/", "/a/cars"))
    assert settings_key(birds) == settings_key(moved)
    assert settings_key(birds) != settings_key(cars)


@pytest.mark.parametrize("name", ["tiny_imagenet", "hfds/uoft-cs/cifar10"])
def test_the_folder_of_a_named_data_set_makes_no_other_variant(name, folder):
    recipe = read_run(folder).recipe
    assert settings_key(at(recipe, name, "/a/one")) == settings_key(at(recipe, name, "/b/two"))


def test_means_count_the_finished_runs_if_there_are_any(tmp_path):
    done = leave_run(tmp_path / "ck-seed0", "seed=0")
    half = leave_run(tmp_path / "ck-seed1", "seed=1", top1=TOP1[:2], exports=False)
    both, single = (
        variants_of(read_run(path, unfinished=True) for path in paths)[0]
        for paths in ((done, half), (half,))
    )
    assert [run.name for run in both.counted] == ["ck-seed0"]
    assert [run.name for run in single.counted] == ["ck-seed1"]
