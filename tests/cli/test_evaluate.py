"""`starfire evaluate`: what it measures, keeps and prints, and what it refuses."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from starfire_prune import save_pruned
from starfire_prune.data import load_datasets
from starfire_prune.evaluation import evaluate as robustness
from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.evaluate import evaluate_weights
from starfire_prune.evaluation.results import Evaluation, Result, file_sha256, read_evaluation
from starfire_prune.evaluation.spaces import SpaceName
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.runs import data as run_data
from starfire_prune.runs.weights import WeightsWithRecipe, find_weights
from starfire_prune.serialization.pretrained import load_weights
from tests.support.commands import MODULE, Ended, Tool
from tests.support.runs import (
    few_digits,
    files_of,
    make_photographs,
    metrics_of,
    small_recipe,
    train_killed,
    train_on,
)

COMMAND = "evaluate"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits that the small runs are trained and measured on."""
    monkeypatch.setattr(run_data, "load_datasets", few_digits)


@pytest.fixture
def tool(tool: Tool) -> Tool:
    """Runs the command on the CPU."""

    def run(*arguments: object) -> Ended:
        return tool(*arguments, *(() if "--device" in arguments else ("--device", "cpu")))

    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run's folder, to write in."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def other(run: Path) -> Path:
    """A run of the same recipe with other weights."""
    folder = Path(shutil.copytree(run, run.parent / "other"))
    torch.manual_seed(1)
    save_file(model_of(run).state_dict(), weights_of(folder))
    return folder


@pytest.fixture(scope="module")
def skilled_weights(finished: Path) -> dict[str, Tensor]:
    """Weights of the run's model that know the digits which it is measured on."""
    torch.manual_seed(0)
    model = model_of(finished)
    images, labels = (torch.stack(part) for part in zip(*digits(), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def skilled(run: Path, skilled_weights: dict[str, Tensor]) -> Path:
    """A run that knows the digits."""
    save_file(skilled_weights, weights_of(run))
    return run


def digits() -> list[tuple[Tensor, Tensor]]:
    """The digits that the runs are measured on, with their labels."""
    val: Any = few_digits("digits", image_size=16).val
    return [(image, torch.tensor(label)) for image, label in val]


def cross_entropy(logits: Tensor, labels: Tensor) -> Any:
    return nn.functional.cross_entropy(logits, labels)


def model_of(run: Path) -> nn.Module:
    settings = load_recipe(run / "recipe.yaml").model
    return create_model(settings.name, settings.num_classes, **settings.options)


def weights_of(run: Path) -> Path:
    return run / "export" / "model.safetensors"


def results_of(run: Path) -> tuple[Result, ...]:
    evaluation = read_evaluation(run)
    assert evaluation is not None
    return evaluation.results


def attacks_of(run: Path) -> list[Attack]:
    return [result.attack for result in results_of(run)]


def measured(run: Path, *attacks: Attack, **options: Any) -> tuple[Result, ...]:
    return evaluate_weights(find_weights(run), attacks, device=CPU, **options).results


def refusal(ended: Ended) -> str:
    """The one sentence of a refusal."""
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr.removeprefix("starfire evaluate: ").rstrip("\n")


# Clean images


def test_a_run_has_the_accuracy_that_it_ended_with(tool, run):
    ended = tool(run)
    assert (ended.status, ended.stderr) == (0, "")
    (clean,), last = results_of(run), metrics_of(run)[-1]
    assert (clean.top1, clean.top5) == (last["top1"], last["top5"])
    assert clean.loss == pytest.approx(last["val_loss"], rel=1e-6)
    assert "the run itself ended" not in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("training={threads: 1, mixed_precision: bf16, channels_last: true}", "top1"),
        ("training={threads: 1, ema: {decay: 0.5}}", "ema_top1"),
    ],
)
def test_a_run_is_measured_as_it_was_trained(setting, key, tool, runs, tmp_path):
    # torch's bf16 gradients of channels-last kernels on 1x1 images can be uninitialized
    train_on(small_recipe(tmp_path, setting, "data.image_size=64"), tmp_path / "run")
    ended = tool(tmp_path / "run")
    assert results_of(tmp_path / "run")[0].top1 == metrics_of(tmp_path / "run")[-1][key]
    assert "the run itself ended" not in ended.stdout


