"""Training runs: how they train, and what they leave behind."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from starfire_prune.engine.pruner import Pruner
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.runs.folder import RunError
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.training import loop
from starfire_prune.training import setup as preparation
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.loop import evaluate
from starfire_prune.training.train import train
from tests.support.processes import exported, same_exports
from tests.support.runs import (
    few_digits,
    fresh_model,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_killed,
    train_on,
)

EPOCHS = 4
METRICS = [
    "epoch",
    "train_loss",
    "top1",
    "top5",
    "val_loss",
    "lr",
    "phase",
    "target_sparsity",
    "sparsity",
    "sparsity_network",
    "images_per_s",
]


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if weight.ndim == 4}


# The learning rate


def test_every_epoch_trains_with_its_learning_rate(runs, tmp_path):
    rates: list[float] = []

    def note(run: Any, epoch: int) -> dict[str, float]:
        rates.append(run.optimizer.param_groups[0]["lr"])
        return {"train_loss": 0.0, "images_per_s": 1.0}

    runs.setattr(loop, "_train_epoch", note)
    train(
        small_recipe(tmp_path, "lr_schedule={milestones: [2, 3], warmup_epochs: 1}"),
        tmp_path / "run",
    )
    assert rates == pytest.approx([0.025, 0.05, 0.005, 0.0005])
    assert [row["lr"] for row in metrics_of(tmp_path / "run")] == pytest.approx(rates)


def test_layer_wise_rates_of_timm_hold(runs, tmp_path):
    rates: list[list[float]] = []

    def note(run: Any, epoch: int) -> dict[str, float]:
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        return {"train_loss": 0.0, "images_per_s": 1.0}

    runs.setattr(loop, "_train_epoch", note)
    overrides = ("optimizer.options={layer_decay: 0.5}", "lr_schedule={milestones: [2]}")
    train(small_recipe(tmp_path, *overrides), tmp_path / "run")
    assert max(rates[0]) == 0.05
    assert min(rates[0]) < 0.01
    assert rates[3] == pytest.approx([rate / 10 for rate in rates[0]])


# Evaluation


def test_evaluation_equals_a_plain_computation_over_uneven_batches(runs):
    torch.manual_seed(0)
    images, labels = torch.randn(23, 12), torch.randint(0, 7, (23,))
    model = nn.Sequential(nn.Linear(12, 7), nn.Dropout(0.5))
    loader: Any = DataLoader(TensorDataset(images, labels), batch_size=5)
    accelerator = Accelerator(cpu=True)
    result = evaluate(
        model.train(), accelerator.prepare(loader), accelerator, nn.CrossEntropyLoss()
    )
    with torch.no_grad():
        logits = model[0](images)
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    assert result == {
        "top1": pytest.approx(sum(rank < 1 for rank in ranks) / 23),
        "top5": pytest.approx(sum(rank < 5 for rank in ranks) / 23),
        "val_loss": pytest.approx(float(functional.cross_entropy(logits, labels))),
    }


def test_with_fewer_than_five_classes_top5_is_top_of_all(runs):
    loader: Any = DataLoader(TensorDataset(torch.randn(6, 4), torch.zeros(6, dtype=torch.long)), 4)
    result = evaluate(nn.Linear(4, 3), loader, Accelerator(cpu=True), nn.CrossEntropyLoss())
    assert result["top5"] == 1.0


# What a run leaves behind


def test_a_run_leaves_what_train_says(finished):
    names = sorted(str(path.relative_to(finished)) for path in finished.rglob("*"))
    files = ["masks.safetensors", "model.safetensors", "optimizer.pt", "state.json"]
    assert names == sorted(
        [
            "recipe.yaml",
            "environment.json",
            "metrics.jsonl",
            "training.png",
            "checkpoints",
            *(f"checkpoints/epoch-{epoch:04d}" for epoch in (3, 4)),
            *(f"checkpoints/epoch-{epoch:04d}/{file}" for epoch in (3, 4) for file in files),
            "export",
            "export/model.safetensors",
        ]
    )


def test_the_metrics_hold_an_object_an_epoch(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [METRICS] * EPOCHS
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert all(row["images_per_s"] > 0 for row in rows)


def test_the_metrics_follow_the_phases(finished):
    rows = metrics_of(finished)
    assert [row["phase"] for row in rows] == ["dense", "era", "era", "fixed"]
    assert [row["target_sparsity"] for row in rows] == pytest.approx([0.0, 0.3, 0.6, 0.6])
    assert [row["sparsity"] for row in rows] == pytest.approx([0.0, 0.3, 0.6, 0.6], abs=0.03)


def test_the_metrics_of_an_era_in_updates_follow_the_phases(runs, tmp_path):
    recipe = small_recipe(tmp_path, "pruning.era=null", "pruning.era_updates=[5, 9]")
    train(recipe, tmp_path / "run")
    phases = [row["phase"] for row in metrics_of(tmp_path / "run")]
    assert phases == ["dense", "era", "era", "fixed"]  # epochs of four updates
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    assert "era" not in metadata
    assert (metadata["era_updates"], metadata["phase"]) == ([5, 9], "fixed")


def test_a_run_whose_scaler_skips_updates_of_the_era_says_that_it_is_unfinished(
    runs, tmp_path, capsys, monkeypatch
):
    step = Pruner.step
    monkeypatch.setattr(Pruner, "step", lambda own, updated: step(own, own.epoch > 0))
    recipe = small_recipe(tmp_path, "pruning.era=null", "pruning.era_updates=[6, 16]")
    train(recipe, tmp_path / "run")
    assert (
        "the weights are exported as they are, but the pruning is not finished: it is in the phase "
        "era, after 12 updates; of era_updates [6, 16], 6 of its 10 updates are done"
    ) in capsys.readouterr().out
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    assert (metadata["phase"], metadata["finished"]) == ("era", False)


def test_the_metrics_are_those_of_the_exported_model(finished):
    recipe = load_recipe(finished / "recipe.yaml")
    model = fresh_model(recipe)
    model.load_state_dict(exported(finished))
    loader: Any = DataLoader(few_digits("digits", image_size=recipe.data.image_size).val, 5)
    with small_runs():
        result = evaluate(model, loader, Accelerator(cpu=True), nn.CrossEntropyLoss())
    last = metrics_of(finished)[-1]
    assert {key: last[key] for key in result} == pytest.approx(result, rel=1e-5)


def test_the_picture_of_a_run_is_a_png(finished):
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_files_of_a_run_can_be_read_by_whoever_reads_its_folder(finished):
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert any(path.name == "masks.safetensors" for path in files)
    assert {path.stat().st_mode for path in files} == {(finished / "recipe.yaml").stat().st_mode}


# The export


def test_the_export_loads_strictly_into_a_fresh_model(finished):
    model = fresh_model(load_recipe(finished / "recipe.yaml"))
    assert set(exported(finished)) == set(model.state_dict())
    model.load_state_dict(exported(finished), strict=True)


def test_the_exported_weights_are_those_that_were_trained(finished):
    trained = load_file(finished / "checkpoints" / "epoch-0004" / "model.safetensors")
    weights = exported(finished)
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)


def test_every_locale_of_the_export_is_as_sparse_as_asked(finished):
    for name, weight in convolutions(exported(finished)).items():
        out_channels, in_channels = weight.shape[:2]
        gone = ~weight.flatten(2).any(2)
        asked = math.floor(0.6 * out_channels + 0.5)
        assert gone.sum(0).tolist() == [asked] * in_channels, name


def test_the_classifier_of_the_export_is_as_sparse_as_asked(finished):
    weight = exported(finished)["fc.weight"]
    assert int((weight == 0).sum()) == math.floor(0.6 * weight.numel() + 0.5)


def test_pruned_weights_of_the_export_are_positive_zeros(finished):
    for name, weight in exported(finished).items():
        if weight.is_floating_point():
            assert not torch.signbit(weight[weight == 0]).any(), name


def test_the_metadata_of_the_export_tells_method_amounts_and_zeros(finished):
    metadata = read_metadata(finished / "export" / "model.safetensors")
    weights = exported(finished)
    assert {key: metadata[key] for key in ("format_version", "method", "amount", "era")} == {
        "format_version": 1,
        "method": "ck",
        "amount": 0.6,
        "era": [1, 3],
    }
    assert metadata["phase"] == "fixed"
    assert metadata["weights"] == {
        name: {
            "method": "fine" if name == "fc.weight" else "ck",
            "amount": 0.6,
            "zeros": int((weights[name] == 0).sum()),
            "total": weights[name].numel(),
            "free": 0,
        }
        for name in [*convolutions(weights), "fc.weight"]
    }


# Settings


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruning.method=window", "pruning.exact_layer_sparsity=true"],
        ["pruning.method=intra", "pruning.fc={method: block, block_size: [2, 2]}"],
        ["pruning.method=inter"],
        ["pruning.era=[0, 4]", "pruning.schedule=cubic", "pruning.fc=none"],
        ["pruning.era=null", "pruning.era_updates=[6, 14]"],
        ["optimizer={name: adamw, lr: 0.01, filter_bias_and_bn: true}"],
        ["training.clip_grad_norm=0.01", "training.label_smoothing=0.1"],
        ["training.channels_last=true", "training.gradient_accumulation=3"],
        ["training.ema={decay: 0.9}", "training.channels_last=true"],
        ["training.ema={decay: 0.9, warmup: true}", "pruning.method=intra", "pruning.era=[0, 2]"],
        ["training.mixup=0.4", "training.cutmix=1.0", "data.batch_size=9"],
    ],
    ids=lambda overrides: overrides[-1] if "null" in overrides[0] else overrides[0],
)
def test_a_run_ends_as_sparse_as_asked_with(overrides, runs, tmp_path):
    recipe = small_recipe(tmp_path, *overrides)
    train(recipe, tmp_path / "run")
    weights = exported(tmp_path / "run")
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    for name, entry in metadata["weights"].items():
        assert entry["zeros"] == int((weights[name] == 0).sum())
    zeros = sum(entry["zeros"] for entry in metadata["weights"].values())
    total = sum(entry["total"] for entry in metadata["weights"].values())
    assert zeros / total == pytest.approx(0.6, abs=0.02)
    assert metrics_of(tmp_path / "run")[-1]["sparsity"] == zeros / total


def test_dense_training_prunes_nothing(runs, tmp_path):
    train(small_recipe(tmp_path, "pruning=none"), tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["dense"] * EPOCHS
    assert {row["target_sparsity"] for row in rows} == {0.0}
    assert {row["sparsity"] for row in rows} == {0.0}
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    assert (metadata["method"], metadata["weights"]) == (None, {})


def test_before_the_era_a_run_is_the_dense_run(runs, tmp_path):
    for name, pruning in (("dense", "none"), ("pruned", "{method: ck, amount: 0.6, era: [1, 3]}")):
        train_on(small_recipe(tmp_path, f"pruning={pruning}", "epochs=4"), tmp_path / name)
    dense, pruned = metrics_of(tmp_path / "dense"), metrics_of(tmp_path / "pruned")
    assert dense[0] == pruned[0]
    assert dense[1]["train_loss"] != pruned[1]["train_loss"]


def test_the_seed_decides_the_run(runs, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_on(
            small_recipe(tmp_path, f"seed={seed}", "epochs=2", "pruning=none", "lr_schedule={}"),
            tmp_path / name,
        )
    first, same, other = (exported(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_bf16_on_the_cpu_trains_float32_weights(runs, tmp_path):
    types: set[torch.dtype] = set()
    # not 16: oneDNN's gradient of a 3x3 convolution by 2 over a 1x1 image is partly unset in bf16
    recipe = small_recipe(tmp_path, "training.mixed_precision=bf16", "data.image_size=32")
    forward = nn.Conv2d.forward

    def note(module: nn.Conv2d, images: Tensor) -> Tensor:
        outputs = forward(module, images)
        if torch.is_autocast_enabled("cpu"):  # not while the pruner looks which layers are called
            types.add(outputs.dtype)
        return outputs

    runs.setattr(nn.Conv2d, "forward", note)
    train(recipe, tmp_path / "run")
    assert types == {torch.bfloat16}
    assert exported(tmp_path / "run")["conv1.weight"].dtype == torch.float32
    assert metrics_of(tmp_path / "run")[-1]["sparsity"] == pytest.approx(0.6, abs=0.02)


def first_loss_and_step(tmp_path: Path, *overrides: str) -> tuple[float, float]:
    """The first epoch's mean loss, and how far one epoch of one update moves the weights."""
    recipe = small_recipe(
        tmp_path,
        "epochs=1",
        "lr_schedule={}",
        "pruning=none",
        "data.batch_size=56",
        "optimizer={name: momentum, lr: 1.0, momentum: 0.0}",
        *overrides,
    )
    moved: list[Tensor] = []
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    new_process()
    with pytest.MonkeyPatch.context() as patch:

        def create(*args: Any, **options: Any) -> nn.Module:
            model = create_model(*args, **options)
            moved.extend(parameter.detach().clone() for parameter in model.parameters())
            return model

        patch.setattr(preparation, "create_model", create)
        train(recipe, folder)
    model = fresh_model(recipe)
    model.load_state_dict(exported(folder))
    trained = (parameter.detach() for parameter in model.parameters())
    difference = [after - before for after, before in zip(trained, moved, strict=True)]
    norm = float(torch.cat([tensor.flatten() for tensor in difference]).norm())
    return metrics_of(folder)[0]["train_loss"], norm


