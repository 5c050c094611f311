"""The folder of a run: what may begin or go on there, its environment and its metrics."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch

from starfire_prune import Pruner
from starfire_prune.recipe.compare import differing_keys
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.runs import environment
from starfire_prune.runs.environment import check_environment
from starfire_prune.runs.folder import (
    RunError,
    append_metrics,
    check_writable,
    checkpoints_of,
    create_folder,
    existing_part,
    exported_file,
    locked,
    read_metrics,
)
from starfire_prune.runs.resume import begin_folder, checkpoint_to_resume
from starfire_prune.training import train as training
from starfire_prune.training.preflight import check_run
from starfire_prune.training.train import train
from tests.support.paths import ROOT
from tests.support.runs import (
    files_of,
    make_photographs,
    metrics_of,
    small_recipe,
    small_runs,
    train_killed,
    train_on,
    write_recipe,
)

EPOCHS = 4


class Process(NamedTuple):
    """What is read of an accelerator."""

    num_processes: int = 1
    device: torch.device = torch.device("cpu")


PROCESS: Any = Process()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has begun and has two checkpoints."""
    folder = tmp_path / "run"
    begin_folder(folder, small_recipe(tmp_path), PROCESS)
    for name in ("epoch-0001", "epoch-0002"):
        (checkpoints_of(folder) / name).mkdir(parents=True)
    return folder


# Where a run may begin or go on


def test_a_folder_that_is_not_there_begins_a_run(tmp_path):
    assert checkpoint_to_resume(tmp_path / "run", small_recipe(tmp_path)) is None


def test_a_begun_folder_without_checkpoints_begins_anew(tmp_path):
    recipe = small_recipe(tmp_path)
    begin_folder(tmp_path / "run", recipe, PROCESS)
    assert checkpoint_to_resume(tmp_path / "run", recipe) is None


@pytest.mark.parametrize("resume", [False, True])
def test_a_begun_folder_goes_on_from_its_last_checkpoint(resume, begun, tmp_path):
    found = checkpoint_to_resume(begun, small_recipe(tmp_path), resume=resume)
    assert found == begun / "checkpoints" / "epoch-0002"


def test_checkpoints_without_their_recipe_are_refused_by_their_folder(begun, tmp_path):
    (begun / "recipe.yaml").unlink()
    with pytest.raises(RunError) as caught:
        checkpoint_to_resume(begun, small_recipe(tmp_path))
    assert str(caught.value) == (
        f"{begun} holds checkpoints but not the recipe.yaml they belong to: restore it, choose "
        f"another --output, or delete the folder"
    )


def test_the_run_of_another_recipe_is_refused_before_a_finished_one(begun, tmp_path):
    exported_file(begun).parent.mkdir()
    exported_file(begun).touch()
    with pytest.raises(RunError, match=r"another recipe \(seed: 3 there, 4 now\): choose another"):
        checkpoint_to_resume(begun, small_recipe(tmp_path, "seed=4"))


def test_resume_with_nothing_to_resume_is_refused(runs, tmp_path):
    with pytest.raises(RunError, match=r"run holds no checkpoint to resume from$"):
        train(small_recipe(tmp_path), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_refused_and_stays_as_it_is(resume, finished):
    before = files_of(finished)
    with small_runs(), pytest.raises(RunError, match="holds a finished run of this recipe: choose"):
        train(small_recipe(finished.parent), finished, resume=resume)
    assert files_of(finished) == before


# Whether it can be written to


def test_the_existing_part_is_the_nearest_parent_that_is_there(tmp_path):
    assert existing_part(tmp_path / "a" / "b") == tmp_path
    assert existing_part(tmp_path) == tmp_path


def test_the_existing_part_of_a_relative_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert existing_part(Path("runs/small")) == tmp_path


def test_checking_whether_a_folder_can_be_written_makes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [".", "run"])
def test_a_file_in_the_place_of_the_folder_is_refused(below, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as caught:
        check_writable(tmp_path / "file" / below)
    assert str(caught.value) == (
        f"{tmp_path}/file is a file, not a folder for the run: choose another --output"
    )


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RunError) as caught:
        check_writable(tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path} can't be written to: choose another --output, or its permissions"
    )


# The recipe


def test_the_recipe_of_a_run_loads_to_the_recipe_it_trained(finished):
    saved = load_recipe(finished / "recipe.yaml")
    assert differing_keys(saved, load_recipe(finished.parent / "small.yaml")) == {}
    assert "momentum: 0.9" in (finished / "recipe.yaml").read_text()  # defaults written out


