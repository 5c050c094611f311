"""`starfire quantize`: what it writes and prints, and what it refuses."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune.data import build_loader
from starfire_prune.evaluation.quantized import QuantizedWeights
from starfire_prune.export.input import find_input, load_input
from starfire_prune.quantization import check_masks, quantize
from starfire_prune.runs import data as run_data
from starfire_prune.runs.weights import find_weights
from starfire_prune.serialization.quantized import load_quantized
from tests.support.commands import Ended
from tests.support.runs import few_digits, fresh_model

pytest.importorskip("torchao")

COMMAND = "quantize"


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits that the small runs are trained and measured on."""
    monkeypatch.setattr(run_data, "load_datasets", few_digits)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run's folder, to write in."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(ended: Ended) -> str:
    """The sentence of a refusal."""
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("starfire quantize: ")
    return ended.stderr.removeprefix("starfire quantize: ").rstrip("\n")


@torch.no_grad()
def top1(model: nn.Module, run: Path) -> float:
    val: Any = run_data.recipe_datasets(find_weights(run).recipe).val
    images, labels = (
        torch.stack(list(map(torch.as_tensor, each))) for each in zip(*val, strict=True)
    )
    return float((model(images).argmax(1) == labels).float().mean())


def test_the_file_holds_the_model_calibrated_on_training_images(tool, run):
    ended = tool(run)
    assert (ended.status, ended.stderr) == (0, "")
    recipe, model = find_weights(run).recipe, load_input(find_input(run))
    loaded = load_quantized(run / "export" / "int8.safetensors", fresh_model(recipe))
    train = run_data.recipe_datasets(recipe).train  # digits have no augmentation
    wanted = quantize(model, build_loader(train, 16, train=False))
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(loaded(images), wanted(images))


def test_it_prints_accuracies_zeros_and_size(tool, run):
    ended = tool(run)
    output = run / "export" / "int8.safetensors"
    module = load_quantized(output, fresh_model(find_weights(run).recipe))
    layers = check_masks(module).values()
    zeros, total = sum(each.zeros for each in layers), sum(each.total for each in layers)
    first, second, third = ended.stdout.splitlines()
    assert first == (
        f"top-1 {top1(load_input(find_input(run)), run):.2%} in float32, "
        f"{top1(module, run):.2%} in int8 (24 images)"
    )
    pattern = rf"{zeros / total:.2%} of {total:,} int8 weights are zero, all ([\d,]+) pruned ones.*"
    match = re.fullmatch(pattern, second)
    assert match
    weights = [weight for weight in load_input(find_input(run)).parameters() if weight.dim() > 1]
    assert int(match[1].replace(",", "")) == sum(int((weight == 0).sum()) for weight in weights)
    assert third == f"{output}: {output.stat().st_size:,} bytes"


def test_both_accuracies_are_printed(tool, run, monkeypatch):
    def measured(*_: object, **__: object) -> QuantizedWeights:
        return QuantizedWeights(module, 1000, 0.75, 0.5)

    module = quantize(load_input(find_input(run)), [torch.rand(4, 3, 16, 16)])
    monkeypatch.setattr("starfire_prune.cli.run_quantize.quantize_weights", measured)
    first = tool(run).stdout.splitlines()[0]
    assert first == "top-1 75.00% in float32, 50.00% in int8 (1,000 images)"


def test_options_change_the_file(tool, run, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert tool(run, "--output", plain, "--limit", 5).status == 0
    ended = tool(run, "--output", other, "--compressed", "--reduced-range", "--images", 8)
    assert ended.status == 0
    assert "(24 images)" in ended.stdout
    assert other.stat().st_size < plain.stat().st_size
    assert 'largest_input\\": 127' in other.read_bytes()[:20_000].decode(errors="ignore")
    assert 'images\\": 8' in other.read_bytes()[:20_000].decode(errors="ignore")


def test_it_calibrates_on_evenly_spaced_images(tool, run):
    assert tool(run, "--images", 8).status == 0
    recipe, model = find_weights(run).recipe, load_input(find_input(run))
    train = run_data.recipe_datasets(recipe).train
    batch = torch.stack([train[index * 56 // 8][0] for index in range(8)])
    loaded = load_quantized(run / "export" / "int8.safetensors", fresh_model(recipe))
    assert torch.equal(loaded(batch), quantize(model, [batch])(batch))


def test_an_existing_file_is_replaced_only_by_force(tool, run):
    output = run / "export" / "int8.safetensors"
    output.write_text("other")
    text = f"{output} is there already: choose another --output, or give --force"
    assert refused(tool(run)) == text
    assert output.read_text() == "other"
    assert tool(run, "--force").status == 0


def test_other_outputs_are_refused(tool, run, tmp_path):
    weights = run / "export" / "model.safetensors"
    text = f"--output {weights} is what is quantized: choose another"
    assert refused(tool(run, "--output", weights, "--force")) == text
    text = f"--output {tmp_path} is a folder: name a file"
    assert refused(tool(run, "--output", tmp_path)) == text


def test_what_is_no_run_is_refused(tool, run):
    file = run / "export" / "model.safetensors"
    assert refused(tool(file)) == f"{file} is no folder: name the folder of a finished run"
    text = "--set model.num_classes has no effect: the run's model is quantized"
    assert refused(tool(run, "--set", "model.num_classes=9")) == text
