"""Runs with a quantization phase: what it trains and writes, how it resumes, what is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import fx, nn

from starfire_prune.cli.main import main
from starfire_prune.data.loaders import build_loader, prepare_loader
from starfire_prune.quantization import check_masks
from starfire_prune.recipe.load import load_recipe
from starfire_prune.reporting.grids import runs_grid
from starfire_prune.reporting.runs import read_run, variants_of
from starfire_prune.runs.data import recipe_datasets
from starfire_prune.runs.folder import (
    RunError,
    checkpoints_of,
    exported_file,
    int8_file,
    metrics_file,
)
from starfire_prune.serialization.pruned import load_masks
from starfire_prune.serialization.quantized import load_quantized
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.learning_rate import recipe_factor
from starfire_prune.training.loop import evaluate
from starfire_prune.training.quantization import check_quantization, float_model
from starfire_prune.training.train import train
from tests.support.processes import same_exports
from tests.support.quantized_training import traced_once
from tests.support.runs import (
    files_of,
    fresh_model,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_killed,
    train_on,
)

pytest.importorskip("torchao")

PHASE = "quantization={epochs: 2, frozen_epochs: 1}"
FIRST, LAST = "epoch-0005", "epoch-0006"


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended with a quantization phase of two epochs."""
    folder = tmp_path_factory.mktemp("quantized")
    with small_runs():
        train(small_recipe(folder, PHASE), folder / "run")
    return folder / "run"


def int8_model(folder: Path) -> fx.GraphModule:
    return load_quantized(int8_file(folder), fresh_model(load_recipe(folder / "recipe.yaml")))


def same_runs(one: Path, other: Path) -> bool:
    files, others = files_of(one), files_of(other)
    for each in (files, others):  # it holds images per second
        each.pop("metrics.jsonl")
        each.pop("environment.json")
    return files == others and metrics_of(one) == metrics_of(other)


# What it trains


def test_the_phase_follows_the_float_epochs_which_are_those_of_a_run_without(quantized, finished):
    rows = metrics_of(quantized)
    assert rows[:4] == metrics_of(finished)
    assert [row["phase"] for row in rows] == ["dense", "era", "era", "fixed"] + 2 * ["quantization"]
    assert [row["lr"] for row in rows[4:]] == pytest.approx([0.0005, 0.0005])
    assert rows[4]["sparsity"] == rows[3]["sparsity"]


def test_the_learning_rate_of_the_phase_can_be_set(tmp_path):
    recipe = small_recipe(tmp_path, "quantization={epochs: 2, lr: 0.02}")
    assert [recipe_factor(recipe, epoch) for epoch in (3, 4, 5)] == pytest.approx([0.1, 0.4, 0.4])


def test_the_phase_moves_the_weights(quantized, finished):
    before, after = (load_file(exported_file(folder)) for folder in (finished, quantized))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if weight.dim() > 1:
            assert not torch.equal(weight, before[name]), name
            assert torch.equal(weight == 0, before[name] == 0), name


def measures_its_int8_file(folder: Path) -> bool:
    """Whether the last metrics of a run are those of its int8 file, in single precision."""
    new_process()
    recipe = load_recipe(folder / "recipe.yaml")
    accelerator = Accelerator(cpu=True)
    loader: Any = build_loader(recipe_datasets(recipe).val, 16, train=False, workers=0)
    loader = prepare_loader(accelerator, loader)
    measured = evaluate(int8_model(folder), loader, accelerator, nn.CrossEntropyLoss())
    last = metrics_of(folder)[-1]
    return measured == {key: last[key] for key in measured}


def test_the_last_metrics_are_those_of_the_int8_file(quantized, runs):
    assert measures_its_int8_file(quantized)


def test_pruned_weights_are_zero_in_the_int8_file(quantized):
    masks = load_masks(exported_file(quantized))
    assert len(masks) == 14
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    given = check_masks(int8_model(quantized), masks)
    assert {name: given[name].pruned for name in masks} == pruned
    own = check_masks(int8_model(quantized))  # small weights that round to zero are among them
    assert all(own[name].pruned >= count > 0 for name, count in pruned.items())


