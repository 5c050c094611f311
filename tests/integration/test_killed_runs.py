"""Training runs that meet with kills, full disks and skipped steps end as unbroken ones do."""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from starfire_prune import Pruner
from starfire_prune.data import load_datasets
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs import checkpoint
from starfire_prune.runs import data as run_data
from starfire_prune.runs import folder as run_folder
from starfire_prune.runs.checkpoint import load_checkpoint
from starfire_prune.runs.folder import RunError, exported_file
from starfire_prune.training import launch as accelerator_launch
from starfire_prune.training import train as training
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.setup import prepare_run
from starfire_prune.training.train import train
from starfire_prune.utils.errors import CheckpointError
from tests.support.processes import (
    exported,
    launch,
    output_of,
    same_exports,
    setting,
    wait_for_line,
)
from tests.support.runs import (
    Moment,
    files_of,
    make_photographs,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_killed,
    train_on,
    write_recipe,
)

EPOCHS = 4
# In the order in which they are written
CHECKPOINT_FILES = ["model.safetensors", "optimizer.pt", "masks.safetensors", "state.json"]
MOMENTS: list[Moment] = ["after the checkpoint", "before the checkpoint", "within the epoch"]

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(
    scope="module", params=["sgd on digits", pytest.param("adam on photographs", marks=forks)]
)
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe, and the folder of its run that nothing has killed, with all checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = small_recipe(folder)
    if request.param == "adam on photographs":
        root = make_photographs(folder / "photographs")
        recipe = small_recipe(
            folder,
            f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 2}}",
            "model.num_classes=2",
            "optimizer={name: adam, lr: 0.01}",
            "training={threads: 1, gradient_accumulation: 2}",
        )
    with small_runs() as patch:
        patch.setattr(checkpoint, "KEPT_CHECKPOINTS", EPOCHS)
        train(recipe, folder / "run")
    return recipe, folder / "run"


on_digits = pytest.mark.parametrize("unbroken", ["sgd on digits"], indirect=True)


def kill(data: str, moment: Moment) -> Any:
    """A kill of a run; of the photographs, only the kills of an epoch under way are not slow."""
    marks: list[pytest.MarkDecorator] = []
    if data == "adam on photographs":
        marks = [forks] if moment == "within the epoch" else [forks, pytest.mark.slow]
    return pytest.param(data, moment, marks=marks, id=f"{data}-{moment}")


@pytest.mark.parametrize(
    ("unbroken", "moment"),
    [kill(data, moment) for data in ("sgd on digits", "adam on photographs") for moment in MOMENTS],
    indirect=["unbroken"],
)
def test_a_run_killed_in_every_epoch_ends_with_the_bits_of_the_unbroken_one(
    moment, unbroken, runs, tmp_path
):
    recipe, whole = unbroken
    broken = tmp_path / "run"
    for epoch in range(EPOCHS):
        train_killed(recipe, broken, epoch, moment)
        last = f"checkpoints/epoch-{epoch + (moment == 'after the checkpoint'):04d}"
        assert files_of(broken / last) == files_of(whole / last)
    train_on(recipe, broken)
    assert metrics_of(broken) == metrics_of(whole)
    assert files_of(broken / "checkpoints" / "epoch-0004") == files_of(
        whole / "checkpoints" / "epoch-0004"
    )
    assert same_exports(broken, whole)


@pytest.fixture
def overflowing(request: pytest.FixtureRequest, runs: pytest.MonkeyPatch) -> str:
    """A gradient scaler, and gradients that are too large for its first steps; the precision.

    On a GPU (the parameter) it scales fp16; on the CPU, which has none, float32 as if it were so.
    """
    device = getattr(request, "param", "cpu")
    accelerator_of, loss_of = accelerator_launch.create_accelerator, nn.CrossEntropyLoss.forward

    def scaled(recipe: Recipe, folder: Path) -> Accelerator:
        accelerator = accelerator_of(recipe, folder)
        accelerator.scaler = torch.amp.GradScaler(
            device,
            init_scale=2.0**127 if device == "cpu" else 2.0**30,
            backoff_factor=0.1,
            growth_interval=3,
        )
        return accelerator

    def large(module: nn.CrossEntropyLoss, logits: Tensor, labels: Tensor) -> Tensor:
        return 1e3 * loss_of(module, logits, labels)

    runs.setattr(training, "create_accelerator", scaled)
    runs.setattr(nn.CrossEntropyLoss, "forward", large)
    if device == "cpu":
        return "no"
    runs.delenv("ACCELERATE_USE_CPU")
    return "fp16"


