"""The recipe's key `training.compress_gradients`: where the hook goes, and what the plan says."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from starfire_prune import MaskedAllreduceState, masked_allreduce_hook
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.plan import _gradient_rows, plan_text
from starfire_prune.training.setup import Run, _compress_gradients, prepare_run
from starfire_prune.utils.modules import layer_weight
from tests.support.networks import SmallNet, equal_states, one_epoch
from tests.support.processes import exported, launch_two, output_of, setting
from tests.support.runs import new_process, small_recipe

COMPRESSED = "training={threads: 1, compress_gradients: true}"


def prepared(folder: Path, *overrides: str) -> Run:
    new_process()
    recipe = small_recipe(folder, COMPRESSED, *overrides)
    return prepare_run(recipe, folder / "run", create_accelerator(recipe, folder / "run"))


def on_two(run: Run) -> list[tuple[str, str]]:
    """The plan's rows, if two processes trained."""
    two: Any = SimpleNamespace(num_processes=2)
    return _gradient_rows(replace(run, accelerator=two))


# The plan


def test_the_plan_says_that_one_process_sends_nothing(runs, tmp_path):
    text = plan_text(prepared(tmp_path))
    assert "gradients  compress_gradients has no effect: a single process sends none" in text


def test_the_plan_says_what_an_update_averages(runs, tmp_path):
    run = prepared(tmp_path)
    whole = sum(weight.nbytes for weight in run.model.parameters())
    assert run.pruner is not None
    pruned = sum(layer_weight(layer.module).nbytes for layer in run.pruner.layers.values())
    kept = whole - 0.6 * pruned
    expected = (
        f"{whole / 1e6:.1f} MB averaged per update, about {kept / 1e6:.1f} MB from epoch 3 on"
    )
    assert on_two(run) == [("gradients", expected)]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("pruning=none", "in dense training"),
        ("pruning.era=[1, 4]", ": the run ends with the era"),
    ],
)
def test_the_plan_says_where_nothing_is_sparse(override, reason, runs, tmp_path):
    spaced = reason if reason.startswith(":") else f" {reason}"
    expected = f"compress_gradients has no effect{spaced}"
    assert on_two(prepared(tmp_path, override)) == [("gradients", expected)]


def test_without_the_key_the_plan_says_nothing(runs, tmp_path):
    run = prepared(tmp_path, "training={threads: 1}")
    assert on_two(run) == []


# The hook


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_ddp_gets_the_hook_also_where_it_is_compiled(compiled):
    pruner = one_epoch(SmallNet(), 1, method="ck")
    ddp = DistributedDataParallel(SmallNet())
    model: Any = torch.compile(ddp, backend="eager") if compiled else ddp
    _compress_gradients(model, pruner)
    ((hook, state),) = ddp._comm_hooks
    assert hook is masked_allreduce_hook
    assert isinstance(state, MaskedAllreduceState)
    assert state.pruner is pruner


def test_a_model_that_nothing_wraps_is_left_alone():
    model = SmallNet()
    _compress_gradients(model, one_epoch(model, 1, method="ck"))
    assert not hasattr(model, "_comm_hooks")


# Two processes


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_whole_gradients(tmp_path):
    overrides = ("epochs=4", "pruning.era=[1, 2]", "lr_schedule.milestones=[3]")
    for key in ("false", "true"):
        given = setting(*overrides, f"training.compress_gradients={key}")
        main, other = launch_two("recipes/quickstart.yaml", *given, "--output", tmp_path / key)
        text = output_of(main)
        output_of(other)
        assert ("averaged per update" in text) == (key == "true")
    whole, kept = (exported(tmp_path / key) for key in ("false", "true"))
    assert equal_states(whole, kept)