def test_the_gradient_norm_is_clipped_over_all_weights(runs, tmp_path):
    _, free = first_loss_and_step(tmp_path)
    _, clipped = first_loss_and_step(tmp_path, "training.clip_grad_norm=0.01")
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_is_part_of_the_loss(runs, tmp_path):
    plain, _ = first_loss_and_step(tmp_path)
    smoothed, _ = first_loss_and_step(tmp_path, "training.label_smoothing=0.5")
    assert smoothed != pytest.approx(plain, rel=1e-3)


def test_gradients_of_two_batches_make_the_update_of_one_of_twice_the_size(runs, tmp_path):
    # equal but for the batch normalisation, whose statistics are those of each batch
    runs.setattr(nn.BatchNorm2d, "forward", lambda module, images: images)
    _, whole = first_loss_and_step(tmp_path, "optimizer.lr=1e-3")
    _, halves = first_loss_and_step(
        tmp_path, "optimizer.lr=1e-3", "data.batch_size=28", "training.gradient_accumulation=2"
    )
    assert halves == pytest.approx(whole, rel=1e-3)


def test_channels_last_reaches_model_and_images(runs, tmp_path):
    formats: set[tuple[bool, bool]] = set()
    forward = nn.Conv2d.forward

    def note(module: nn.Conv2d, images: Tensor) -> Tensor:
        if module.training and module.in_channels == 3:
            formats.add(
                tuple(
                    tensor.is_contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]
                    for tensor in (images, module.weight)
                )
            )
        return forward(module, images)

    runs.setattr(nn.Conv2d, "forward", note)
    recipe = small_recipe(tmp_path, "training.channels_last=true")
    train(recipe, tmp_path / "run")
    assert formats == {(True, True)}


