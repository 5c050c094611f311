"""The plan of a run: what it tells, what it refuses, and that it leaves the run as it was."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from starfire_prune.data import DataError
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.checkpoint import save_checkpoint
from starfire_prune.runs.folder import RunError, checkpoints_of
from starfire_prune.training import train as training
from starfire_prune.training.disk_space import checkpoint_bytes
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.plan import plan_text
from starfire_prune.training.preflight import check_run
from starfire_prune.training.setup import Run, prepare_run
from starfire_prune.training.train import train
from tests.support.processes import same_exports
from tests.support.runs import files_of, make_photographs, new_process, small_recipe, train_on

SMALL_PLAN = """\
plan of {folder}
  model      resnet18, 25,354 parameters, 10 classes
  data       digits: 56 images for training, 24 for evaluation, 16x16
  batch      16 images per update: batch_size 16 x processes 1 x gradient_accumulation 1; 4 \
updates per epoch, 4 epochs
  optimizer  sgd, learning rate 0.05 from epoch 0, 0.005 from epoch 2
  start      from random weights, seed 3
  pruning    ck to 60.0%, linear, era [1, 3]: updates 5 to 12 of 16
  memory     0.0 MB of masks per process
  disk       about 0.2 MB per checkpoint, the last 2 are kept; 0.1 MB exported; 5.00 GB free

layer                  shape      method  target  scopes  of units
---------------------  ---------  ------  ------  ------  --------
conv1                  64x3x7x7   ck       60.0%       3        64
layer1.0.conv1         8x64x3x3   ck       60.0%      64         8
layer1.0.conv2         8x8x3x3    ck       60.0%       8         8
layer1.0.downsample.0  8x64x1x1   ck       60.0%      64         8
layer2.0.conv1         8x8x3x3    ck       60.0%       8         8
layer2.0.conv2         8x8x3x3    ck       60.0%       8         8
layer2.0.downsample.0  8x8x1x1    ck       60.0%       8         8
layer3.0.conv1         16x8x3x3   ck       60.0%       8        16
layer3.0.conv2         16x16x3x3  ck       60.0%      16        16
layer3.0.downsample.0  16x8x1x1   ck       60.0%       8        16
layer4.0.conv1         16x16x3x3  ck       60.0%      16        16
layer4.0.conv2         16x16x3x3  ck       60.0%      16        16
layer4.0.downsample.0  16x16x1x1  ck       60.0%      16        16
fc                     10x16      fine     60.0%       1       160
"""
# Large enough for the weights to outweigh what each file holds beside them
WIDE = "model.options={layers: [1, 1, 1, 1], channels: [32, 32, 64, 64]}"


class Usage(NamedTuple):
    """Of a disk, in bytes."""

    total: int
    used: int
    free: int


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how much is free on every disk."""

    def leave(free_bytes: float) -> None:
        usage = Usage(10**10, 0, int(free_bytes))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return leave


def prepared(recipe: Recipe, folder: Path, *, fresh: bool = True) -> Run:
    """A run in a new process, before its plan."""
    new_process()
    return prepare_run(recipe, folder, create_accelerator(recipe, folder), fresh=fresh)


def lines_of(run: Run, checkpoint: Path | None = None) -> dict[str, str]:
    """The plan's lines by their headings."""
    lines = plan_text(run, checkpoint).split("\n\n")[0].splitlines()[1:]
    return {line[:11].strip(): line[13:] for line in lines}


def photographs(root: Path) -> tuple[str, ...]:
    data = f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 0}}"
    return (data, "model.num_classes=2")


# The text


def test_the_plan_of_the_small_recipe(runs, disk, tmp_path):
    disk(5e9)
    run = prepared(small_recipe(tmp_path), tmp_path / "run")
    assert plan_text(run) == SMALL_PLAN.format(folder=tmp_path / "run")