def test_another_accuracy_than_the_run_ended_with_is_told(tool, run, other):
    assert tool(run, other).stdout.count("the run itself ended with a top-1 of ") == 1


def test_clean_images_are_measured_in_the_mixed_precision_of_the_recipe(tool, run):
    tool(run, "--set", "training.mixed_precision=bf16", "--fgsm", "0")
    clean, attacked = results_of(run)
    assert (clean.attack.precision, attacked.attack.precision) == ("bf16", "fp32")
    assert clean.loss != attacked.loss


def test_fp16_is_float32_on_a_cpu_and_told(tool, run):
    ended = tool(run, "--set", "training.mixed_precision=fp16")
    assert results_of(run)[0].attack.precision == "fp32"
    assert "\ntraining.mixed_precision (=fp16) is not for this device: clean images in fp32\n" in (
        ended.stdout
    )


# Attacks


def test_results_are_those_of_the_attack_on_all_images(skilled):
    """Plain loops, an image at a time, in pixels that are normalised within the model."""
    whole: Any = load_datasets("digits", image_size=16).train
    levels = torch.stack([image for image, _ in whole])
    std = 1 / (levels.max() - levels.min())
    mean = -levels.min() * std
    model = model_of(skilled).eval()
    model.load_state_dict(load_file(weights_of(skilled)))
    right, total_loss = 0, 0.0
    for image, label in digits():
        pixels = (image * std + mean).clamp(0, 1)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(
            cross_entropy(model((pixels - mean) / std), label[None]), pixels
        )
        moved = (pixels.detach() + 0.1 * gradient.sign()).clamp(0, 1)
        with torch.no_grad():
            logits = model((moved - mean) / std)
        right += int(logits.argmax() == label)
        total_loss += float(cross_entropy(logits, label[None]))
    clean, attacked = measured(skilled, Attack("fgsm", 0.1))
    assert attacked.top1 == right / 24 < clean.top1
    assert attacked.loss == pytest.approx(total_loss / 24, rel=1e-3)


def test_no_epsilon_is_the_clean_accuracy(run):
    clean, *attacked = measured(
        run, Attack("fgsm", 0.0), Attack("pgd", 0.0, "pixel", 10, 0.0, 2, 0)
    )
    for result in attacked:
        assert (result.top1, result.top5, result.loss) == (clean.top1, clean.top5, clean.loss)


@pytest.mark.parametrize("space", get_args(SpaceName))
def test_a_stronger_attack_leaves_less(skilled, space):
    near_and_far = [Attack("fgsm", epsilon, space) for epsilon in (0.05, 0.1)]
    in_steps = Attack("pgd", 0.05, space, 10, 0.0125, 1, 0)
    clean, near, far, steps = measured(skilled, *near_and_far, in_steps)
    losses = [result.loss or math.nan for result in (clean, near, far)]
    assert losses == sorted(losses)
    assert steps.loss > near.loss  # type: ignore[operator]
    assert {result.attack.space for result in (near, steps, far)} == {space}


def test_a_result_tells_the_settings_of_pgd_that_were_left_out(run):
    complete = Attack("pgd", 0.1, steps=10, step_size=0.025, restarts=1)
    _, default, told = measured(run, Attack("pgd", 0.1), complete)
    assert default.attack == complete
    assert default == told


def test_attacks_in_several_spaces_are_measured_together(skilled):
    pixel, normalised = (Attack("fgsm", 0.1, space) for space in get_args(SpaceName))
    together = measured(skilled, pixel, normalised)
    assert together[1:] == (measured(skilled, pixel)[1], measured(skilled, normalised)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"`steps` \(=0\) must be at least 1"),
        ({"step_size": 0.0}, r"`step_size` \(=0\) must be above 0"),
        ({"restarts": 0}, r"`restarts` \(=0\) must be at least 1"),
    ],
)
def test_settings_of_pgd_that_are_nothing_are_refused_and_not_replaced(settings, message):
    with pytest.raises(ValueError, match=message):
        Attack("pgd", 0.1, **settings)


def test_results_do_not_depend_on_the_batches(run):
    attack = Attack("pgd", 0.05, "pixel", 3, 0.02, 2, 7)
    whole, parts = (measured(run, attack, batch_size=size) for size in (24, 5))
    for one, two in zip(whole, parts, strict=True):
        assert (one.top1, one.top5) == (two.top1, two.top5)
        assert one.loss == pytest.approx(two.loss, rel=1e-3)


