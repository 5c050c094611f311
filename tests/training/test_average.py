"""The moving average of the weights: what is averaged, evaluated and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from starfire_prune.recipe.load import load_recipe
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.serialization.state import plain_state_dict
from starfire_prune.training import loop
from starfire_prune.training.loop import evaluate
from starfire_prune.training.train import train
from tests.support.processes import exported
from tests.support.runs import (
    few_digits,
    fresh_model,
    metrics_of,
    small_recipe,
    small_runs,
)

EPOCHS = 4
DECAY = 0.7


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if weight.ndim == 4}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """The folder of a run with an average, and the plain weights after each of its updates."""
    folder, states = tmp_path_factory.mktemp("averaged"), []
    follow = loop._follow_update

    def note(run: Any) -> None:
        follow(run)
        states.append(plain_state_dict(run.model))

    with small_runs() as patch:
        patch.setattr(loop, "_follow_update", note)
        train(small_recipe(folder, f"training.ema={{decay: {DECAY}}}"), folder / "run")
    return folder / "run", states


def average_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The moving average, worked out plainly: it begins with the first update."""
    average = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            if value.is_floating_point():
                average[name] = DECAY * average[name] + (1 - DECAY) * value
            else:
                average[name] = value
    return average


def test_the_export_is_the_average_under_the_final_masks(averaged):
    run, states = averaged
    assert len(states) == 4 * EPOCHS
    weights, pruned = exported(run), states[-1]
    for name, value in average_of(states).items():
        sparse = pruned[name].ndim > 1
        expected = value * (pruned[name] != 0) if sparse else value
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6)


def test_the_exported_average_is_exactly_as_sparse_as_the_model(averaged):
    run, states = averaged
    metadata = read_metadata(run / "export" / "model.safetensors")
    weights = exported(run)
    assert metadata["average_decay"] == DECAY
    assert len(metadata["weights"]) == len(convolutions(weights)) + 1
    for name, entry in metadata["weights"].items():
        assert torch.equal(weights[name] == 0, states[-1][name] == 0)
        assert int((weights[name] == 0).sum()) == entry["zeros"]


def test_the_exported_average_is_that_of_the_last_checkpoint(averaged):
    run, states = averaged
    checkpoint = run / "checkpoints" / "epoch-0004"
    average, model = (
        load_file(checkpoint / f"{name}.safetensors") for name in ("average", "model")
    )
    assert all(torch.equal(value, average[name]) for name, value in exported(run).items())
    assert all(torch.equal(value, model[name]) for name, value in states[-1].items())
    assert not torch.equal(average["conv1.weight"], model["conv1.weight"])


def test_the_metrics_of_the_average_are_those_of_the_export(averaged):
    run, _ = averaged
    recipe = load_recipe(run / "recipe.yaml")
    model = fresh_model(recipe)
    model.load_state_dict(exported(run))
    loader: Any = DataLoader(few_digits("digits", image_size=recipe.data.image_size).val, 5)
    with small_runs():
        result = evaluate(model, loader, Accelerator(cpu=True), nn.CrossEntropyLoss())
    last = metrics_of(run)[-1]
    assert {key: last[f"ema_{key}"] for key in result} == pytest.approx(result, rel=1e-5)


def test_the_model_trains_as_it_does_without_an_average(averaged, finished):
    run, _ = averaged
    plain = [
        {key: value for key, value in row.items() if not key.startswith("ema_")}
        for row in metrics_of(run)
    ]
    assert plain == metrics_of(finished)


def test_the_average_of_dense_training_is_exported(runs, tmp_path):
    train(small_recipe(tmp_path, "pruning=none", "training.ema={decay: 0.5}"), tmp_path / "run")
    metadata = read_metadata(tmp_path / "run" / "export" / "model.safetensors")
    assert metadata == {"format_version": 1, "method": None, "average_decay": 0.5, "weights": {}}
    average = load_file(tmp_path / "run" / "checkpoints" / "epoch-0004" / "average.safetensors")
    assert all(
        torch.equal(value, average[key]) for key, value in exported(tmp_path / "run").items()
    )


def test_a_run_tells_the_accuracy_of_its_average(runs, tmp_path, capsys):
    train(small_recipe(tmp_path, "training.ema={decay: 0.5}"), tmp_path / "run")
    printed, last = capsys.readouterr().out, metrics_of(tmp_path / "run")[-1]
    assert f"  average {last['ema_top1']:.2%}  phase fixed  " in printed
    assert (
        f"average of the weights: top-1 {last['ema_top1']:.2%}, top-5 {last['ema_top5']:.2%}\n"
    ) in printed
    assert f"\nweights (the average): {tmp_path}/run/export/model.safetensors\n" in printed


def test_only_updates_that_happen_are_averaged(runs, tmp_path):
    steps: list[int] = []
    update = ModelEmaV3.update

    def note(average: ModelEmaV3, model: nn.Module, step: int) -> None:
        steps.append(step)
        update(average, model, step)

    runs.setattr(ModelEmaV3, "update", note)
    settings = ("training.ema={}", "training.gradient_accumulation=3")
    train(small_recipe(tmp_path, *settings), tmp_path / "run")
    assert steps == list(range(1, 2 * EPOCHS + 1))