def test_a_run_prints_its_plan_first(runs, tmp_path, capsys, disk):
    disk(5e9)
    train(small_recipe(tmp_path), tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.startswith(SMALL_PLAN.format(folder=tmp_path / "run") + "\nepoch 1/4  loss ")


def test_a_dry_run_prints_the_plan_alone_and_makes_no_folder(runs, tmp_path, capsys, disk):
    disk(5e9)
    train(small_recipe(tmp_path), tmp_path / "run", dry_run=True)
    assert capsys.readouterr().out == SMALL_PLAN.format(folder=tmp_path / "run") + "\n"
    assert not (tmp_path / "run").exists()


def test_the_plan_of_dense_training_has_no_layers(runs, tmp_path):
    run = prepared(small_recipe(tmp_path, "pruning=none"), tmp_path / "run")
    assert lines_of(run)["pruning"] == "none: dense training"
    assert lines_of(run)["memory"] == "0.0 MB of masks per process"
    assert "layer" not in plan_text(run)


def test_the_plan_tells_the_era_in_updates_that_accumulate(runs, tmp_path):
    recipe = small_recipe(tmp_path, "training.gradient_accumulation=3")
    lines = lines_of(prepared(recipe, tmp_path / "run"))
    assert lines["batch"] == (
        "48 images per update: batch_size 16 x processes 1 x gradient_accumulation 3; 2 updates "
        "per epoch, 4 epochs"
    )
    assert lines["pruning"] == "ck to 60.0%, linear, era [1, 3]: updates 3 to 6 of 8"


IN_UPDATES = ("pruning.era=null", "pruning.era_updates=[6, 15]")


def test_the_plan_gives_the_epochs_of_an_era_in_updates(runs, tmp_path):
    run = prepared(small_recipe(tmp_path, *IN_UPDATES), tmp_path / "run")
    expected = "ck to 60.0%, linear, updates 7 to 15 of 16: epochs 1 to 3"
    assert lines_of(run)["pruning"] == expected
    check_run(run)


def test_an_era_in_updates_that_ends_after_the_run_is_refused(runs, tmp_path):
    recipe = small_recipe(tmp_path, "pruning.era=null", "pruning.era_updates=[6, 17]")
    message = (
        "pruning.era_updates (=[6, 17]) ends after the run, which has 16 updates, 4 in each of its "
        "4 epochs: lower its end to 16 or less, or train more epochs"
    )
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        check_run(prepared(recipe, tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["lr_schedule={}"], "0.05 from epoch 0"),
        (
            ["lr_schedule={milestones: [3], warmup_epochs: 2}"],
            "0.01667 from epoch 0, 0.03333 from epoch 1, 0.05 from epoch 2, 0.005 from epoch 3",
        ),
        (
            ["lr_schedule={name: cosine}", "epochs=10"],
            "0.05 from epoch 0, 0.04878 from epoch 1, 0.04523 from epoch 2, …, "
            "0.001224 from epoch 9",
        ),
    ],
    ids=["constant", "warmup", "cosine"],
)
def test_the_plan_tells_the_rates_and_shortens_many(overrides, rates, runs, tmp_path):
    run = prepared(small_recipe(tmp_path, *overrides), tmp_path / "run")
    assert lines_of(run)["optimizer"] == f"sgd, learning rate {rates}"


def test_the_plan_tells_each_layers_method_and_target(runs, tmp_path):
    recipe = small_recipe(
        tmp_path,
        "pruning.fc={method: block, amount: 0.5}",
        "pruning.exclude=[conv1]",
        "pruning.overrides=[{layers: layer4.0.conv2, method: window, amount: 0.8}]",
    )
    table = plan_text(prepared(recipe, tmp_path / "run")).split("\n\n")[1].splitlines()[2:]
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert "conv1" not in rows
    assert rows["layer4.0.conv1"] == ["16x16x3x3", "ck", "60.0%", "16", "16"]
    assert rows["layer4.0.conv2"] == ["16x16x3x3", "window", "80.0%", "256", "9"]
    assert rows["fc"] == ["10x16", "block", "[4,", "4]", "50.0%", "1", "12"]


def test_the_plan_of_a_pretrained_start_names_its_file(runs, tmp_path):
    train(small_recipe(tmp_path, "epochs=3"), tmp_path / "first")
    file = tmp_path / "first" / "export" / "model.safetensors"
    run = prepared(small_recipe(tmp_path, f"model.pretrained={file}"), tmp_path / "run")
    assert lines_of(run)["start"] == f"from {file}"