def test_a_transfer_attack_follows_the_source(skilled, other):
    attack = Attack("fgsm", 0.1)
    _, own = measured(skilled, attack)
    _, transferred = measured(skilled, attack, source=find_weights(other))
    assert transferred.attack.source == "other"
    assert transferred.loss < own.loss  # type: ignore[operator]
    _, itself = measured(skilled, attack, source=find_weights(skilled))
    assert (itself.top1, itself.loss) == (own.top1, own.loss)


def test_a_limit_takes_evenly_spaced_images(run):
    subject = find_weights(run)
    loader, total = robustness.validation_loader(subject, 5)
    images: Any = loader.dataset
    assert (len(images), total) == (5, 24)
    assert images.indices == [0, 4, 9, 14, 19]
    assert {result.images for result in measured(run, Attack("fgsm", 0.1), limit=5)} == {5}
    assert {result.images for result in measured(run, limit=1000)} == {24}


def test_a_limit_takes_the_first_images_of_what_is_streamed(run, monkeypatch):
    class Stream(IterableDataset[Any]):
        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Iterator[Any]:
            yield from digits()

    def streamed(name: str, **options: Any) -> Any:
        return dataclasses.replace(few_digits(name, **options), val=Stream())

    spaced = measured(run, limit=18)
    monkeypatch.setattr(run_data, "load_datasets", streamed)
    first, attacked = measured(run, Attack("fgsm", 0.1), limit=18)
    assert first.images == attacked.images == 18
    assert first.loss != spaced[0].loss


def test_kernels_may_differ_again_afterwards(run):
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    measured(run)
    assert (cudnn.deterministic, cudnn.benchmark) == before


# What is kept and printed


def test_the_table_tells_attacks_and_spaces(tool, run):
    ended = tool(
        *(run, "--fgsm", "0", "1/255", "0.1", "--pgd", "8/255", "--restarts", "2"),
        *("--steps", "2"),
    )
    printed = re.sub(r"  +\d+\.\d\d  +\d+\.\d\d  +\d+\.\d{4}\n", "\n", ended.stdout)
    assert printed.splitlines() == [
        str(run),
        "attack                      epsilon  precision  images  top-1 [%]  top-5 [%]    loss",
        "--------------------------  -------  ---------  ------  ---------  ---------  ------",
        "clean                                fp32           24",
        "FGSM                        0/255    fp32           24",
        "FGSM                        1/255    fp32           24",
        "FGSM                        0.1      fp32           24",
        "PGD of 2 steps, 2 restarts  8/255    fp32           24",
        f"kept in {run}/evaluation.json",
    ]


def test_the_folder_of_a_run_keeps_its_evaluation(tool, run):
    tool(run, "--pgd", "0.1", "--seed", "3", "--steps", "4")
    evaluation = read_evaluation(run)
    assert evaluation is not None
    assert evaluation.weights_sha256 == file_sha256(weights_of(run))
    assert (evaluation.images, evaluation.data["name"]) == (24, "digits")
    assert torch.__version__.startswith(evaluation.environment["packages"]["torch"])
    attacked = evaluation.results[1]
    assert attacked.images == 24
    assert attacked.attack == Attack(
        "pgd", 0.1, "pixel", steps=4, step_size=0.0625, restarts=1, seed=3
    )


def test_calls_add_to_the_evaluation_and_new_weights_begin_anew(tool, run, other):
    tool(run, "--fgsm", "0.1")
    tool(run, "--fgsm", "0.1", "0.2", "--space", "normalised")
    assert [(own.name, own.space, own.epsilon) for own in attacks_of(run)] == [
        ("none", "pixel", 0.0),
        ("fgsm", "normalised", 0.1),
        ("fgsm", "normalised", 0.2),
        ("fgsm", "pixel", 0.1),
    ]
    shutil.copy(weights_of(other), weights_of(run))
    tool(run)
    assert [own.name for own in attacks_of(run)] == ["none"]


def test_nothing_but_the_evaluation_is_written(tool, run):
    before = files_of(run)
    tool(run, "--fgsm", "0.1")
    after = files_of(run)
    assert after.pop("evaluation.json")
    assert after == before


