"""The shipped recipes and the runs of the shipped tables: that they can be trained."""

import io
import math
import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from PIL import Image
from torch import Tensor

from starfire_prune.experiments.tables import load_table
from starfire_prune.quantization import check_masks
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import exported_file, int8_file
from starfire_prune.serialization.pruned import load_masks, read_metadata
from starfire_prune.serialization.quantized import load_quantized
from starfire_prune.training.train import train
from starfire_prune.utils.console import log_to_console
from tests.support.paths import ROOT
from tests.support.processes import exported, launch, output_of
from tests.support.runs import metrics_of, new_process, train_on

RECIPES = ROOT / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))
# By recipe: parameters, training images of the data made below, target, updates of the era of all,
# and how many convolutions and linear layers are pruned
PLANS = {
    "cifar10_resnet14": ("1,772,746", "10", "80.0%", "updates 3 to 4 of 8", (16, 0)),
    "finetune_resnet50": ("25,557,032", "1,000", "60.0%", "updates 1 to 240 of 480", (53, 1)),
    "quickstart": ("11,181,642", "1,437", "60.0%", "updates 136 to 315 of 450", (20, 1)),
    "quickstart_int8": ("11,181,642", "1,437", "60.0%", "updates 136 to 315 of 450", (20, 1)),
    "resnet50_v1": ("25,557,032", "1,000", "60.0%", "updates 641 to 960 of 1,600", (53, 1)),
    "resnet50_v15": ("25,557,032", "1,000", "60.0%", "updates 641 to 960 of 1,600", (53, 1)),
    "tiny_imagenet20_resnet18": ("11,186,772", "20", "60.0%", "updates 9 to 12 of 20", (20, 1)),
    "tiny_imagenet_resnet50": ("23,917,832", "200", "60.0%", "updates 1 to 40 of 160", (53, 1)),
}

# The recipes ask for more workers than a small machine has cores
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def noise(side: int) -> bytes:
    """A JPEG image."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, "JPEG")
    return file.getvalue()


def make_folders(root: Path, classes: int) -> Path:
    """An image of noise for each of the classes, to train on and to evaluate on."""
    image = noise(40)
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            (folder / "0.JPEG").write_bytes(image)
    return root


def make_tiny_imagenet(root: Path, classes: int = 200) -> Path:
    """An image of noise for each of the classes to train on, and one to evaluate on."""
    image = noise(64)
    for label in range(classes):
        folder = root / "train" / f"n{label:08d}" / "images"
        folder.mkdir(parents=True)
        (folder / f"n{label:08d}_0.JPEG").write_bytes(image)
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(image)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn00000000\t0\t0\t62\t62\n")
    return root


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The folders of noise that the recipes' variables name."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGENET", str(make_folders(root / "imagenet", 1000)))
        patch.setenv("CIFAR10", str(make_folders(root / "cifar-10", 10)))
        patch.setenv("TINY_IMAGENET", str(make_tiny_imagenet(root / "tiny-imagenet-200")))
        patch.setenv("TINY_IMAGENET20", str(make_tiny_imagenet(root / "tiny-imagenet-20", 20)))
        yield


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm's weights that would be downloaded be random ones."""
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **options: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def plan_of(recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a dry run prints."""
    log_to_console()
    new_process()
    train(recipe, folder, dry_run=True)
    new_process()
    assert not folder.exists()
    return capsys.readouterr().out


def test_every_recipe_has_a_plan_below():
    assert [path.stem for path in SHIPPED] == [*PLANS]


@few_cores
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("data_sets", "offline")
def test_shipped_recipe_can_be_trained(path, tmp_path, capsys, monkeypatch):
    # It would quantize the model, which needs torchao and seconds: a slow test below trains it
    monkeypatch.setattr("starfire_prune.training.preflight.check_quantization", lambda run: None)
    recipe = load_recipe(path)
    plan = plan_of(recipe, tmp_path / "run", capsys)
    parameters, images, target, updates, pruned = PLANS[path.stem]
    classes = recipe.model.num_classes
    assert recipe.pruning != "none"
    assert f"  model      {recipe.model.name}, {parameters} parameters, {classes} classes\n" in plan
    assert f": {images} images for training, " in plan
    era = list(recipe.pruning.era or ())
    assert f"  pruning    ck to {target}, linear, era {era}: {updates}\n" in plan
    layers = plan.partition("\n\nlayer ")[2].splitlines()
    assert (
        tuple(sum(f" {method} " in line for line in layers) for method in ("ck", "fine")) == pruned
    )


def test_the_weights_to_fine_tune_are_timms():
    recipe = load_recipe(RECIPES / "finetune_resnet50.yaml", keep_unset=True)
    assert recipe.model.name in timm.list_pretrained("resnet50.*")


@few_cores
@pytest.mark.slow
@pytest.mark.usefixtures("data_sets", "offline")
def test_every_run_of_the_shipped_tables_can_be_trained(tmp_path, capsys):
    """Of those that differ in amount and epochs alone, the first."""
    kinds: dict[tuple[str, str], Recipe] = {}
    for path in sorted((RECIPES / "tables").glob("*.yaml")):
        for run in load_table(path).runs:
            pruning = run.recipe.pruning
            kind: str = "dense" if pruning == "none" else pruning.method
            kinds.setdefault((run.recipe_path.stem, kind), run.recipe)
    assert len(kinds) == 23
    for (_, kind), recipe in kinds.items():
        plan = plan_of(recipe, tmp_path / "run", capsys)
        start = "none: dense" if kind == "dense" else f"{kind} to "
        assert f"\n  pruning    {start}" in plan, dump_recipe(recipe)


# Trained


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if weight.ndim == 4}


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
        RECIPES / "tiny_imagenet_resnet50.yaml",
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
            recipe = load_recipe(RECIPES / "quickstart.yaml", settings)
            train_on(recipe, tmp_path / f"{name}-{seed}")
            accuracies.append(metrics_of(tmp_path / f"{name}-{seed}")[-1]["top1"])
        return statistics.mean(accuracies)

    pruned, dense = mean_top1("pruned"), mean_top1("dense", "pruning=none")
    assert pruned >= 0.97
    assert dense - pruned <= 0.01


@pytest.mark.slow
def test_the_quickstart_costs_at_most_a_percent_in_int8(tmp_path):
    pytest.importorskip("torchao")
    recipe = load_recipe(RECIPES / "quickstart_int8.yaml", ["training.threads=2"])
    train_on(recipe, tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert [row["phase"] for row in rows[9:]] == ["fixed", "quantization", "quantization"]
    assert rows[11]["top1"] >= 0.97
    assert rows[11]["top1"] >= rows[9]["top1"] - 0.01
    quantized = load_quantized(int8_file(tmp_path / "run"))
    zeros = check_masks(quantized, dict(load_masks(exported_file(tmp_path / "run"))))
    assert len(zeros) == 21