def test_the_plan_of_a_pretrained_start_tells_what_is_new(runs, tmp_path):
    train(small_recipe(tmp_path, "epochs=3"), tmp_path / "first")
    file = tmp_path / "first" / "export" / "model.safetensors"
    settings = photographs(make_photographs(tmp_path / "photographs"))
    recipe = small_recipe(tmp_path, *settings, f"model.pretrained={file}")
    run = prepared(recipe, tmp_path / "run")
    assert lines_of(run)["start"] == f"from {file}; new: fc.weight, fc.bias"


def test_the_plan_of_a_resumed_run_names_its_checkpoint(runs, tmp_path):
    recipe = small_recipe(tmp_path, "model.pretrained=gone.safetensors")
    run = prepared(recipe, tmp_path / "run", fresh=False)
    assert lines_of(run, Path("epoch-0002"))["start"] == "continues from epoch-0002"


def test_an_average_has_masks_of_its_own(runs, tmp_path):
    plain = prepared(small_recipe(tmp_path, WIDE), tmp_path / "run")
    assert lines_of(plain)["memory"] == "0.2 MB of masks per process"
    averaged = prepared(small_recipe(tmp_path, WIDE, "training.ema={}"), tmp_path / "run")
    assert lines_of(averaged)["memory"] == "0.4 MB of masks per process"


def test_the_plan_shows_what_is_left_out_and_not_counted(runs, tmp_path):
    options = "{img_size: 16, embed_dim: 12, depth: 1, num_heads: 3, patch_size: 8}"
    model = f"{{name: vit_tiny_patch16_224, num_classes: 10, options: {options}}}"
    run = prepared(
        small_recipe(tmp_path, f"model={model}", "pruning.overrides=[]"), tmp_path / "run"
    )
    assert run.pruner is not None
    run.pruner.left_out["blocks.0.attn.qkv"] = "its weight is frozen"
    text = plan_text(run)
    assert lines_of(run)["sparsity"] == (
        "of all convolution and linear weights, without 60 weights of VisionTransformer (pos_embed)"
    )
    assert text.splitlines()[-1].split("  ")[0] == "blocks.0.attn.qkv"
    assert text.endswith("  none: its weight is frozen\n")


# The size of checkpoints


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("optimizer", ["{name: sgd, lr: 0.05}", "{name: adam, lr: 0.01}"])
def test_the_estimate_of_a_checkpoint_is_close_to_what_it_takes(optimizer, ema, runs, tmp_path):
    settings = (WIDE, f"optimizer={optimizer}", *(["training.ema={}"] if ema else []))
    recipe = small_recipe(tmp_path, *settings, "epochs=1", "lr_schedule={}", "pruning.era=[0, 1]")
    estimate = checkpoint_bytes(prepared(recipe, tmp_path / "run"))
    train_on(recipe, tmp_path / "run")
    files = files_of(tmp_path / "run" / "checkpoints" / "epoch-0001")
    assert estimate == pytest.approx(sum(map(len, files.values())), rel=0.1)


