"""Trackers: what is refused, what they are started with, and what they get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starfire_prune.runs.folder import RunError
from starfire_prune.training import tracking
from starfire_prune.training.tracking import check_trackers, log_metrics, start_trackers
from starfire_prune.training.train import train
from starfire_prune.utils.settings import RecipeError
from tests.support.runs import small_recipe, small_runs, train_killed, train_on


class Noted:
    """Notes what an accelerator is asked to track."""

    def __init__(self) -> None:
        self.started: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []

    def init_trackers(self, *args: Any, **options: Any) -> None:
        self.started.append((args, options))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))


Charts = dict[str, list[tuple[int, float]]]


@pytest.fixture
def charts_of() -> Callable[[Path], Charts]:
    """Reads steps and values by their tags from a folder of events, as TensorBoard shows them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: Path) -> Charts:
        events = module.EventAccumulator(str(folder), purge_orphaned_data=True)
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    return read


# Refusals


def test_an_installed_tracker_is_accepted(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(("tensorboard",))


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_a_tracker_that_is_not_installed_is_refused_with_its_package(name, package, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(RunError) as caught:
        check_trackers(("tensorboard", name))
    assert str(caught.value) == (
        f"training.trackers: {name} is not installed: pip install {package}, or leave it out"
    )


def test_a_tracker_that_is_not_installed_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with (
        small_runs(),
        pytest.raises(RunError, match=r"^training\.trackers: wandb is not installed"),
    ):
        train(small_recipe(tmp_path, "training.trackers=[wandb]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as caught:
        small_recipe(tmp_path, "training.trackers=[tensorbord]")
    assert str(caught.value).startswith(
        "--set: training.trackers.0: must be one of tensorboard, wandb, comet_ml, "
    )
    assert str(caught.value).endswith("(got 'tensorbord'); did you mean tensorboard?")


# What they are given


def test_without_trackers_nothing_is_started(tmp_path):
    noted: Any = Noted()
    start_trackers(noted, small_recipe(tmp_path), tmp_path / "run")
    assert noted.started == []


def test_trackers_are_named_after_the_folder_and_get_the_recipe_flat(tmp_path):
    noted: Any = Noted()
    recipe = small_recipe(tmp_path, "training.trackers=[tensorboard]")
    start_trackers(noted, recipe, tmp_path / "run")
    ((name,), options) = noted.started[0]
    assert name == "run"
    assert options["config"]["pruning.amount"] == 0.6
    assert options["config"]["pruning.fc.method"] == "fine"
    assert options["config"]["pruning.era"] == "(1, 3)"
    assert {type(value) for value in options["config"].values()} <= {bool, int, float, str}


def test_a_resumed_run_purges_what_came_after_its_checkpoint(tmp_path):
    noted: Any = Noted()
    recipe = small_recipe(tmp_path, "training.trackers=[tensorboard]")
    start_trackers(noted, recipe, tmp_path / "run", first_epoch=2)
    _, options = noted.started[0]
    assert options == {"config": None, "init_kwargs": {"tensorboard": {"purge_step": 2}}}


def test_finite_numbers_are_logged_at_their_epoch():
    noted: Any = Noted()
    nan, infinity = float("nan"), float("inf")
    metrics = {"epoch": 3, "top1": 0.5, "phase": "era", "train_loss": nan, "val_loss": infinity}
    log_metrics(noted, metrics)
    assert noted.logged == [({"epoch": 3, "top1": 0.5}, 3)]


# With TensorBoard


def test_tensorboard_gets_every_epochs_metrics_in_the_runs_folder(charts_of, tmp_path):
    recipe = small_recipe(tmp_path, "training.trackers=[tensorboard]")
    with small_runs():
        train(recipe, tmp_path / "run")
    charts = charts_of(tmp_path / "run" / "logs" / "run")
    sparsity = [0.0, pytest.approx(0.3, abs=0.03), pytest.approx(0.6, abs=0.03)]
    assert charts["sparsity"] == [*enumerate(sparsity), (3, sparsity[2])]
    assert {"top1", "train_loss", "lr"} <= charts.keys()


def test_tensorboard_shows_each_epoch_of_a_resumed_run_once(charts_of, tmp_path):
    recipe = small_recipe(tmp_path, "training.trackers=[tensorboard]")
    with small_runs():
        train_killed(recipe, tmp_path / "run", 2, "before the checkpoint")
        train_on(recipe, tmp_path / "run")
    charts = charts_of(tmp_path / "run" / "logs" / "run")
    assert [step for step, _ in charts["top1"]] == [0, 1, 2, 3]