def test_images_that_are_not_the_runs_are_not_kept(tool, run):
    ended = tool(run, "--set", "data.image_size=8")
    assert "\nnot kept in the run's folder: data.image_size is not the run's\n" in ended.stdout
    assert read_evaluation(run) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model.options.act_layer=gelu"], "model.options is"),
        (["model.options.act_layer=gelu", "data.crop_pct=1.0"], "model.options, data.crop_pct are"),
    ],
)
def test_another_model_than_the_runs_leaves_the_runs_results_alone(settings, told, tool, run):
    tool(run)
    before = results_of(run)
    ended = tool(run, *(argument for key in settings for argument in ("--set", key)))
    assert f"\nnot kept in the run's folder: {told} not the run's\n" in ended.stdout
    assert results_of(run) == before


def test_other_weights_to_start_from_are_the_same_model(tool, run):
    ended = tool(run, "--set", "model.pretrained=true")
    assert ended.stdout.endswith(f"kept in {run}/evaluation.json\n")


def test_a_source_is_kept_with_its_weights(tool, run, other):
    ended = tool(run, "--fgsm", "0.1", "--source", other)
    assert "\nFGSM, transferred from other  " in ended.stdout
    evaluation = read_evaluation(run)
    assert evaluation is not None
    assert evaluation.source_sha256 == {"other": file_sha256(weights_of(other))}


def test_a_file_of_weights_is_evaluated_by_a_recipe(tool, run):
    wanted = measured(run, Attack("fgsm", 0.1))
    path = run.parent / "results.json"
    before = files_of(run)
    ended = tool(
        *(weights_of(run), "--recipe", run / "recipe.yaml", "--fgsm", "0.1", "--json", path)
    )
    assert (ended.status, ended.stderr) == (0, "")
    (content,) = json.loads(path.read_text(encoding="utf-8"))
    assert content.pop("name") == "model.safetensors"
    assert Evaluation.model_validate_json(json.dumps(content)).results == wanted
    assert files_of(run) == before


def test_several_runs_follow_one_another(tool, run, other):
    lines = tool(run, other).stdout.splitlines()
    assert lines.index(str(run)) == 0
    assert lines[lines.index(str(other)) - 1] == ""
    assert read_evaluation(other) is not None


def test_help_ends_quietly_where_nobody_reads_it():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, COMMAND, "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""


# Data that lie elsewhere