# What it refuses


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_first_image_is_named(part, runs, tmp_path):
    root = make_photographs(tmp_path / "photographs")
    damaged = root / part / "ant" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(DataError, match=f"^cannot decode {damaged}: the file is truncated"):
        train(small_recipe(tmp_path, *photographs(root)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_image_size_is_refused(runs, tmp_path):
    options = "{img_size: 32, embed_dim: 12, depth: 1}"
    model = f"{{name: vit_tiny_patch16_224, num_classes: 10, options: {options}}}"
    recipe = small_recipe(tmp_path, f"model={model}", "pruning=none")
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "run")
    assert str(caught.value).startswith(
        "model vit_tiny_patch16_224 does not accept images of data.image_size (=16): Input height"
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_classifier_is_refused(runs, tmp_path):
    name = "test_vit"
    model = f"{{name: {name}, num_classes: 10, options: {{global_pool: ''}}}}"
    with pytest.raises(RunError) as caught:
        train(small_recipe(tmp_path, f"model={model}", "pruning=none"), tmp_path / "run")
    assert str(caught.value) == (
        f"model {name} does not return 10 numbers per image: it must be a classifier; correct "
        f"model.name or model.options"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_compiler_is_refused_with_the_way_out(runs, tmp_path, monkeypatch):
    def compiles_nothing(function: object) -> Callable[..., object]:
        def fail(*args: object) -> object:
            raise RuntimeError("no C++ compiler\nof these: g++, clang")

        return fail

    run = prepared(small_recipe(tmp_path, "training.compile=true"), tmp_path / "run")
    monkeypatch.setattr(torch, "compile", compiles_nothing)
    with pytest.raises(RunError) as caught:
        check_run(run)
    assert str(caught.value) == (
        "training.compile (=true) does not work here: no C++ compiler; install a C++ compiler "
        "(GPUs: Triton), or set it to false"
    )


def test_without_compiling_no_compiler_is_looked_for(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    check_run(prepared(small_recipe(tmp_path), tmp_path / "run"))


@pytest.mark.parametrize("settings", [("data.batch_size=1",), ()])
def test_batch_norms_that_would_see_a_single_value_are_refused(settings, runs, tmp_path):
    root = make_photographs(tmp_path / "photographs", train=14 if settings else 1)
    if not settings:
        shutil.rmtree(root / "train" / "bee")
        shutil.rmtree(root / "val" / "bee")
    data = f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 0}}"
    classes = 2 if settings else 1
    recipe = small_recipe(tmp_path, data, f"model.num_classes={classes}", *settings)
    size = 1 if settings else 8
    message = (
        rf"^model resnet18 can't train on batches of 1: .*; raise data\.batch_size \(={size}\)"
    )
    with pytest.raises(RunError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_accumulation_than_an_epoch_has_batches_is_refused(runs, tmp_path):
    recipe = small_recipe(tmp_path, "training.gradient_accumulation=5")
    with pytest.raises(
        RunError,
        match=r"^training\.gradient_accumulation \(=5\) must be at most the 4 batches",
    ):
        train(recipe, tmp_path / "run")


def test_an_optimizer_that_needs_second_derivatives_is_refused(runs, tmp_path):
    recipe = small_recipe(tmp_path, "optimizer={name: adahessian, lr: 0.1}")
    with pytest.raises(RunError, match=r"^optimizer\.name \(=adahessian\) can't make a step from "):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_full_is_refused_with_what_is_needed(runs, disk, tmp_path):
    disk(1.5e6)
    with pytest.raises(RunError) as caught:
        train(small_recipe(tmp_path, WIDE), tmp_path / "runs" / "run")
    assert str(caught.value) == (
        f"{tmp_path} has 1.5 MB free, and the run needs about 6.1 MB for its checkpoints and "
        f"export: make room, or choose another --output"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("there", "more"), [(0, 3), (1, 2), (2, 1)])
def test_room_is_needed_for_the_checkpoints_to_come_and_the_export(
    there, more, runs, disk, tmp_path
):
    run = prepared(small_recipe(tmp_path), tmp_path / "run")
    for epoch in range(1, there + 1):
        (checkpoints_of(run.folder) / f"epoch-{epoch:04d}").mkdir(parents=True)
    exported = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    need = more * checkpoint_bytes(run) + exported
    disk(need)
    check_run(run)
    disk(need - 1)
    with pytest.raises(RunError, match="needs about"):
        check_run(run)


# What it leaves alone


def test_checking_leaves_the_model_and_its_mode_as_they_were(runs, tmp_path):
    run = prepared(small_recipe(tmp_path, "training.ema={}"), tmp_path / "run")
    model: Any = run.model
    before, optimizer = copy.deepcopy(model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    check_run(run)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert run.optimizer.state_dict() == optimizer
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_checking_changes_nothing_of_the_run(runs, tmp_path):
    """With random crops and dropout, which draw what follows from the generators' states."""
    root = make_photographs(tmp_path / "photographs")
    recipe = small_recipe(tmp_path, *photographs(root), "model.options.drop_rate=0.3", "epochs=3")
    train_on(recipe, tmp_path / "checked")
    runs.setattr(training, "check_run", lambda run: None)
    runs.setattr(training, "plan_text", lambda run, checkpoint: "")
    train_on(recipe, tmp_path / "unchecked")
    assert same_exports(tmp_path / "checked", tmp_path / "unchecked")


def test_planning_leaves_a_begun_folder_byte_for_byte(runs, tmp_path):
    run = prepared(small_recipe(tmp_path), tmp_path / "run")
    save_checkpoint(checkpoints_of(run.folder), 1, nn.Linear(2, 2), run.optimizer)
    before = files_of(tmp_path / "run")
    check_run(run)
    plan_text(run, checkpoints_of(run.folder) / "epoch-0001")
    assert files_of(tmp_path / "run") == before