def test_a_recipe_kept_in_the_folder_of_its_run_is_left_as_it_is(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    written = write_recipe(run).rename(run / "recipe.yaml")
    text = "# mine\n" + written.read_text()
    written.write_text(text)
    train(load_recipe(written), run)
    assert written.read_text() == text


def test_beginning_writes_recipe_environment_and_empty_metrics(tmp_path):
    recipe = small_recipe(tmp_path)
    begin_folder(tmp_path / "run", recipe, PROCESS)
    files = files_of(tmp_path / "run")
    assert files.keys() == {"recipe.yaml", "environment.json", "metrics.jsonl"}
    assert files["recipe.yaml"].decode() == dump_recipe(recipe)
    assert files["metrics.jsonl"] == b""


def test_going_on_keeps_the_metrics_of_the_epochs_that_are_done_alone(begun, tmp_path):
    for epoch in range(4):
        append_metrics(begun, {"epoch": epoch})
    before = files_of(begun)
    begin_folder(begun, small_recipe(tmp_path), PROCESS, first_epoch=2)
    assert read_metrics(begun) == [{"epoch": 0}, {"epoch": 1}]
    assert {**files_of(begun), "metrics.jsonl": b""} == {**before, "metrics.jsonl": b""}


# Metrics


def test_metrics_are_read_as_they_were_appended(tmp_path):
    rows = [{"epoch": 0, "top1": 0.1, "phase": "dense"}, {"epoch": 1, "top1": 0.2, "phase": "era"}]
    for row in rows:
        append_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == rows


def test_numbers_that_are_not_finite_are_appended_as_null(tmp_path):
    nan, infinity = float("nan"), float("inf")
    append_metrics(tmp_path, {"epoch": 0, "a": nan, "b": -infinity, "c": 1e300})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"epoch": 0, "a": null, "b": null, "c": 1e+300}\n'
    )


def test_a_folder_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_metrics_are_read_in_the_order_of_epochs(tmp_path):
    for epoch in (2, 0, 1):
        append_metrics(tmp_path, {"epoch": epoch})
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_last_line_that_was_cut_short_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}')
    assert read_metrics(tmp_path) == [{"epoch": 0}]