# What a run prints


def test_the_last_lines_name_accuracy_weights_and_picture(runs, tmp_path, capsys):
    run = tmp_path / "run"
    train(small_recipe(tmp_path), run)
    top1, weights, picture = capsys.readouterr().out.splitlines()[-3:]
    last = metrics_of(run)[-1]
    assert top1 == f"top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%} after 4 epochs"
    assert weights == f"weights: {run}/export/model.safetensors"
    assert picture == f"picture: {run}/training.png"


def test_the_last_lines_say_why_the_classifier_keeps_its_columns(runs, tmp_path, capsys):
    fc = "pruning.fc={method: dead_inputs}"
    train(small_recipe(tmp_path, "epochs=3", fc), tmp_path / "run")
    line = "fc keeps all its columns: its input comes from an addition in which "
    assert sum(row.startswith(line) for row in capsys.readouterr().out.splitlines()) == 1


def test_what_went_free_is_told_and_in_the_metadata(runs, tmp_path, capsys):
    settings = (
        "epochs=3",
        "pruning.amount=0.9",
        "pruning.prune_dead_inputs=true",
        "optimizer.lr=0.2",
    )
    train(small_recipe(tmp_path, *settings), tmp_path / "run")
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    free = sum(weight["free"] for weight in metadata["weights"].values())
    assert free > 0
    assert f"\ndead inputs: {free:,} of the " in capsys.readouterr().out