def test_frozen_epochs_change_neither_statistics_nor_ranges(quantized):
    first, last = (
        {
            **load_file(checkpoints_of(quantized) / name / "model.safetensors"),
            **load_file(checkpoints_of(quantized) / name / "quantization.safetensors"),
        }
        for name in (FIRST, LAST)
    )
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert "conv1.weight" in moved
    assert "bn1.weight" in moved
    assert not [name for name in moved if "running" in name or "process" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.mixed_precision=bf16", "data.image_size=32"),
        ("training.channels_last=true",),
        ("training.gradient_accumulation=2", "training.clip_grad_norm=1.0", "training.mixup=0.2"),
        ("pruning=none",),
        ("quantization.reduced_range=true",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_settings_go_along_with_the_phase(overrides, runs, tmp_path):
    recipe = small_recipe(tmp_path, PHASE, *overrides)
    train_killed(recipe, tmp_path / "run", 5, "before the checkpoint")
    train_on(recipe, tmp_path / "run")
    new_process()
    train(recipe, tmp_path / "whole")
    assert same_runs(tmp_path / "run", tmp_path / "whole")
    assert measures_its_int8_file(tmp_path / "run")


def test_the_phase_trains_the_model_without_autocast(runs, tmp_path):
    accelerator = create_accelerator(
        small_recipe(tmp_path, "training.mixed_precision=bf16"), tmp_path / "run"
    )
    layer, images = nn.Linear(8, 4), torch.randn(2, 8)
    wanted = layer(images)
    model = accelerator.prepare(layer)
    assert not torch.equal(model(images), wanted)
    assert torch.equal(float_model(model)(images), wanted)


@pytest.mark.slow
def test_a_phase_that_diverges_is_an_error_that_names_its_learning_rate(runs, tmp_path):
    recipe = small_recipe(tmp_path, "quantization={epochs: 1, lr: 1.0e+30}")
    text = r"^training has diverged in the quantization phase: .* lower quantization.lr \(=1e\+30\)"
    with pytest.raises(RunError, match=text):
        train(recipe, tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 4


# Resumed and forked


def test_a_run_resumed_within_the_phase_equals_an_uninterrupted_one(quantized, runs, tmp_path):
    resumed = Path(shutil.copytree(quantized, tmp_path / "run"))
    shutil.rmtree(resumed / "export")
    shutil.rmtree(checkpoints_of(resumed) / LAST)
    train_on(load_recipe(resumed / "recipe.yaml"), resumed)
    assert same_runs(resumed, quantized)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [3, 4, 5])
@pytest.mark.parametrize("moment", ["within the epoch", "before the checkpoint"])
def test_a_run_killed_at_any_moment_equals_an_uninterrupted_one(
    epoch, moment, quantized, runs, tmp_path
):
    recipe = load_recipe(quantized / "recipe.yaml")
    train_killed(recipe, tmp_path / "run", epoch, moment)
    train_on(recipe, tmp_path / "run")
    assert same_runs(tmp_path / "run", quantized)


@pytest.mark.slow
def test_a_run_forks_all_float_epochs_of_one_with_its_pruning(quantized, finished, runs, tmp_path):
    train(small_recipe(tmp_path, PHASE), tmp_path / "run", fork=finished)
    assert metrics_of(tmp_path / "run") == metrics_of(quantized)
    assert same_exports(tmp_path / "run", quantized)
    assert int8_file(tmp_path / "run").read_bytes() == int8_file(quantized).read_bytes()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["forked"]["epochs"] == 4


# What is refused before the run


def refused_run(processes: int, device: str, recipe: Any) -> Any:
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    return SimpleNamespace(recipe=recipe, accelerator=accelerator)


@pytest.mark.parametrize(
    ("processes", "device", "text"),
    [
        (2, "cpu", r"^quantization \(epochs=2\) is trained by a single process, .* has 2: launch"),
        (1, "cuda", r"^quantization \(epochs=2\) is trained on the CPU only, .* accelerate launch"),
    ],
)
def test_other_devices_and_several_processes_are_refused(processes, device, text, tmp_path):
    with pytest.raises(RunError, match=text):
        check_quantization(refused_run(processes, device, small_recipe(tmp_path, PHASE)))
    check_quantization(refused_run(processes, device, small_recipe(tmp_path)))


def test_a_model_that_cannot_be_trained_for_int8_is_refused(runs, tmp_path):
    text = r"^quantization: model resnet18 can't be trained for int8: the model draws random .*"
    with pytest.raises(RunError, match=rf"{text}drop_path_rate=0; or remove quantization$"):
        train(small_recipe(tmp_path, PHASE, "model.options.drop_path_rate=0.1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_torchao_is_refused_with_the_extra_that_installs_it(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'starfire-prune\[quantize\]'$"):
        train(small_recipe(tmp_path, PHASE), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_names_the_phase(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("starfire_prune.training.preflight.check_quantization", lambda run: None)
    train(small_recipe(tmp_path, PHASE), tmp_path / "run", dry_run=True)
    line = "int8       trained in epochs 4 to 5, learning rate 0.0005, in float32\n"
    assert line in capsys.readouterr().out


# What the commands make of it


@pytest.fixture
def copied(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "run"))


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_quantize_measures_the_int8_model_that_was_trained(copied, runs, capsys):
    before = int8_file(copied).read_bytes()
    status, out, err = ended(capsys, "quantize", copied)
    assert (status, err) == (0, "")
    assert f", {metrics_of(copied)[-1]['top1']:.2%} in int8 (24 images)\n" in out
    assert f"{int8_file(copied)}: {len(before):,} bytes\n" in out
    assert int8_file(copied).read_bytes() == before


def test_quantize_writes_the_trained_model_to_another_file(copied, runs, capsys, tmp_path):
    output = tmp_path / "small.safetensors"
    assert ended(capsys, "quantize", copied, "--output", output, "--compressed")[0] == 0
    images = torch.randn(2, 3, 16, 16)
    loaded = load_quantized(output, fresh_model(load_recipe(copied / "recipe.yaml")))
    assert torch.equal(loaded(images), int8_model(copied)(images))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--images", "8"), "--images has no effect: {run} has trained its quantization"),
        (("--reduced-range",), "--reduced-range has no effect: {run} has trained its quantiz"),
        (("--force",), "--force needs --output FILE: {run}/export/int8.safetensors is what"),
        (("--set", "quantization=null"), "--set quantization has no effect: the run is trained"),
    ],
)
def test_quantize_refuses_what_has_no_effect_on_a_trained_quantization(
    options, text, quantized, runs, capsys
):
    status, _, err = ended(capsys, "quantize", quantized, *options)
    assert status == 2
    assert err.startswith(f"starfire quantize: {text.format(run=quantized)}")


def test_evaluate_says_that_it_measures_the_float_weights(copied, runs, capsys):
    out = ended(capsys, "evaluate", copied, "--limit", 8)[1]
    line = f"these are the float weights; for those of {int8_file(copied)}: starfire quantize"
    assert line in out
    rows = [{**row, "top1": 0.99} for row in metrics_of(copied)]
    metrics_file(copied).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the run itself ended" not in ended(capsys, "evaluate", copied)[1]


def test_the_report_has_the_accuracies_before_and_in_int8(quantized):
    run = read_run(quantized)
    rows = metrics_of(quantized)
    assert run.numbers.float_top1 == pytest.approx(100 * rows[3]["top1"])
    assert run.numbers.last_top1 == pytest.approx(100 * rows[5]["top1"])
    grid = runs_grid(variants_of([run]))
    assert grid.rows[0][grid.header.index("top-1 before int8 [%]")] == (
        f"{run.numbers.float_top1:.2f}"
    )
