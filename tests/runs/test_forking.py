"""Runs that take over the dense epochs of another one end as if they had trained them."""

import json
import shutil
from pathlib import Path

import pytest

from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import RunError, checkpoints_of, exported_file
from starfire_prune.training.train import train
from starfire_prune.utils.errors import CheckpointError
from tests.runs.test_checkpoint import resigned
from tests.support.processes import same_exports
from tests.support.runs import (
    files_of,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_killed,
)

KEEP = "training.keep_checkpoints=[1]"
DENSE = ("pruning=none", KEEP)
AVERAGED = "training={threads: 1, keep_checkpoints: [1], ema: {decay: 0.9}}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense run that has kept the checkpoint of its first epoch."""
    folder = tmp_path_factory.mktemp("dense")
    with small_runs():
        train(small_recipe(folder, *DENSE), folder / "run")
    return folder / "run"


def train_fork(recipe: Recipe, folder: Path, source: Path) -> None:
    new_process()
    train(recipe, folder, fork=source)


@pytest.mark.parametrize(
    "overrides", [(), ("pruning.method=window", "pruning.era=[2, 3]")], ids=["ck", "window later"]
)
def test_a_forked_run_ends_with_the_bits_of_one_that_trained_from_nothing(
    overrides, dense, runs, tmp_path
):
    recipe = small_recipe(tmp_path, *overrides)
    train_fork(recipe, tmp_path / "forked", dense)
    new_process()
    train(recipe, tmp_path / "whole")
    assert metrics_of(tmp_path / "forked") == metrics_of(tmp_path / "whole")
    assert same_exports(tmp_path / "forked", tmp_path / "whole")


def test_a_run_and_its_average_fork_from_one_that_prunes_later_on(runs, tmp_path):
    train(small_recipe(tmp_path, AVERAGED), tmp_path / "ck")
    recipe = small_recipe(tmp_path, AVERAGED, "pruning.amount=0.8")
    train_fork(recipe, tmp_path / "forked", tmp_path / "ck")
    new_process()
    train(recipe, tmp_path / "whole")
    assert same_exports(tmp_path / "forked", tmp_path / "whole")


def test_the_kept_checkpoint_stays_beside_the_last_two(dense):
    kept = [path.name for path in sorted(checkpoints_of(dense).iterdir())]
    assert kept == ["epoch-0001", "epoch-0003", "epoch-0004"]


def test_a_forked_run_trains_from_the_forked_epoch_on_and_says_so(dense, runs, tmp_path, capsys):
    train_fork(small_recipe(tmp_path), tmp_path / "forked", dense)
    shown = capsys.readouterr().out
    assert f"continues from {checkpoints_of(dense) / 'epoch-0001'}" in shown
    assert f"forked {dense} for {tmp_path / 'forked'} after 1 of 4 epochs" in shown
    environment = json.loads((tmp_path / "forked" / "environment.json").read_text())
    source = json.loads((dense / "environment.json").read_text())
    kept = {key: source[key] for key in ("commit", "packages", "device")}
    assert environment["forked"] == {"run": "run", "epochs": 1, **kept}


def test_the_forked_run_is_left_as_it_was(dense, runs, tmp_path):
    before = files_of(dense)
    train_fork(small_recipe(tmp_path), tmp_path / "forked", dense)
    assert files_of(dense) == before


def test_a_forked_run_that_was_killed_goes_on_from_its_own_checkpoint(dense, runs, tmp_path):
    recipe = small_recipe(tmp_path)
    train_killed(recipe, tmp_path / "killed", 2, "within the epoch", fork=dense)
    assert metrics_of(tmp_path / "killed")[-1]["phase"] == "era"
    train_fork(recipe, tmp_path / "killed", tmp_path / "gone")
    train_fork(recipe, tmp_path / "unbroken", dense)
    assert same_exports(tmp_path / "killed", tmp_path / "unbroken")


def test_a_forked_run_that_was_killed_before_its_first_checkpoint_forks_again(
    dense, runs, tmp_path
):
    recipe = small_recipe(tmp_path)
    train_killed(recipe, tmp_path / "killed", 1, "before the checkpoint", fork=dense)
    train_fork(recipe, tmp_path / "killed", dense)
    assert exported_file(tmp_path / "killed").is_file()
    assert [row["epoch"] for row in metrics_of(tmp_path / "killed")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optimizer.lr=0.1",),
            r"differently from this recipe \(optimizer.lr: 0.05 there, ",
        ),
        (("pruning.era=[0, 2]",), "has no effect: this recipe or that run prunes from epoch 0 on"),
        (
            ("pruning.era=null", "pruning.era_updates=[8, 12]"),
            "can't be used with pruning.era_updates, which doesn't say how many epochs are dense",
        ),
    ],
)
def test_a_run_that_shares_no_epochs_is_refused(overrides, message, runs, tmp_path):
    train(small_recipe(tmp_path, *DENSE), tmp_path / "dense")
    with pytest.raises(RunError, match=message):
        train_fork(small_recipe(tmp_path, *overrides), tmp_path / "run", tmp_path / "dense")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_of_its_dense_epochs_is_refused(dense, runs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    shutil.rmtree(checkpoints_of(source) / "epoch-0001")
    message = (
        r"has kept no checkpoint of the 1 epochs that both train alike: train it with "
        r"training.keep_checkpoints=\[1\], or leave out --fork"
    )
    with pytest.raises(RunError, match=message):
        train_fork(small_recipe(tmp_path), tmp_path / "run", source)


def test_a_folder_that_is_no_run_is_refused(runs, tmp_path):
    message = (
        r"--fork .*nothing is not a run's folder: it holds no recipe.yaml; train that run first"
    )
    with pytest.raises(RunError, match=message):
        train_fork(small_recipe(tmp_path), tmp_path / "run", tmp_path / "nothing")


def test_a_run_of_other_threads_is_refused(dense, runs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    environment = json.loads((source / "environment.json").read_text()) | {"threads": 7}
    (source / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(RunError, match="was trained with threads = 7, and now it is 1"):
        train_fork(small_recipe(tmp_path), tmp_path / "run", source)


def test_a_run_whose_metrics_are_lost_is_refused_before_anything_is_written(dense, runs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    (source / "metrics.jsonl").unlink()
    message = r"source.metrics.jsonl lacks lines of the first 1 epochs: restore it, or train"
    with pytest.raises(RunError, match=message):
        train_fork(small_recipe(tmp_path), tmp_path / "run", source)
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


@pytest.mark.parametrize(
    ("state", "problem", "signed"),
    [
        ({"pruner": {}}, "does not list masks", True),
        ({"epoch": 4}, "it belongs to epoch 4, unlike its folder's name", True),
        ({"epoch": 4}, "its contents are not those that were saved", False),
    ],
)
def test_a_forged_checkpoint_is_refused_with_another_way_out(
    state, problem, signed, dense, runs, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    path = checkpoints_of(source) / "epoch-0001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | state))
    if signed:
        resigned(path.parent)
    with pytest.raises(CheckpointError, match=f"state.json can't be loaded: .*{problem}.*fork an"):
        train_fork(small_recipe(tmp_path), tmp_path / "run", source)
