"""Training runs: what they leave behind, and what they refuse."""

import json
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from starfire_prune import preparation, run_folder, training
from starfire_prune.checkpoint import read_metadata
from starfire_prune.models import create_model
from starfire_prune.recipe import Recipe, differing_keys, load_recipe
from starfire_prune.training import RunError, evaluate, train
from tests.processes import exported, launch, output_of
from tests.runs import (
    few_digits,
    files_of,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_on,
    write_recipe,
)

ROOT = Path(__file__).parent.parent
EPOCHS = 4
METRICS = [
    "epoch",
    "train_loss",
    "top1",
    "top5",
    "val_loss",
    "lr",
    "phase",
    "threshold",
    "sparsity",
    "sparsity_network",
    "images_per_s",
    "pruner_cpu_share",
]


@pytest.fixture
def runs() -> Iterator[pytest.MonkeyPatch]:
    """Runs of a second; a patch of what a test wants else."""
    with small_runs() as patch:
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with `recipe.yaml` beside it as `small.yaml`."""
    folder = tmp_path_factory.mktemp("finished")
    with small_runs(plot=True):
        train(small_recipe(folder), folder / "run")
    return folder / "run"


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if weight.ndim == 4}


# The learning rate


def test_every_epoch_trains_with_its_learning_rate(runs, tmp_path):
    rates: list[float] = []

    def note(run: Any, epoch: int) -> dict[str, float]:
        rates.append(run.optimizer.param_groups[0]["lr"])
        return {"train_loss": 0.0, "images_per_s": 1.0, "pruner_cpu_share": 0.0}

    runs.setattr(training, "_train_epoch", note)
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
        return {"train_loss": 0.0, "images_per_s": 1.0, "pruner_cpu_share": 0.0}

    runs.setattr(training, "_train_epoch", note)
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


def test_the_recipe_of_a_run_loads_to_the_recipe_it_trained(finished):
    saved = load_recipe(finished / "recipe.yaml")
    assert differing_keys(saved, load_recipe(finished.parent / "small.yaml")) == {}
    assert "momentum: 0.9" in (finished / "recipe.yaml").read_text()  # defaults written out


def test_the_metrics_hold_an_object_an_epoch(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [METRICS] * EPOCHS
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert all(row["images_per_s"] > 0 for row in rows)


def test_the_metrics_follow_the_phases(finished):
    rows = metrics_of(finished)
    assert [row["phase"] for row in rows] == ["dense", "era", "era", "fixed"]
    assert [row["threshold"] for row in rows] == pytest.approx([0.0, 0.3, 0.6, 0.6])
    assert [row["sparsity"] for row in rows] == pytest.approx([0.0, 0.3, 0.6, 0.6], abs=0.03)


def test_the_metrics_are_those_of_the_exported_model(finished):
    recipe = load_recipe(finished / "recipe.yaml")
    model = fresh_model(recipe)
    model.load_state_dict(exported(finished))
    loader: Any = DataLoader(few_digits("digits", image_size=recipe.data.image_size).val, 5)
    with small_runs():
        result = evaluate(model, loader, Accelerator(cpu=True), nn.CrossEntropyLoss())
    last = metrics_of(finished)[-1]
    assert {key: last[key] for key in result} == pytest.approx(result, rel=1e-5)


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(runs, tmp_path):
    recipe = small_recipe(tmp_path, "optimizer.lr=1.0e+30", "pruning=none", "epochs=3")
    train(recipe, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics_of(tmp_path / "run")[-1]["train_loss"] is None
    assert "NaN" not in text
    assert "Infinity" not in text


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
    environment = json.loads((finished / "environment.json").read_text())
    if (ROOT / ".git").exists():
        command = ["git", "rev-parse", "HEAD"]
        head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert environment["commit"] == head.stdout.strip()
    # installed within another project's repository
    package = ROOT / ".installed" / "site-packages" / "starfire_prune" / "run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(package))
    assert run_folder._commit() is None


def test_the_picture_of_a_run_is_a_png(finished):
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_files_of_a_run_can_be_read_by_whoever_reads_its_folder(finished):
    plain = (finished / "recipe.yaml").stat().st_mode
    assert (finished / "export" / "model.safetensors").stat().st_mode == plain


# The export


def fresh_model(recipe: Recipe) -> nn.Module:
    model: nn.Module = timm.create_model(
        recipe.model.name, num_classes=recipe.model.num_classes, **recipe.model.options
    )
    return model


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
        }
        for name in [*convolutions(weights), "fc.weight"]
    }


# Settings


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruning.method=window", "pruning.spread=true"],
        ["pruning.method=intra", "pruning.fc={method: block, block_size: 2}"],
        ["pruning.method=inter"],
        ["pruning.era=[0, 4]", "pruning.schedule=cubic", "pruning.fc=none"],
        ["optimizer={name: adamw, lr: 0.01, filter_bias_and_bn: true}"],
        ["training.clip_grad_norm=0.01", "training.label_smoothing=0.1"],
        ["training.channels_last=true", "training.gradient_accumulation=3"],
    ],
    ids=lambda overrides: overrides[0],
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
    assert {row["threshold"] for row in rows} == {0.0}
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_classes=12",
            "model.num_classes (=12) must be the number of classes in the data, 10: "
            "--set model.num_classes=10",
        ),
        ("model.name=resnet19", "unknown model 'resnet19': did you mean resnet18"),
        (
            "model.options={depth: 3}",
            "model.options: resnet18 refuses them: ResNet.__init__() got an unexpected keyword "
            "argument 'depth'",
        ),
        (
            "optimizer.name=sdg",
            "optimizer.name (='sdg') is none of timm's optimizers; nearest: sgd",
        ),
        (
            "optimizer.options={nesterof: true}",
            "optimizer: sgd refuses its options: SGD.__init__() got an unexpected keyword argument "
            "'nesterof'",
        ),
        (
            "optimizer={name: adam, lr: 0.1, options: {betas: [2.0, 0.9]}}",
            "optimizer: adam refuses its options: Invalid beta parameter at index 0: 2.0",
        ),
        (
            "pruning.exclude=[layer9.*]",
            "pruning.exclude: the pattern 'layer9.*' matches no convolution",
        ),
        (
            "training.mixed_precision=fp16",
            "training.mixed_precision (=fp16) needs a GPU: on a CPU, set",
        ),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else None,
)
def test_what_does_not_fit_is_refused_in_a_sentence(override, message, runs, tmp_path):
    with pytest.raises((RunError, ValueError)) as caught:
        train(small_recipe(tmp_path, override), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_optimizer_without_its_package_is_refused_in_a_sentence(runs, tmp_path):
    with pytest.raises(RunError, match=r"^optimizer: fusedsgd refuses its options: .*required"):
        train(small_recipe(tmp_path, "optimizer.name=fusedsgd"), tmp_path / "run")


def test_processes_that_would_train_alone_are_refused(runs, tmp_path, monkeypatch):
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(RunError, match=r"^MASTER_ADDR \(=10\.0\.0\.1\) announces .* by torchrun"):
        train(small_recipe(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_run_makes_no_folder(runs, tmp_path):
    with pytest.raises(RunError):
        train(small_recipe(tmp_path, "model.num_classes=12"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What a folder holds already


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


def test_a_recipe_kept_in_the_folder_of_its_run_is_left_as_it_is(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    written = write_recipe(run).rename(run / "recipe.yaml")
    text = "# mine\n" + written.read_text()
    written.write_text(text)
    train(load_recipe(written), run)
    assert written.read_text() == text


# Shipped recipes


def part_of(root: Path, target: Path, count: int) -> Path:
    """The first images of each class of Tiny-ImageNet for training, and of all for validation."""
    for folder in sorted((root / "train").iterdir()):
        (target / "train" / folder.name / "images").mkdir(parents=True)
        for image in sorted((folder / "images").iterdir())[:count]:
            shutil.copy(image, target / "train" / folder.name / "images")
    (target / "val" / "images").mkdir(parents=True)
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)[:count]
    (target / "val" / "val_annotations.txt").write_text("".join(lines))
    for line in lines:
        shutil.copy(root / "val" / "images" / line.split("\t")[0], target / "val" / "images")
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("model", "images"), [("test_resnet", 500), ("resnet50_v1", 40)])
def test_an_epoch_of_the_tiny_imagenet_recipe_ends_as_sparse_as_asked(
    model, images, tiny_imagenet, tmp_path, monkeypatch
):
    root = tiny_imagenet if images == 500 else part_of(tiny_imagenet, tmp_path / "part", images)
    monkeypatch.setenv("TINY_IMAGENET", str(root))
    arguments = (
        ROOT / "recipes" / "tiny_imagenet_resnet50.yaml",
        f"--set=model={{name: {model}, num_classes: 20}}",
        "--set=data.image_size=32",
        "--set=data.workers=2",
        "--set=lr_schedule.milestones=[]",
        "--set=epochs=1",
        "--set=pruning.era=[0, 1]",
        "--set=training.threads=1",
    )
    output_of(launch(*arguments, "--output", tmp_path / "run"))
    weights = exported(tmp_path / "run")
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    assert len(metadata["weights"]) == len(convolutions(weights)) + 1
    for name, weight in convolutions(weights).items():
        asked = math.floor(0.6 * weight.shape[0] + 0.5)
        gone = ~weight.flatten(2).any(2)
        assert gone.sum(0).tolist() == [asked] * weight.shape[1], name
    assert metrics_of(tmp_path / "run")[0]["sparsity"] == pytest.approx(0.6, abs=0.005)


@pytest.mark.slow
def test_the_quickstart_prunes_at_a_cost_of_at_most_a_percent(tmp_path):
    def mean_top1(name: str, *overrides: str) -> float:
        accuracies: list[float] = []
        for seed in range(3):
            settings = (*overrides, f"seed={seed}", "training.threads=2")
            recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", settings)
            train_on(recipe, tmp_path / f"{name}-{seed}")
            accuracies.append(metrics_of(tmp_path / f"{name}-{seed}")[-1]["top1"])
        return statistics.mean(accuracies)

    pruned, dense = mean_top1("pruned"), mean_top1("dense", "pruning=none")
    assert pruned >= 0.97
    assert dense - pruned <= 0.01