# What goes wrong


def test_training_that_diverges_ends_with_the_way_out(runs, tmp_path):
    recipe = small_recipe(tmp_path, "optimizer.lr=1.0e+30", "pruning=none")
    with pytest.raises(
        RunError,
        match=r"^training has diverged: after epoch 0 the loss is nan; lower optimizer\.lr ",
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), "lower data.batch_size (and"),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "a DataLoader worker was killed, usually because memory or /dev/shm ran out: lower",
        ),
    ],
)
def test_a_machine_that_is_too_small_is_told_in_a_sentence(error, message, runs, tmp_path):
    def fail(*args: Any) -> None:
        raise error

    runs.setattr(loop, "_train_epoch", fail)
    with pytest.raises(RunError, match=re.escape(message)):
        train(small_recipe(tmp_path), tmp_path / "run")


def test_other_errors_keep_their_kind(runs, tmp_path):
    def fail(*args: Any) -> None:
        raise RuntimeError("a bug")

    runs.setattr(loop, "_train_epoch", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$") as caught:
        train(small_recipe(tmp_path), tmp_path / "run")
    assert not isinstance(caught.value, RunError)


def test_variables_of_the_launcher_do_not_change_the_recipe(runs, tmp_path):
    train_on(small_recipe(tmp_path), tmp_path / "plain")
    runs.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    runs.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train_on(small_recipe(tmp_path), tmp_path / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")


# Killed


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.ema={decay: 0.7, warmup: true}"],
        ["training.mixup=0.4", "training.cutmix=1.0", "data.batch_size=9"],
        ["pruning.era=null", "pruning.era_updates=[6, 14]"],
        pytest.param(
            [
                "pruning.amount=0.9",
                "pruning.fc={method: dead_inputs}",
                "pruning.prune_dead_inputs=true",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["average", "mixing", "era in updates", "structure and free"],
)
def test_a_killed_run_ends_with_the_same_bits_with(overrides, runs, tmp_path):
    recipe = small_recipe(tmp_path, *overrides)
    train_on(recipe, tmp_path / "whole")
    for epoch in range(1, EPOCHS):
        train_killed(recipe, tmp_path / "broken", epoch, "within the epoch")
    train_on(recipe, tmp_path / "broken")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    assert same_exports(tmp_path / "broken", tmp_path / "whole")


# Mixed images


def test_mixed_images_train_on_shares_of_classes_and_are_evaluated_on_labels(runs, tmp_path):
    targets: list[Tensor] = []
    forward = nn.CrossEntropyLoss.forward

    def note(loss: nn.CrossEntropyLoss, logits: Tensor, target: Tensor) -> Tensor:
        targets.append(target)
        return forward(loss, logits, target)

    runs.setattr(nn.CrossEntropyLoss, "forward", note)
    settings = ("training.mixup=0.4", "data.batch_size=9", "data.eval_batch_size=24", "epochs=3")
    train(small_recipe(tmp_path, *settings), tmp_path / "run")
    epoch = [*[(9, 10)] * 6, (2, 10), (24,)]
    assert [tuple(target.shape) for target in targets] == epoch * 3
    for shares in targets[:7]:
        assert shares.sum(1).tolist() == pytest.approx([1.0] * len(shares))
    mixed = torch.cat(targets[:7])
    assert ((mixed > 0) & (mixed < 1)).any(1).sum() > 20


# Compiled


def test_compiled_models_are_compiled_for_each_shape_by_itself(runs, tmp_path):
    runs.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    accelerator = create_accelerator(small_recipe(tmp_path, "training.compile=true"), tmp_path)
    plugin = accelerator.state.dynamo_plugin
    assert (plugin.backend.value, plugin.dynamic) == ("INDUCTOR", False)


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_ends_with_the_same_bits(runs, tmp_path):
    settings = ("training.compile=true", "data.batch_size=24")
    recipe = small_recipe(tmp_path, *settings)  # batches of 24, 24 and 8
    torch._dynamo.reset()
    train_on(recipe, tmp_path / "whole")
    torch._dynamo.reset()
    train_killed(recipe, tmp_path / "broken", 2, "within the epoch")
    torch._dynamo.reset()
    train_on(recipe, tmp_path / "broken")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    assert same_exports(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_a_compiled_run_trains_and_leaves_what_a_plain_one_does(runs, tmp_path):
    settings = ("training.ema={decay: 0.7}", "data.batch_size=28", "epochs=3")
    train_on(small_recipe(tmp_path, *settings), tmp_path / "plain")
    recipe = small_recipe(tmp_path, *settings, "training.compile=true")
    train_on(recipe, tmp_path / "compiled")
    plain, compiled = exported(tmp_path / "plain"), exported(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    rows = (metrics_of(tmp_path / name) for name in ("plain", "compiled"))
    for one, other in zip(*rows, strict=True):
        assert one["sparsity"] == other["sparsity"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)
    metadata = read_metadata(tmp_path / "compiled" / "export" / "model.safetensors")
    for name, entry in metadata["weights"].items():
        assert entry["zeros"] == int((compiled[name] == 0).sum()) > 0