@pytest.fixture
def noted_steps(runs: pytest.MonkeyPatch) -> list[tuple[bool, str, float]]:
    """Of every step of the pruner, whether it was an update, the phase and the target_sparsity."""
    noted: list[tuple[bool, str, float]] = []
    step = Pruner.step

    def note(pruner: Pruner, updated: bool = True) -> None:
        step(pruner, updated)
        noted.append((updated, pruner.phase, pruner.target_sparsity))

    runs.setattr(Pruner, "step", note)
    return noted


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
scaled_devices = pytest.mark.parametrize(
    "overflowing", ["cpu", pytest.param("cuda", marks=needs_a_gpu)], indirect=True
)


@scaled_devices
def test_steps_that_a_gradient_scaler_skips_are_no_updates(overflowing, noted_steps, tmp_path):
    precision = f"training={{threads: 1, mixed_precision: '{overflowing}'}}"
    recipe = small_recipe(tmp_path, "pruning.era=[0, 4]", "optimizer.lr=5.0e-5", precision)
    train(recipe, tmp_path / "run")
    updated = [is_update for is_update, _, _ in noted_steps]
    assert 0 < updated.index(True) < 12
    for steps, (_, _, target_sparsity) in enumerate(noted_steps, start=1):
        assert target_sparsity == pytest.approx(0.6 * sum(updated[:steps]) / 16)
    targets = [row["target_sparsity"] for row in metrics_of(tmp_path / "run")]
    done = [sum(updated[:end]) for end in (4, 8, 12)]
    assert targets == pytest.approx([*(0.6 * updates / 16 for updates in done), 0.6])


@scaled_devices
def test_skipped_steps_leave_the_end_of_the_era_exact(overflowing, noted_steps, tmp_path):
    precision = f"training={{threads: 1, mixed_precision: '{overflowing}'}}"
    recipe = small_recipe(tmp_path, "pruning.era=[0, 3]", "optimizer.lr=5.0e-5", precision)
    train(recipe, tmp_path / "run")
    assert not all(is_update for is_update, _, _ in noted_steps[:12])
    assert [phase for _, phase, _ in noted_steps[11:]] == ["era", *["fixed"] * 4]
    assert noted_steps[11][2] < 0.6  # the schedule was short of it
    rows = metrics_of(tmp_path / "run")
    assert [row["target_sparsity"] for row in rows[2:]] == [0.6, 0.6]
    for name, weight in exported(tmp_path / "run").items():
        if weight.ndim == 4:
            gone = ~weight.flatten(2).any(2)
            asked = math.floor(0.6 * weight.shape[0] + 0.5)
            assert gone.sum(0).tolist() == [asked] * weight.shape[1], name


@pytest.mark.usefixtures("overflowing")
def test_a_run_with_a_gradient_scaler_is_resumed_with_its_state(tmp_path):
    recipe = small_recipe(tmp_path, "pruning.era=[0, 4]", "optimizer.lr=5.0e-5")
    train_on(recipe, tmp_path / "whole")
    for epoch in range(EPOCHS):
        train_killed(recipe, tmp_path / "broken", epoch, "after the checkpoint")
    train_on(recipe, tmp_path / "broken")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "whole")
    assert same_exports(tmp_path / "broken", tmp_path / "whole")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe and the folder of a run that was killed in its third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with small_runs():
        train_killed(small_recipe(folder), folder / "run", 2, "within the epoch")
    return folder


