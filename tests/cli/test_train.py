"""`starfire train`: what it takes, and what it says where a run can't start or go on."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from starfire_prune.training import loop
from tests.support.commands import MODULE, Ended, Tool
from tests.support.runs import (
    files_of,
    make_photographs,
    metrics_of,
    small_recipe,
    small_runs,
    train_killed,
    write_recipe,
)

COMMAND = "train"


@pytest.fixture
def tool(tool: Tool) -> Iterator[Tool]:
    """Runs the command with training runs of a second."""
    with small_runs():
        yield tool


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def command(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> Ended:
    """Runs the script in a process of its own."""
    done = subprocess.run(
        [sys.executable, *launcher, *MODULE[1:], COMMAND, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def photographs(root: Path, workers: int) -> tuple[str, str]:
    """The settings of a run on a folder data set."""
    return (
        f"--set=data={{name: folder, root: {root}, image_size: 16, batch_size: 8, "
        f"workers: {workers}}}",
        "--set=model.num_classes=2",
    )


# A run


def test_a_recipe_is_trained_into_the_output_folder(tool, recipe, tmp_path):
    ended = tool(recipe, "--output", tmp_path / "run", "--set", "epochs=3")
    assert (ended.status, ended.stderr) == (0, "")
    assert len(metrics_of(tmp_path / "run")) == 3
    assert "epoch 1/3  loss " in ended.stdout
    assert f"weights: {tmp_path}/run/export/model.safetensors\n" in ended.stdout


def test_without_output_the_folder_is_named_after_the_recipe(tool, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool("small.yaml", "--set=epochs=3").status == 0
    assert len(metrics_of(tmp_path / "runs" / "small")) == 3


def test_an_empty_output_is_refused(tool, recipe):
    ended = tool(recipe, "--output", "")
    assert ended.status == 2
    assert "argument --output: is empty; name a folder or a file" in ended.stderr


def test_every_override_counts(tool, recipe, tmp_path):
    overrides = ("--set", "epochs=2", "--set=pruning.era=[0, 1]", "--set", "lr_schedule={}")
    assert tool(recipe, "--output", tmp_path / "run", *overrides).status == 0
    assert [row["phase"] for row in metrics_of(tmp_path / "run")] == ["era", "fixed"]


def test_an_interrupted_run_goes_on_with_the_same_command(tool, recipe, tmp_path, monkeypatch):
    arguments = (recipe, "--output", tmp_path / "run")
    evaluate, calls = loop.evaluate, []

    def interrupted(*args: Any) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    ended = tool(*arguments)
    assert (ended.status, ended.stderr) == (
        130,
        "starfire train: interrupted; the same command goes on from the last checkpoint\n",
    )
    ended = tool(*arguments, "--resume")
    assert ended.status == 0
    assert f"\nresumed {tmp_path}/run after 2 of 4 epochs\n" in ended.stdout


# A dry run


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tool, recipe, tmp_path):
    ended = tool(recipe, "--output", tmp_path / "runs" / "run", "--dry-run")
    assert (ended.status, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"plan of {tmp_path}/runs/run\n  model      resnet18, ")
    assert "epoch 1/4" not in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_dry_run_starts_no_tracker(tool, recipe, tmp_path):
    pytest.importorskip("tensorboard")
    ended = tool(
        recipe, "--output", tmp_path / "run", "--dry-run", "--set=training.trackers=[tensorboard]"
    )
    assert ended.status == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_an_unfinished_run_leaves_it_byte_for_byte(tool, recipe, tmp_path, capsys):
    run = tmp_path / "run"
    train_killed(small_recipe(tmp_path), run, 2, "within the epoch")
    capsys.readouterr()
    before = files_of(run)
    ended = tool(recipe, "--output", run, "--dry-run")
    assert (ended.status, ended.stderr) == (0, "")
    assert f"\n  start      continues from {run}/checkpoints/epoch-0002\n" in ended.stdout
    assert f"\nresumed {run} after 2 of 4 epochs\n" in ended.stdout
    assert "epoch 3/4" not in ended.stdout
    assert files_of(run) == before


def test_a_dry_run_of_a_finished_run_is_refused_and_leaves_it_byte_for_byte(tool, recipe, tmp_path):
    run = tmp_path / "run"
    assert tool(recipe, "--output", run).status == 0
    before = files_of(run)
    ended = tool(recipe, "--output", run, "--dry-run")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"starfire train: {run} holds a finished run of this recipe: ")
    assert files_of(run) == before


def test_a_run_goes_on_as_its_dry_run_said(tool, recipe, tmp_path, capsys):
    run = tmp_path / "run"
    train_killed(small_recipe(tmp_path), run, 2, "within the epoch")
    capsys.readouterr()
    dry, ended = tool(recipe, "--output", run, "--dry-run"), tool(recipe, "--output", run)
    assert without_free_space(ended.stdout).startswith(without_free_space(dry.stdout))
    assert ended.stdout.endswith(f"picture: {run}/training.png\n")


def without_free_space(printed: str) -> str:
    return re.sub(r"[\d.]+ [GM]B free", "", printed)


# Refusals: the status is 2, and the lines tell what is wrong


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["pruning.amuont=0.7", "pruning.era=[1, 9]"],
            [
                "--set: pruning.amuont: unknown key (got 0.7); did you mean amount?",
                "--set: pruning.era: ends after the run (got [1, 9]); its end is at most epochs = "
                "4",
            ],
        ),
        (
            ["pruning.amount"],
            ["--set: must be KEY=VALUE (got 'pruning.amount'), such as pruning.amount=0.7"],
        ),
        (
            ["pruning.amount=60"],
            [
                "--set: pruning.amount: must be a float above 0 and at most 1 (got 60, an int); "
                "60 % is 0.6"
            ],
        ),
        (
            ["model.num_classes=3"],
            [
                "model.num_classes (=3) must be the number of classes in the data, 10: "
                "correct it, or give other data"
            ],
        ),
        (
            ["model.options={depth: 1}"],
            [
                "resnet18 can't be built with the options {'depth': 1}: ResNet.__init__() got an "
                "unexpected keyword argument 'depth'"
            ],
        ),
        (
            ["training.mixed_precision=fp16"],
            ["training.mixed_precision (=fp16) needs a GPU: on a CPU, set bf16 or no"],
        ),
        (
            ["model.pretrained=/nowhere/model.safetensors"],
            ["model.pretrained: there is no file /nowhere/model.safetensors"],
        ),
        (
            ["training.trackers=[tensorbord]"],
            ["--set: training.trackers.0: must be one of tensorboard, wandb, "],
        ),
        (
            ["optimizer={name: adahessian, lr: 0.1}"],
            ["optimizer.name (=adahessian) can't make a step from gradients only: "],
        ),
        (
            ["pruning.include=[stage*]"],
            ["pruning.include: the pattern 'stage*' matches no convolution"],
        ),
    ],
    ids=lambda value: value[0].partition("=")[0],
)
def test_settings_that_do_not_fit_are_refused(overrides, lines, tool, recipe, tmp_path):
    settings = [f"--set={override}" for override in overrides]
    ended = tool(recipe, "--output", tmp_path / "run", *settings)
    assert (ended.status, ended.stdout) == (2, "")
    got = ended.stderr.removeprefix("starfire train: ").splitlines()
    assert len(got) == len(lines)
    for line, start in zip(got, lines, strict=True):
        assert line.startswith(start)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_refused_with_those_that_are_there(tool, recipe, tmp_path):
    ended = tool(tmp_path / "smal.yaml")
    assert ended == (
        2,
        "",
        f"starfire train: {tmp_path}/smal.yaml: no such file; in that folder: small.yaml\n",
    )


def test_broken_yaml_is_refused_with_its_line(tool, recipe):
    recipe.write_text("model: {name: resnet18\ndata: {}\n")
    ended = tool(recipe)
    assert ended.status == 2
    assert ended.stderr.startswith(f"starfire train: {recipe}: line 2, column 5: not valid YAML: ")
    assert ended.stderr.count("\n") == 1


def test_a_missing_data_root_is_refused_with_its_path(tool, recipe, tmp_path):
    ended = tool(recipe, "--output", tmp_path / "run", *photographs(tmp_path / "nowhere", 0))
    assert ended == (
        2,
        "",
        f"starfire train: root {tmp_path}/nowhere does not exist: give the folder of data set "
        f"'folder'\n",
    )


@pytest.mark.parametrize("left", ["parts", "classes", "nothing"])
def test_a_data_root_without_images_is_refused_with_its_path(left, tool, recipe, tmp_path):
    root = tmp_path / "photographs"
    for part in ("train", "val"):
        folder = {"parts": root / part, "classes": root / part / "ant", "nothing": root}[left]
        folder.mkdir(parents=True, exist_ok=True)
    ended = tool(recipe, "--output", tmp_path / "run", *photographs(root, 0))
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"starfire train: {root}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_corrupt_image_ends_the_run_with_its_path(part, tool, recipe, tmp_path):
    root = make_photographs(tmp_path / "photographs")
    damaged = root / part / "bee" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    ended = tool(recipe, "--output", tmp_path / "run", *photographs(root, 0))
    assert ended.status == 2
    assert ended.stderr == (
        f"starfire train: cannot decode {damaged}: the file is truncated or not an image; replace "
        f"or delete it\n"
    )


def test_resume_without_a_run_is_refused(tool, recipe, tmp_path):
    ended = tool(recipe, "--output", tmp_path / "run", "--resume")
    assert ended == (2, "", f"starfire train: {tmp_path}/run holds no checkpoint to resume from\n")


def test_a_finished_run_is_refused(tool, recipe, tmp_path):
    arguments = (recipe, "--output", tmp_path / "run", "--set=epochs=3")
    assert tool(*arguments).status == 0
    assert tool(*arguments) == (
        2,
        "",
        f"starfire train: {tmp_path}/run holds a finished run of this recipe: choose another "
        f"--output, or delete it\n",
    )


def test_another_recipe_of_the_same_folder_is_refused(tool, recipe, tmp_path):
    arguments = (recipe, "--output", tmp_path / "run", "--set=epochs=3")
    assert tool(*arguments).status == 0
    ended = tool(*arguments, "--set=pruning.amount=0.5")
    assert ended.status == 2
    assert "run of another recipe (pruning.amount: 0.6 there, 0.5 now)" in ended.stderr


def test_a_full_disk_ends_the_run_with_a_sentence(tool, recipe, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    ended = tool(recipe, "--output", tmp_path / "run")
    assert (ended.status, ended.stderr) == (
        2,
        f"starfire train: {tmp_path}/run/checkpoints/epoch-0001 can't be written: No space left on "
        f"device; earlier files are intact: make room and run the same command again\n",
    )


@pytest.mark.parametrize("place", ["run", "run/metrics.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_with_its_path(place, tool, recipe, tmp_path):
    """A file in the place of the run's folder, a folder in the place of one of its files."""
    path = tmp_path / place
    if place == "run":
        path.touch()
    else:
        path.mkdir(parents=True)
    ended = tool(recipe, "--output", tmp_path / "run")
    assert ended.status == 2
    assert ended.stderr.startswith("starfire train: ")
    assert str(path) in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["accelerate", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_the_way_to_install_it(
    missing, tool, recipe, tmp_path, monkeypatch
):
    modules = ("starfire_prune.training", "starfire_prune.plots")
    for name in [*sys.modules]:
        if name == missing or name.startswith((f"{missing}.", *modules)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    ended = tool(recipe, "--output", tmp_path / "run")
    assert ended.status == 2
    assert missing in ended.stderr
    assert ended.stderr.endswith(": pip install 'starfire-prune[train]'\n")
    assert ended.stderr.count("\n") == 1


# In a process of its own


def test_a_command_that_is_refused_prints_no_traceback(recipe):
    ended = command(recipe, "--set=pruning.amuont=0.7")
    assert ended == (
        2,
        "",
        "starfire train: --set: pruning.amuont: unknown key (got 0.7); did you mean amount?\n",
    )


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_corrupt_image_prints_no_traceback_whatever_the_workers(workers, recipe, tmp_path):
    root = make_photographs(tmp_path / "photographs")
    damaged = root / "train" / "bee" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    ended = command(recipe, "--output", tmp_path / "run", *photographs(root, workers))
    assert ended.status == 2
    assert ended.stderr == (
        f"starfire train: cannot decode {damaged}: the file is truncated or not an image; replace "
        f"or delete it\n"
    )


@pytest.mark.slow
def test_accelerate_launches_a_run(recipe, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    ended = command(recipe, "--output", tmp_path / "run", launcher=launcher)
    assert ended.status == 0, ended.stderr
    assert len(metrics_of(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_help_tells_every_option():
    ended = command("--help")
    assert ended.status == 0
    assert all(
        option in ended.stdout
        for option in ("recipe", "--set", "--output", "--resume", "--dry-run")
    )