@pytest.mark.parametrize("line", ["not JSON", "3", "{}", '{"epoch": null}'])
def test_damaged_metrics_are_refused_by_their_file(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"epoch": 1}}\n')
    with pytest.raises(RunError) as caught:
        read_metrics(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl is damaged (")
    assert str(caught.value).endswith("): repair or delete it")


def test_the_metrics_of_an_epoch_are_on_the_disk_before_its_checkpoint(runs, tmp_path, monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path.parent.name if path.name == "model.safetensors" else path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    train(small_recipe(tmp_path, "epochs=1", "pruning=none", "lr_schedule={}"), tmp_path / "run")
    assert synced.index("metrics.jsonl") < synced.index(".epoch-0001.tmp")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_in_the_metrics(value, tmp_path):
    append_metrics(tmp_path, {"epoch": 0, "train_loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 0, "train_loss": null}\n'


# The lock


def test_a_folder_that_is_trained_in_is_refused_with_the_process(finished, tmp_path):
    message = rf"^{tmp_path} is being trained in by process {os.getpid()} on .*: wait for"
    with locked(tmp_path), pytest.raises(RunError, match=message), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from starfire_prune.runs.folder import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(RunError, match=rf"by process {process.pid} on "), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_holds_the_lock_of_its_folder_until_it_ends(runs, tmp_path):
    run, held = tmp_path / "run", []
    step = Pruner.step

    def note(pruner: Pruner, updated: bool = True) -> None:
        with pytest.raises(RunError, match="is being trained in"), locked(run):
            pass
        held.append(True)
        step(pruner, updated)

    runs.setattr(Pruner, "step", note)
    train(small_recipe(tmp_path), run)
    assert held
    assert not (run / ".lock").exists()


def test_a_run_elsewhere_of_the_same_recipe_is_not_entered(runs, tmp_path):
    run = tmp_path / "run"
    train_killed(small_recipe(tmp_path), run, 1, "within the epoch")
    before = files_of(run)
    with locked(run), pytest.raises(RunError, match="is being trained in"):
        train_on(small_recipe(tmp_path), run)
    assert files_of(run) == before


def test_a_folder_that_another_run_created_meanwhile_is_refused_with_the_process(runs, tmp_path):
    run = tmp_path / "run"
    other: list[Any] = []

    def while_another_starts(*args: Any) -> None:
        run.mkdir()
        other.append(locked(run))
        other[0].__enter__()
        check_run(*args)

    runs.setattr(training, "check_run", while_another_starts)
    message = rf"^{run} is being trained in by process {os.getpid()} on .*: wait for it, end it, or"
    with pytest.raises(RunError, match=message):
        training.train(small_recipe(tmp_path), run)
    other[0].__exit__(None, None, None)
    assert not list(run.iterdir())


def test_a_link_to_nothing_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "absent")
    with pytest.raises(RunError, match=r"run is not a folder: choose another --output$"):
        create_folder(tmp_path / "run")


def test_a_run_goes_on_with_fewer_workers_and_says_what_differs(runs, tmp_path, capsys):
    run = tmp_path / "run"
    train_killed(small_recipe(tmp_path), run, 1, "within the epoch")
    saved = (run / "recipe.yaml").read_text()
    fewer = small_recipe(tmp_path, "data.workers=1")
    runs.setattr(training, "_train_epochs", lambda run, first: None)
    runs.setattr(training, "_finish", lambda run: None)
    train_on(fewer, run)
    assert (
        "data.workers was 0 and is 1: images are augmented by other random numbers, so that the "
        "run does not repeat the uninterrupted one bit for bit"
    ) in capsys.readouterr().out
    assert (run / "recipe.yaml").read_text() == saved
    environment = json.loads((run / "environment.json").read_text())
    assert environment["resumed"] == [{"epoch": 1, "data.workers": 1}]
    with pytest.raises(RunError, match="holds the run of another recipe"):
        train_on(small_recipe(tmp_path, "data.workers=1", "data.batch_size=4"), run)


def test_a_run_that_begins_again_with_fewer_workers_has_them_in_its_recipe(tmp_path):
    begin_folder(tmp_path / "run", small_recipe(tmp_path), PROCESS)
    begin_folder(tmp_path / "run", fewer := small_recipe(tmp_path, "data.workers=1"), PROCESS)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == fewer


def test_data_may_have_moved_and_trackers_may_differ_on_resuming(runs, tmp_path):
    root = make_photographs(tmp_path / "photographs")
    data = "data={{name: folder, root: {}, image_size: 16, batch_size: 8, workers: 0}}"
    run = tmp_path / "run"
    recipe = small_recipe(tmp_path, data.format(root), "model.num_classes=2")
    train_killed(recipe, run, 1, "within the epoch")
    moved = root.rename(tmp_path / "elsewhere")
    train_on(small_recipe(tmp_path, data.format(moved), "model.num_classes=2"), run)
    assert len(metrics_of(run)) == 4


# The environment


def test_the_environment_tells_what_the_run_depends_on(finished):
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["timm"] == timm.__version__
    assert {name: environment[name] for name in ("seed", "processes", "threads")} == {
        "seed": 3,
        "processes": 1,
        "threads": 1,
    }
    assert {"command", "python", "commit", "device", "cpus"} <= environment.keys()


def test_the_commit_is_that_of_the_packages_own_repository(finished, monkeypatch, tmp_path):
    written = json.loads((finished / "environment.json").read_text())
    if (ROOT / ".git").exists():
        command = ["git", "cat-file", "-e", f"{written['commit']}^{{commit}}"]
        subprocess.run(command, cwd=ROOT, check=True)
    # installed within another project's repository
    package = ROOT / ".installed" / "site-packages" / "starfire_prune" / "runs" / "environment.py"
    monkeypatch.setattr(environment, "__file__", str(package))
    assert environment._commit() is None


def test_the_environment_it_was_begun_in_is_accepted(begun):
    check_environment(begun, PROCESS)


def test_another_number_of_processes_is_refused_with_the_way_to_launch(begun):
    two: Any = Process(num_processes=2)
    with pytest.raises(RunError) as caught:
        check_environment(begun, two)
    assert str(caught.value) == (
        f"{begun} was trained with processes = 1, and now it is 2: a resumed run would not repeat "
        f"the uninterrupted one; start it as before: accelerate launch --num_processes 1"
    )


@pytest.mark.parametrize("content", [None, "", "[]", '{"seed": 3}'])
def test_an_environment_that_cannot_be_read_is_refused_by_its_file(content, begun):
    (begun / "environment.json").unlink()
    if content is not None:
        (begun / "environment.json").write_text(content)
    with pytest.raises(RunError) as caught:
        check_environment(begun, PROCESS)
    assert str(caught.value) == (
        f"{begun}/environment.json of the run can't be read: restore it, or delete {begun} to "
        f"train again"
    )