@pytest.fixture
def photographs(tmp_path: Path) -> tuple[Path, Path]:
    """A finished run on photographs of two classes, and where they lie."""
    root = make_photographs(tmp_path / "photographs")
    data = "data={name: folder, root: '${PHOTOGRAPHS}', image_size: 16, batch_size: 8, workers: 0}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHOTOGRAPHS", str(root))
        recipe = small_recipe(tmp_path, data, "model.num_classes=2")
    model = create_model("resnet18", 2, **recipe.model.options)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    text = (tmp_path / "small.yaml").read_text().replace("num_classes: 10", "num_classes: 2")
    text = re.sub("data: .*", data.replace("=", ": "), text)
    (tmp_path / "photographs.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "weights.safetensors", root


def test_the_data_are_read_where_the_command_says(tool, photographs):
    weights, root = photographs
    recipe = ("--recipe", weights.parent / "photographs.yaml")
    by_data = tool(weights, *recipe, "--data", root, "--fgsm", "1/255")
    by_set = tool(weights, *recipe, "--set", f"data.root={root}", "--fgsm", "1/255")
    assert by_data == by_set
    assert (by_data.status, by_data.stderr) == (0, "")
    assert re.search(r"\nclean +fp32 +10 ", by_data.stdout)


def test_a_compressed_file_is_evaluated_as_the_dense_one(tool, photographs, tmp_path):
    weights, root = photographs
    model = create_model("resnet18", 2, **load_recipe(weights.parent / "small.yaml").model.options)
    load_weights(model, weights)
    save_pruned(model, tmp_path / "small.safetensors", "compressed")
    recipe = ("--recipe", weights.parent / "photographs.yaml", "--data", root)
    dense, compressed = tool(weights, *recipe), tool(tmp_path / "small.safetensors", *recipe)
    assert compressed.status == 0
    assert compressed.stdout.splitlines()[1:] == dense.stdout.splitlines()[1:]


def test_a_place_that_is_not_set_is_told_with_the_way_out(tool, photographs, monkeypatch):
    monkeypatch.delenv("PHOTOGRAPHS", raising=False)
    weights, _ = photographs
    recipe = weights.parent / "photographs.yaml"
    told = refusal(tool(weights, "--recipe", recipe))
    assert told.startswith(f"{recipe}: data.root: the environment variable PHOTOGRAPHS is not set")
    assert told.endswith("; or give --data FOLDER")


def test_a_place_where_the_data_are_not_is_told_with_the_way_out(tool, photographs):
    weights, root = photographs
    recipe = ("--recipe", weights.parent / "photographs.yaml")
    assert refusal(tool(weights, *recipe, "--data", root / "gone")) == (
        f"weights.safetensors: root {root}/gone does not exist: give the folder of data set "
        f"'folder'; if the data are not in data.root (={root}/gone), give --data FOLDER or "
        f"--set data.root=FOLDER"
    )


def test_a_source_needs_no_data(tool, photographs, monkeypatch, other):
    monkeypatch.delenv("PHOTOGRAPHS", raising=False)
    weights, root = photographs
    saved = weights.parent / "photographs.yaml"
    source = Path(shutil.copytree(other, weights.parent / "source"))
    shutil.copy(saved, source / "recipe.yaml")
    shutil.copy(weights, weights_of(source))
    ended = tool(*(weights, "--recipe", saved, "--data", root, "--fgsm", "0.1", "--source", source))
    assert (ended.status, ended.stderr) == (0, "")


# Refusals


def test_an_unfinished_run_is_told_with_how_far_it_is(tool, runs, tmp_path, capsys):
    train_killed(small_recipe(tmp_path), tmp_path / "run", 1, "within the epoch")
    capsys.readouterr()
    folder = tmp_path / "run"
    assert refusal(tool(folder)) == (
        f"{folder} is unfinished, 1 of 4 epochs are done: continue with starfire "
        f"train {folder}/recipe.yaml --output {folder}"
    )


def test_what_is_not_there_is_told_with_what_is(tool, run):
    assert refusal(tool(run.parent / "runn")) == (
        f"there is no run or file {run.parent}/runn; in {run.parent}: run"
    )
    assert refusal(tool(run / "gone" / "run")) == (
        f"there is no run or file {run}/gone/run: there is no folder {run}/gone"
    )


def test_a_folder_that_is_no_runs_is_refused(tool, tmp_path):
    assert refusal(tool(tmp_path)) == (f"{tmp_path} is not a run's folder: it holds no recipe.yaml")


def test_a_file_needs_a_recipe(tool, run):
    weights = weights_of(run)
    assert refusal(tool(weights)) == (
        f"{weights} needs the recipe of its model and its data: give --recipe FILE, or the "
        f"folder of its run in place of the file"
    )


def test_damaged_weights_are_refused(tool, run):
    weights = weights_of(run)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(tool(run)).startswith(f"{weights} is not a complete safetensors file (")


def test_weights_of_another_model_are_refused_with_some_of_their_keys(tool, run):
    save_file({"features.weight": torch.zeros(3)}, weights_of(run))
    assert refusal(tool(run)) == (
        f"{weights_of(run)} is of another model: it lacks conv1.weight, bn1.weight, bn1.bias and "
        f"{len(model_of(run).state_dict()) - 3} more and also holds 'features.weight' (the "
        f"recipe's model is resnet18)"
    )


def test_a_classifier_of_other_classes_is_refused(tool, run):
    weights = load_file(weights_of(run))
    weights["fc.weight"], weights["fc.bias"] = torch.zeros(3, 16), torch.zeros(3)
    save_file(weights, weights_of(run))
    assert refusal(tool(run)) == (
        f"{weights_of(run)} has another number of classes than the recipe's model.num_classes "
        f"(=10): its fc.weight has another shape; give its own recipe"
    )


def test_data_of_other_classes_are_refused(tool, run):
    assert refusal(tool(run, "--set", "model.num_classes=7")) == (
        "model.num_classes (=7) must be the number of classes in the data, 10: correct it, or give "
        "other data"
    )


def test_a_source_that_sees_other_images_is_refused(run, photographs):
    weights, root = photographs
    source = find_weights(weights, weights.parent / "photographs.yaml", root=root)
    with pytest.raises(
        ValueError,
        match=r"--source weights\.safetensors can't attack run: model\.num_classes is 2 there and "
        "10 here",
    ):
        measured(run, Attack("fgsm", 0.1), source=source)
    data = "data={name: folder, root: x, batch_size: 8}"
    recipe = load_recipe(run / "recipe.yaml", [data])
    with pytest.raises(ValueError, match=r"can't attack run: the normalisation is \(\(0\.485, "):
        measured(run, Attack("fgsm", 0.1), source=WeightsWithRecipe("imagenet", weights, recipe))


def test_options_that_the_model_refuses_are_told(tool, run):
    told = refusal(tool(run, "--set", "model.options={nonsense: 1}"))
    assert told.startswith("resnet18 can't be built with the options {'nonsense': 1}: ")


def test_a_damaged_evaluation_is_refused_before_anything_is_measured(tool, run, monkeypatch):
    (run / "evaluation.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(robustness, "evaluate_weights", lambda *_, **__: pytest.fail("measured"))
    assert "delete it, and evaluate again" in refusal(tool(run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fgsm 8", "--fgsm: `epsilon` (=8) must be in [0, 1] in pixel space: 8 of 255 levels"),
        ("--pgd -0.1", "--pgd: `epsilon` (=-0.1) must be in [0, 1] in pixel space"),
        ("--fgsm -1 --space normalised", "--fgsm: `epsilon` (=-1) must be a number from 0"),
        ("--pgd 0.1 --steps 0", "`steps` (=0) must be at least 1"),
        ("--pgd 0.1 --step-size 0", "`step_size` (=0) must be above 0"),
        ("--pgd 0.1 --no-random-start --restarts 2", "`restarts` (=2) from the images themselves"),
        ("--steps 3", "--steps has no effect without --pgd"),
        ("--fgsm 0.1 --no-random-start", "--no-random-start has no effect without --pgd"),
        ("--seed 0 --fgsm 0.1", "--seed has no effect without --pgd"),
        ("--space pixel", "--space has no effect without --fgsm or --pgd"),
        ("--pgd 0.1 --seed 0 --no-random-start", "--seed has no effect with --no-random-start"),
        ("--recipe recipe.yaml", "--recipe has no effect: runs have their own"),
        ("--device nowhere", "--device (=nowhere) can't be used: "),
        ("--set epochs=0", "--set: epochs: must be at least 1 (got 0)"),
    ],
)
def test_settings_out_of_range_and_without_effect_are_refused(arguments, message, tool, run):
    assert refusal(tool(run, *arguments.split())).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fgsm 1/0", "argument --fgsm: '1/0' is not a number such as 0.03 or 4/255"),
        (
            "--pgd runs/ck",
            "argument --pgd: 'runs/ck' is not a number such as 0.03 or 4/255 (runs come",
        ),
        ("--limit 0", "argument --limit: '0' must be a whole number from 1"),
        # which a fraction would work out digit by digit
        ("--fgsm 1e99999999", "argument --fgsm: '1e99999999' is not a number such as"),
        ("--pgd 0.1 --step-size nan", "argument --step-size: 'nan' is not a number such as"),
        (f"--fgsm {'9' * 5000}/1", f"argument --fgsm: '{'9' * 40}…' is not a number such as"),
    ],
)
def test_what_is_no_number_is_refused(arguments, message, tool, run):
    ended = tool(run, *arguments.split())
    assert ended.status == 2
    assert message in ended.stderr


# Real images


@pytest.mark.slow
def test_a_network_trained_on_photographs_is_attacked(tool, runs, tiny_imagenet, tmp_path):
    data = f"data={{name: tiny_imagenet, root: {tiny_imagenet}, image_size: 32, batch_size: 64"
    settings = (f"{data}, workers: 0}}", "model.num_classes=20", "epochs=2", "pruning=none")
    options = "model.options={layers: [1, 1, 1, 1], channels: [16, 16, 32, 32]}"
    train_on(small_recipe(tmp_path, *settings, options, "lr_schedule={}"), tmp_path / "run")
    ended = tool(tmp_path / "run", "--fgsm", "0", "1/255", "8/255", "--pgd", "8/255")
    assert (ended.status, ended.stderr) == (0, "")
    clean, none, near, far, steps = results_of(tmp_path / "run")
    assert clean.images == 1000
    assert clean.top1 == none.top1 == metrics_of(tmp_path / "run")[-1]["top1"]
    assert clean.top1 > near.top1 > far.top1 >= steps.top1
