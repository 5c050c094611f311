"""Training runs of several processes and machines, and what counts as an update there."""

import json
import math
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from starfire_prune import Pruner
from starfire_prune.data import load_datasets
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.runs import data as run_data
from starfire_prune.runs.folder import RunError
from starfire_prune.training import launch as accelerator_launch
from starfire_prune.training import setup as preparation
from starfire_prune.training.train import train
from tests.support.networks import SmallNet
from tests.support.paths import ROOT
from tests.support.processes import (
    launch,
    launch_two,
    notes_of,
    output_of,
    same_exports,
    setting,
    torchrun,
    wait_for_line,
)
from tests.support.runs import metrics_of, small_recipe, write_recipe
from tests.support.shards import write_shards

EPOCHS = 4
ERA = (1, 3)
IMAGES = 1437  # of the digits, to train on
# The shape of the quickstart's run, in seconds
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALLER = (
    "model.options={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
    "data.image_size=16",
    "lr_schedule.milestones=[2]",
    f"epochs={EPOCHS}",
    f"pruning.era={list(ERA)}",
)
# 64 images an update of two processes
ON_TWO = (*SMALLER, "data.batch_size=16", "training={threads: 1, gradient_accumulation: 2}")
UPDATES = math.ceil(IMAGES / 64)  # an epoch


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the quickstart on two processes, with their notes."""
    folder = tmp_path_factory.mktemp("two_ranks")
    output_of(torchrun(folder, QUICKSTART, *setting(*ON_TWO), "--output", folder / "run"))
    return folder


def thresholds_of_the_era(updates: int) -> list[float]:
    """Of the quickstart: 60 %, linearly, at each update of so many an epoch."""
    total = (ERA[1] - ERA[0]) * updates
    return [0.6 * update / total for update in range(1, total + 1)]


# Masks


@pytest.mark.slow
def test_ranks_have_the_same_masks_after_every_update(two_ranks):
    one, other = (notes_of(two_ranks, rank, "update") for rank in range(2))
    assert one == other
    assert len(one) == EPOCHS * UPDATES
    hashes = [mask_hash for _, phase, _, mask_hash in one if phase != "dense"]
    assert len(set(hashes[: 2 * UPDATES])) == 2 * UPDATES  # they change at each update of the era
    assert len(set(hashes[2 * UPDATES - 1 :])) == 1


TAMPERED = UPDATES + 5  # the update after which rank 1 loses a weight, in the era's first epoch


def assert_refused(folder: Path) -> None:
    """That both ranks of a tampered run have ended with an error where epoch 2 would be saved."""
    one, other = (notes_of(folder, rank, "update") for rank in range(2))
    assert one[:TAMPERED] == other[:TAMPERED]
    assert all(a[-1] != b[-1] for a, b in zip(one[TAMPERED:], other[TAMPERED:], strict=True))
    assert len(one) == len(other) == 2 * UPDATES
    for rank in range(2):
        assert notes_of(folder, rank, "error") == [
            "the pruning masks of rank(s) 1 differ from those of rank 0: the ranks' weights have "
            "drifted apart"
        ]
    assert os.listdir(folder / "run" / "checkpoints") == ["epoch-0001"]


@pytest.mark.slow
def test_ranks_refuse_masks_that_differ_at_the_next_checkpoint(tmp_path):
    arguments = (QUICKSTART, *setting(*ON_TWO), "--output", tmp_path / "run")
    output_of(torchrun(tmp_path, *arguments, TAMPER=str(TAMPERED)), status=1)
    assert_refused(tmp_path)


@pytest.mark.slow
def test_ranks_are_sent_batch_norms_buffers_and_no_masks(two_ranks):
    recipe = load_recipe(QUICKSTART, ON_TWO)
    model = create_model(recipe.model.name, recipe.model.num_classes, **recipe.model.options)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    weights = sum(parameter.numel() for parameter in model.parameters())
    for rank in range(2):
        first, *others = notes_of(two_ranks, rank, "broadcast")
        assert first == ["dense", weights + buffers]  # as DDP wraps the model
        assert {elements for _, elements in others} == {buffers}
        assert {phase for phase, _ in others} == {"dense", "era", "fixed"}


# Machines


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, joined by `link0`: 10.0.0.1 and 10.0.0.2."""
    names = [f"starfire-{os.getpid()}-{number}" for number in range(2)]
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        link = ("link0", "netns", names[0], "type", "veth", "peer", "name", "link0")
        ip("link", "add", *link, "netns", names[1])
        for number, name in enumerate(names):
            ip("-netns", name, "address", "add", f"10.0.0.{number + 1}/24", "dev", "link0")
            ip("-netns", name, "link", "set", "link0", "up")
            ip("-netns", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            for process in ip("netns", "pids", name).split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs iproute2 to make network namespaces")
    if done.returncode:
        pytest.skip(f"can't make network namespaces: {done.stderr.strip()}")
    return done.stdout


def on_machine(
    machines: list[str], number: int, notes: Path, **environment: str
) -> subprocess.Popen[str]:
    """The quickstart's run on one of two machines, in `run` beside the notes."""
    options = ("--nnodes=2", f"--node_rank={number}", "--nproc_per_node=1")
    return torchrun(
        notes,
        QUICKSTART,
        *setting(*ON_TWO),
        "--output",
        notes / "run",
        options=(*options, "--master_addr=10.0.0.1", "--master_port=29500"),
        before=("ip", "netns", "exec", machines[number]),
        GLOO_SOCKET_IFNAME="link0",
        **environment,
    )


@pytest.mark.slow
def test_two_machines_train_with_the_masks_of_two_processes(machines, two_ranks, tmp_path):
    for process in [on_machine(machines, number, tmp_path) for number in range(2)]:
        output_of(process)
    for rank in range(2):
        for kind in ("update", "broadcast"):
            assert notes_of(tmp_path, rank, kind) == notes_of(two_ranks, rank, kind)
    assert metrics_of(tmp_path / "run") == metrics_of(two_ranks / "run")
    assert same_exports(tmp_path / "run", two_ranks / "run")


@pytest.mark.slow
def test_two_machines_refuse_masks_that_differ(machines, tmp_path):
    processes = [
        on_machine(machines, number, tmp_path, TAMPER=str(TAMPERED)) for number in range(2)
    ]
    for process in processes:
        output_of(process, status=1)
    assert_refused(tmp_path)


# Resumed


@pytest.mark.slow
def test_two_processes_train_and_resume_as_one_run(tmp_path):
    arguments: list[str | Path] = [write_recipe(tmp_path), "--set=data.batch_size=200"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for process in launch_two(*arguments, "--output", whole):
        output_of(process)
    processes = launch_two(*arguments, "--output", broken)
    wait_for_line(processes[0], "epoch 2/4 ")
    for process in processes:
        process.kill()
        process.communicate()
    for process in launch_two(*arguments, "--output", broken, "--resume"):
        output_of(process)
    assert json.loads((whole / "environment.json").read_text())["processes"] == 2
    images = [row["top1"] * 360 for row in metrics_of(whole)]  # each is evaluated once
    assert images == pytest.approx([round(count) for count in images], abs=1e-6)
    assert metrics_of(broken) == metrics_of(whole)
    assert same_exports(broken, whole)


# Updates


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Epoch and target_sparsity after every update of the runs of this process."""
    noted: list[tuple[int, float]] = []
    step = Pruner.step

    def noting(pruner: Pruner, updated: bool = True) -> None:
        step(pruner, updated)
        if updated:
            noted.append((pruner.epoch, pruner.target_sparsity))

    monkeypatch.setattr(Pruner, "step", noting)
    return noted


@pytest.mark.parametrize(("batch_size", "accumulation"), [(64, 1), (16, 4)])
def test_an_update_is_64_images_in_one_batch_or_in_several(
    batch_size, accumulation, updates, runs, tmp_path
):
    runs.setattr(run_data, "load_datasets", load_datasets)
    training_settings = f"training={{threads: 1, gradient_accumulation: {accumulation}}}"
    overrides = (*SMALLER, f"data.batch_size={batch_size}", training_settings)
    train(load_recipe(QUICKSTART, overrides), tmp_path / "run")
    assert [epoch for epoch, _ in updates] == [
        epoch for epoch in range(EPOCHS) for _ in range(UPDATES)
    ]
    first, end = ERA[0] * UPDATES, ERA[1] * UPDATES
    targets = [target_sparsity for _, target_sparsity in updates]
    assert targets[first:end] == pytest.approx(thresholds_of_the_era(UPDATES), abs=1e-12)
    assert set(targets[:first]) == {0.0}
    assert set(targets[end:]) == {0.6}
    assert [row["target_sparsity"] for row in metrics_of(tmp_path / "run")] == [0.0, 0.3, 0.6, 0.6]


@pytest.mark.slow
def test_an_update_of_two_processes_is_that_of_one(two_ranks):
    for rank in range(2):
        noted = notes_of(two_ranks, rank, "update")
        assert [epoch for epoch, *_ in noted] == [
            epoch for epoch in range(EPOCHS) for _ in range(UPDATES)
        ]
        targets = [target_sparsity for _, _, target_sparsity, _ in noted]
        first, end = ERA[0] * UPDATES, ERA[1] * UPDATES
        assert targets[first:end] == pytest.approx(thresholds_of_the_era(UPDATES), abs=1e-12)
    assert [row["target_sparsity"] for row in metrics_of(two_ranks / "run")] == [0.0, 0.3, 0.6, 0.6]


# Shards


def two_agents(tmp_path: Path, *own: tuple[str | Path, ...]) -> list[subprocess.Popen[str]]:
    """The recipe on two agents of a process each, with arguments of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, arguments in enumerate(own):
        options = ("--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1")
        where = ("--master_addr=localhost", f"--master_port={port}")
        (tmp_path / f"notes{rank}").mkdir()
        processes.append(
            torchrun(
                tmp_path / f"notes{rank}",
                write_recipe(tmp_path),
                *arguments,
                options=(*options, *where),
            )
        )
    return processes


@pytest.mark.slow
def test_ranks_of_other_recipes_are_refused_before_the_first_batch(tmp_path):
    settings = [
        ("--set=data.batch_size=200", f"--set=optimizer.lr={lr}", "--output", tmp_path / "run")
        for lr in (0.1, 0.01)
    ]
    for process in two_agents(tmp_path, *settings):
        assert (
            "the recipes of rank(s) 1 differ from those of rank 0: give all of them the same recipe"
        ) in output_of(process, status=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_that_do_not_share_the_folder_are_refused_on_resuming(tmp_path):
    arguments = (write_recipe(tmp_path), "--set=data.batch_size=200", "--output", tmp_path / "run")
    processes = launch_two(*arguments)
    wait_for_line(processes[0], "epoch 2/4 ")
    for process in processes:
        process.kill()
        process.communicate()
    own = [
        ("--set=data.batch_size=200", "--output", folder)
        for folder in (tmp_path / "run", tmp_path / "elsewhere")
    ]
    for process in two_agents(tmp_path, *own):
        assert (
            "the checkpoints to continue from of rank(s) 1 differ from those of rank 0: --output "
        ) in output_of(process, status=1)


def test_processes_that_mpi_has_joined_need_no_world_size(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    joined: Any = SimpleNamespace(num_processes=2)
    accelerator_launch._check_processes(joined)


def test_processes_that_did_not_join_are_refused(runs, monkeypatch):
    alone = Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"^WORLD_SIZE \(=2\) announces 2 processes, but Accelerate"):
        accelerator_launch._check_processes(alone)


@pytest.mark.slow
def test_two_processes_train_on_and_evaluate_every_sample_of_shards_once(tmp_path):
    write_shards(tmp_path / "shards", "train", [30, 20, 14])
    write_shards(tmp_path / "shards", "validation", [9, 14])
    data = f"data={{name: wds/numbers, root: {tmp_path / 'shards'}, image_size: 16, workers: 2}}"
    overrides = (data, "data.batch_size=8", "model.num_classes=64")
    output_of(
        torchrun(
            tmp_path, write_recipe(tmp_path), *setting(*overrides), "--output", tmp_path / "run"
        )
    )
    batches = [notes_of(tmp_path, rank, "train") for rank in range(2)]
    for epoch in range(EPOCHS):
        own = [sorted(chain(*ranks[4 * epoch : 4 * (epoch + 1)])) for ranks in batches]
        assert [len(labels) for labels in own] == [32, 32]
        assert sorted(chain(*own)) == list(range(64))
    assert batches[0][:4] != batches[0][4:8]
    for rank in range(2):  # evaluated labels are gathered: both ranks have all
        labels = list(chain(*notes_of(tmp_path, rank, "val")))
        assert [sorted(labels[23 * epoch : 23 * (epoch + 1)]) for epoch in range(EPOCHS)] == [
            list(range(23))
        ] * EPOCHS


# torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(cache_size_limit=torch._dynamo.config.cache_size_limit):
        yield  # a run raises the limit
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "sizes"), [(8, 1), (16, 2)])
@pytest.mark.usefixtures("fresh_compiler")
def test_masks_of_an_era_change_within_one_graph_to_train_and_one_to_evaluate(
    batch_size, sizes, runs, tmp_path
):
    """56 images to train on and 24 to evaluate on make batches of 8, or of 16 and 8."""
    graphs: list[int] = []
    hashes: set[str] = set()
    step = Pruner.step

    def noting(pruner: Pruner, updated: bool = True) -> None:
        step(pruner, updated)
        graphs.append(counters["stats"]["unique_graphs"])
        hashes.add(pruner.mask_hash())

    runs.setattr(Pruner, "step", noting)
    runs.setattr(preparation, "create_model", lambda *args, **options: SmallNet())
    overrides = (f"data.batch_size={batch_size}", "training.compile=true", "pruning.resolution=0")
    train(small_recipe(tmp_path, "pruning.era=[1, 4]", "epochs=5", *overrides), tmp_path / "run")
    updates = len(graphs) // 5
    era = [graph - graphs[updates] for graph in graphs[updates:]]  # since its first update
    assert era[1 : updates - 1] == [1] * (updates - 2)  # the graph with masks, compiled once
    assert era[updates - 1] == sizes
    assert era[updates:] == [2 * sizes] * 3 * updates  # one to evaluate, and no more
    assert len(hashes) > updates


# Launches that are refused


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
    ],
)
def test_a_launch_that_shards_weights_is_refused(variable, name, runs, tmp_path):
    runs.setenv(variable, "true")
    with pytest.raises(RunError, match=rf"^launched with {name}, which shards weights or "):
        train(small_recipe(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_refuses_fsdp_by_one_sentence(tmp_path):
    process = launch(
        write_recipe(tmp_path), "--output", tmp_path / "run", ACCELERATE_USE_FSDP="true"
    )
    assert output_of(process, status=2) == (
        "train.py: launched with FSDP, which shards weights or replaces the optimizer, so that "
        "masks can't be computed: launch with plain data parallelism, accelerate launch "
        "--multi_gpu\n"
    )
    assert not (tmp_path / "run").exists()