@pytest.fixture
def broken(killed: Path, runs: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the run that was killed."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_a_kill_before_the_first_checkpoint_starts_anew(runs, tmp_path):
    recipe = small_recipe(tmp_path, "epochs=3")
    train_killed(recipe, tmp_path / "run", 0, "before the checkpoint")
    assert len(metrics_of(tmp_path / "run")) == 1
    train_on(recipe, tmp_path / "run")
    assert [row["epoch"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]


def test_a_line_of_metrics_that_a_kill_cut_short_is_dropped(broken):
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_l')
    train_on(small_recipe(broken.parent), broken)
    assert [row["epoch"] for row in metrics_of(broken)] == list(range(EPOCHS))


def test_resume_goes_on_after_the_epochs_that_are_done(broken, capsys):
    new_process()
    train(small_recipe(broken.parent), broken, resume=True)
    assert f"\nresumed {broken} after 2 of 4 epochs\nepoch 3/4 " in capsys.readouterr().out


def test_only_the_last_two_checkpoints_are_kept(broken):
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == [
        "epoch-0001",
        "epoch-0002",
    ]


def test_resume_of_another_recipe_is_refused_with_the_keys_that_differ(broken):
    before = files_of(broken)
    other = small_recipe(broken.parent, "pruning.amount=0.7", "data.batch_size=8")
    with pytest.raises(RunError) as caught:
        train_on(other, broken)
    assert str(caught.value) == (
        f"{broken} holds the run of another recipe (data.batch_size: 16 there, 8 now; "
        f"pruning.amount: 0.6 there, 0.7 now): choose another --output, or delete the folder"
    )
    assert files_of(broken) == before


def test_a_run_killed_before_its_export_is_finished(broken, runs):
    def die(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    recipe = small_recipe(broken.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_pruned", die)
        with pytest.raises(KeyboardInterrupt):
            train_on(recipe, broken)
    train_on(recipe, broken)
    assert exported(broken)
    assert len(metrics_of(broken)) == EPOCHS


def test_another_number_of_threads_is_refused_with_the_way_to_launch(runs, tmp_path):
    torch.set_num_threads(1)
    recipe = small_recipe(tmp_path, "training={}")
    train_killed(recipe, tmp_path / "run", 1, "within the epoch")
    torch.set_num_threads(2)
    with pytest.raises(
        RunError,
        match=r"was trained with threads = 1, and now it is 2: .*: OMP_NUM_THREADS=1$",
    ):
        train_on(recipe, tmp_path / "run")


def test_the_threads_of_the_recipe_count_whatever_the_launch(broken):
    torch.set_num_threads(2)
    train_on(small_recipe(broken.parent), broken)
    assert torch.get_num_threads() == 1


def test_checkpoints_without_their_recipe_are_refused(broken):
    (broken / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"run holds checkpoints but not the recipe\.yaml they"):
        train_on(small_recipe(broken.parent, "pruning.amount=0.7"), broken)


@pytest.mark.parametrize("content", [None, "", "[]", '{"seed": 3}'])
def test_an_environment_that_cannot_be_read_is_refused(content, broken):
    (broken / "environment.json").unlink()
    if content is not None:
        (broken / "environment.json").write_text(content)
    with pytest.raises(RunError, match=r"environment\.json of the run can't be read: restore it"):
        train_on(small_recipe(broken.parent), broken)


@pytest.mark.parametrize("line", ["not JSON", "3", "{}", '{"epoch": null}'])
def test_damaged_metrics_are_refused_with_their_file(line, broken):
    (broken / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged \(.*\): repair or delete it$"):
        train_on(small_recipe(broken.parent), broken)


def test_lost_metrics_do_not_keep_a_run_from_its_end(runs, tmp_path):
    recipe = small_recipe(tmp_path)
    train_killed(recipe, tmp_path / "run", 3, "after the checkpoint")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train_on(recipe, tmp_path / "run")
    assert exported(tmp_path / "run")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(broken):
    recipe, last = small_recipe(broken.parent), broken / "checkpoints" / "epoch-0002"
    (last / "optimizer.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"optimizer\.pt can't be loaded: .*delete the folder"
    ):
        train_on(recipe, broken)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train_on(recipe, broken)
    assert [row["epoch"] for row in metrics_of(broken)] == list(range(EPOCHS))


def test_a_checkpoint_of_other_data_is_refused(runs, tmp_path):
    root = make_photographs(tmp_path / "photographs")
    data = f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 0}}"
    recipe = small_recipe(tmp_path, data, "model.num_classes=2")
    train_killed(recipe, tmp_path / "run", 2, "within the epoch")
    for index in range(10, 14):
        (root / "train" / "ant" / f"{index}.png").unlink()
        (root / "train" / "bee" / f"{index}.png").unlink()
    with pytest.raises(CheckpointError, match="other settings of updates_per_epoch: resume with"):
        train_on(recipe, tmp_path / "run")


def test_a_full_disk_costs_the_epoch_that_was_under_way(unbroken, runs, tmp_path):
    recipe, whole = unbroken
    run, save = tmp_path / "run", torch.save

    def fill(state: Any, file: Any) -> None:
        if "epoch-0003" in str(file.name):
            raise OSError(28, "No space left on device")
        save(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(CheckpointError) as caught:
            train_on(recipe, run)
    assert str(caught.value) == (
        f"{run}/checkpoints/epoch-0003 can't be written: No space left on device; earlier files "
        f"are intact: make room and run the same command again"
    )
    assert sorted(os.listdir(run / "checkpoints")) == ["epoch-0001", "epoch-0002"]
    train_on(recipe, run)
    assert same_exports(run, whole)
    assert metrics_of(run) == metrics_of(whole)


# Real disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=4m", "-t", "tmpfs", "tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def mount(disk: Path, options: str, *arguments: str) -> None:
    command = ["mount", "-o", options, *arguments, str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"can't mount a tmpfs: {done.stderr.strip()}")


def fill(disk: Path, left: int = 0) -> None:
    """Write a file that leaves so many pages of 4 KiB."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with suppress(OSError):  # that no space is left
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - 4096 * left)


def make_room(disk: Path) -> None:
    mount(disk, "remount,size=8m")


def assert_same_runs(run: Path, whole: Path) -> None:
    """That a broken run has ended with what the unbroken one has left."""
    assert metrics_of(run) == metrics_of(whole)
    assert same_exports(run, whole)
    last = max((whole / "checkpoints").iterdir())
    assert files_of(run / "checkpoints" / last.name) == files_of(last)


def assert_checkpoints_load(recipe: Recipe, run: Path) -> None:
    """Load each checkpoint of a run, as resuming does it, which compares the files' hashes."""
    new_process()
    for checkpoint_of_epoch in (run / "checkpoints").glob("epoch-*"):
        own = prepare_run(recipe, run, create_accelerator(recipe, run), fresh=False)
        load_checkpoint(checkpoint_of_epoch, own.model, own.optimizer, own.pruner)


@on_digits
@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_disk_that_is_full_at_any_file_of_a_checkpoint_costs_one_epoch(
    file, unbroken, small_disk, runs
):
    recipe, whole = unbroken
    run, append = small_disk / "run", run_folder.append_metrics
    files = list(map((whole / "checkpoints" / "epoch-0003").joinpath, CHECKPOINT_FILES))
    left = sum(-(-path.stat().st_size // 4096) for path in files[: CHECKPOINT_FILES.index(file)])

    def append_and_fill(folder: Path, metrics: Any) -> None:
        append(folder, metrics)
        if metrics["epoch"] == 2:
            fill(small_disk, left)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "append_metrics", append_and_fill)
        with pytest.raises(
            CheckpointError,
            match=r"epoch-0003 can't be written: .*No space left on device.*; earlier files "
            r"are intact: make room and run the same command again$",
        ):
            train_on(recipe, run)
    assert sorted(os.listdir(run / "checkpoints")) == ["epoch-0001", "epoch-0002"]
    assert_checkpoints_load(recipe, run)
    make_room(small_disk)
    train_on(recipe, run)
    assert_same_runs(run, whole)


@on_digits
@pytest.mark.parametrize("file", ["metrics.jsonl", "training.png"])
def test_a_disk_that_is_full_at_the_metrics_or_the_picture_is_named(file, unbroken, small_disk):
    recipe, whole = unbroken
    run = small_disk / "run"
    name = "append_metrics" if file == "metrics.jsonl" else "plot_training"
    write = getattr(training, name)

    def fill_and_write(*args: Any, **options: Any) -> None:
        fill(small_disk)
        write(*args, **options)

    with small_runs(plot=True) as patch:
        patch.setattr(training, name, fill_and_write)
        with pytest.raises(CheckpointError) as caught:
            train_on(recipe, run)
    assert str(caught.value) == (
        f"{run}/{file} can't be written: No space left on device; earlier files are intact: "
        f"make room and run the same command again"
    )
    make_room(small_disk)
    with small_runs():
        train_on(recipe, run)
    assert_same_runs(run, whole)


@pytest.mark.slow
def test_the_command_tells_a_full_disk_and_goes_on_once_there_is_room(small_disk, runs, tmp_path):
    runs.setattr(run_data, "load_datasets", load_datasets)
    overrides = ("epochs=20", "pruning.era=[5, 15]", "data.batch_size=200")
    recipe = small_recipe(tmp_path, *overrides)
    arguments: list[str | Path] = [write_recipe(tmp_path), *setting(*overrides)]
    whole, run = tmp_path / "whole", small_disk / "run"
    output_of(launch(*arguments, "--output", whole))
    process = launch(*arguments, "--output", run)
    wait_for_line(process, "epoch 1/20 ")
    fill(small_disk)
    last = output_of(process, status=2).splitlines()[-1]
    failed = re.fullmatch(
        rf"train\.py: {re.escape(str(run))}/checkpoints/epoch-(\d{{4}}) can't be written: "
        r".*No space left on device.*; earlier files are intact: make room and run the same "
        r"command again",
        last,
    )
    assert failed
    kept = [epoch for epoch in (int(failed[1]) - 2, int(failed[1]) - 1) if epoch]
    assert sorted(os.listdir(run / "checkpoints")) == [f"epoch-{epoch:04d}" for epoch in kept]
    assert_checkpoints_load(recipe, run)
    make_room(small_disk)
    output_of(launch(*arguments, "--output", run, "--resume"))
    assert_same_runs(run, whole)


# Real kills


def half_written(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written or removed, or that a kill has left so, and since when."""
    found = set()
    for path in (run / "checkpoints").glob(".epoch-*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill_after(process: subprocess.Popen[str], wait_s: float) -> bool:
    """Kill a process and its children after a while; whether it still lived then."""
    try:
        output, _ = process.communicate(timeout=wait_s)
    except subprocess.TimeoutExpired:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode != 0


def wait_for_a_save(process: subprocess.Popen[str], run: Path) -> None:
    """Wait until a process writes a checkpoint, or ends."""
    left = half_written(run)
    while process.poll() is None and not half_written(run) - left:
        time.sleep(0.0005)


@pytest.mark.slow
def test_a_run_killed_at_20_moments_of_its_life_ends_with_the_same_bits(runs, tmp_path):
    """Of four kills of a run, three are at random moments and one is within a save."""
    root = make_photographs(tmp_path / "photographs", train=40)
    overrides = (
        f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 2}}",
        "model.num_classes=2",
        "epochs=12",
        "pruning.era=[2, 10]",
    )
    recipe = small_recipe(tmp_path, *overrides)
    arguments: list[str | Path] = [write_recipe(tmp_path), *setting(*overrides)]
    whole, moments = tmp_path / "whole", random.Random(0)
    began = time.perf_counter()
    output_of(launch(*arguments, "--output", whole))
    life_s = time.perf_counter() - began
    run, kills, kills_within_a_save, ended = tmp_path / "run0", 0, 0, 0
    while kills < 20:
        assert ended < 20, "runs end before they are killed"
        left, is_last = half_written(run), kills % 4 == 3
        process = launch(*arguments, "--output", run)
        if is_last:
            wait_for_a_save(process, run)
            wait_s = 0.0025 * (kills // 4)  # a save takes about 10 ms
        else:
            wait_s = moments.uniform(0.0, life_s)
        killed = kill_after(process, wait_s)
        kills += killed
        if not killed:  # resumed runs are shorter, and the machine may be faster now
            life_s *= 0.8
        kills_within_a_save += bool(half_written(run) - left)
        assert_checkpoints_load(recipe, run)
        if killed and is_last and not exported_file(run).is_file():
            output_of(launch(*arguments, "--output", run))
        if exported_file(run).is_file():
            assert_same_runs(run, whole)
            ended += 1
            run = tmp_path / f"run{ended}"
    assert ended >= 5
    assert kills_within_a_save >= 1
