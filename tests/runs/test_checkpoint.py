"""Checkpoints: what they restore, refuse and survive."""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from starfire_prune.runs import checkpoint
from starfire_prune.runs.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from starfire_prune.serialization.pruned import save_pruned
from starfire_prune.utils.errors import CheckpointError
from tests.support.networks import LAYERS, SmallNet, train_step
from tests.support.training import PHASES, Training, same, updates_in

FILES = ["masks.safetensors", "model.safetensors", "optimizer.pt", "state.json"]


# In the midst of the era, with the optimizer's state of five updates
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Training(5).save(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


# Saved and restored


@pytest.mark.parametrize("phase", PHASES)
def test_a_checkpoint_restores_model_masks_and_optimizer(phase, tmp_path):
    first, second = Training(updates_in(phase)), Training(seed=1)
    assert first.pruner.phase == phase
    second.load(first.save(tmp_path))
    assert second.pruner.phase == phase
    assert same(first.tensors(), second.tensors())


@pytest.mark.parametrize("phase", PHASES)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(phase, tmp_path):
    updates = updates_in(phase)
    first, second = Training(updates), Training(seed=1)
    second.load(first.save(tmp_path))
    for training in (first, second):
        training.go_on(range(updates, 9))
    assert same(first.tensors(), second.tensors())


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("other", PHASES)
def test_a_checkpoint_can_be_loaded_in_any_phase(phase, other, tmp_path):
    first, second = Training(updates_in(phase)), Training(updates_in(other), seed=1)
    second.load(first.save(tmp_path))
    assert same(first.tensors(), second.tensors())
    second.pruner.check()


def test_a_checkpoint_restores_channels_last_weights_in_their_format(tmp_path):
    first, second = Training(5), Training(seed=1)
    second.model.to(memory_format=torch.channels_last)
    second.load(first.save(tmp_path))
    weight = second.model.get_parameter("body.weight_orig")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, first.model.get_parameter("body.weight_orig"))


def test_a_wrapped_model_is_saved_and_loaded_as_the_model_itself(tmp_path):
    first, second = Training(5), Training(seed=1)
    path = save_checkpoint(tmp_path, 2, nn.DataParallel(first.model), first.optimizer, first.pruner)
    load_checkpoint(path, nn.DataParallel(second.model), second.optimizer, second.pruner)
    assert same(first.tensors(), second.tensors())


def test_a_checkpoint_without_pruning_restores_a_dense_model(tmp_path):
    models = [SmallNet(seed) for seed in (0, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
    train_step(models[0], optimizers[0], 0)
    path = save_checkpoint(tmp_path, 1, models[0], optimizers[0], extra={"scale": 2.0})
    state = load_checkpoint(path, models[1], optimizers[1])
    assert (state["epoch"], state["extra"]) == (1, {"scale": 2.0})
    assert sorted(os.listdir(path)) == ["model.safetensors", "optimizer.pt", "state.json"]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_step(model, optimizer, 1)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_all_files_but_the_optimizers_are_json_and_safetensors(saved):
    assert sorted(os.listdir(saved)) == FILES
    assert json.loads((saved / "state.json").read_text())["epoch"] == 2
    assert load_file(saved / "masks.safetensors").keys() == {f"{name}.weight" for name in LAYERS}


# Which are kept


def test_the_last_two_checkpoints_are_kept(tmp_path):
    training = Training()
    for epoch in (1, 2, 3, 4):
        assert training.save(tmp_path, epoch) == tmp_path / f"epoch-{epoch:04d}"
    assert sorted(os.listdir(tmp_path)) == ["epoch-0003", "epoch-0004"]


def test_the_latest_checkpoint_is_that_of_the_most_epochs(tmp_path):
    training = Training()
    for epoch in (9999, 10000, 10001):
        training.save(tmp_path, epoch)
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch-10001"
    assert sorted(os.listdir(tmp_path)) == ["epoch-10000", "epoch-10001"]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_without_checkpoints_there_is_no_latest_one(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert latest_checkpoint(tmp_path / folder) is None


@pytest.mark.parametrize("left", [".epoch-0002.tmp", ".epoch-0001.old", ".epoch-0002.old"])
def test_what_a_kill_left_is_no_checkpoint_and_is_cleared_away(left, tmp_path):
    training = Training()
    training.save(tmp_path, 1)
    (tmp_path / left).mkdir()
    (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch-0001"
    for epoch in (2, 3):
        training.save(tmp_path, epoch)
    assert sorted(os.listdir(tmp_path)) == ["epoch-0002", "epoch-0003"]


def test_other_files_among_the_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "epoch-best").mkdir()
    (tmp_path / "notes.txt").touch()
    for epoch in (1, 2, 3):
        Training().save(tmp_path, epoch)
    assert {"epoch-best", "notes.txt"} < set(os.listdir(tmp_path))


# Refused


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut short", "overwritten", "a flipped bit"]
)
def test_a_damaged_file_is_refused_with_its_name_and_the_way_out(file, damage, copied):
    path = copied / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        path.write_bytes(b"\0" * len(content))
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Training().load(copied)
    message = str(caught.value)
    assert message.startswith(f"{path} can't be loaded: ")
    assert message.endswith(
        f"; to continue from the checkpoint before it, delete the folder {copied}"
    )
    assert "\n" not in message


@pytest.mark.parametrize("state", ["[]", "{}", '{"epoch": 2, "extra": {}}', "null"])
def test_json_that_is_no_state_is_refused(state, copied):
    (copied / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=r"state\.json can't be loaded: "):
        Training().load(copied)


def resigned(path: Path) -> None:
    """Let the checkpoint take its files for those that were saved."""
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in state["sha256"]
    }
    state["state_sha256"] = checkpoint._own_sum(state)
    (path / "state.json").write_text(json.dumps(state))


def test_no_bit_of_the_state_flips_unseen(copied):
    path = copied / "state.json"
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]]))
        same = _parsed(path.read_bytes()) == _parsed(content)  # one white space for another
        if not same:
            with pytest.raises(CheckpointError, match=r"state\.json can't be loaded: "):
                Training().load(copied)


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_checkpoint_under_the_name_of_another_epoch_is_refused(copied):
    other = copied.rename(copied.with_name("epoch-0005"))
    with pytest.raises(CheckpointError, match=r"belongs to epoch 2, unlike its folder.s name"):
        Training().load(other)


def test_a_checkpoint_under_a_name_of_its_own_is_loaded(copied):
    Training().load(copied.rename(copied.with_name("best")))


def test_a_checkpoint_without_a_checksum_of_its_own_is_told_to_be_older(copied):
    path = copied / "state.json"
    state = json.loads(path.read_text())
    del state["state_sha256"]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="it has no checksum for itself: an earlier version"):
        Training().load(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": 5},
        {"sha256": {}},
        {"sha256": {"model.safetensors": "", "optimizer.pt": ""}},
        {"epoch": True},
    ],
)
def test_a_forged_state_is_refused(change, copied):
    path = copied / "state.json"
    state = json.loads(path.read_text()) | change
    path.write_text(json.dumps({**state, "state_sha256": checkpoint._own_sum(state)}))
    with pytest.raises(CheckpointError, match=r"state\.json can't be loaded: it "):
        Training().load(copied)


def test_what_is_kept_along_may_have_keys_that_are_numbers(tmp_path):
    training = Training()
    extra = {"seen": {2: 1, 10: 3}}
    path = save_checkpoint(tmp_path, 1, training.model, training.optimizer, extra=extra)
    state = load_checkpoint(path, training.model, training.optimizer)
    assert state["extra"] == {"seen": {"2": 1, "10": 3}}


class Poison:
    """What pickle would make a folder of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["of torch", "plain"])
def test_a_poisoned_file_is_refused_and_not_executed(kind, copied, tmp_path):
    poison, path = {"state": Poison(tmp_path / "executed")}, copied / "optimizer.pt"
    if kind == "of torch":
        torch.save(poison, path)
    else:
        path.write_bytes(pickle.dumps(poison, protocol=2))
    resigned(copied)
    with pytest.raises(CheckpointError) as caught:
        Training().load(copied)
    assert str(caught.value).startswith(
        f"{path} can't be loaded: it is damaged, or holds more than tensors and "
        f"plain values; to continue"
    )
    assert not (tmp_path / "executed").exists()
    if kind == "of torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists()  # the poison works


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"amount": 0.7}, "amount"),
        ({"era": [1, 3], "schedule": "cubic"}, "era, schedule"),
        ({"fc": "none"}, "fc"),
    ],
)
def test_state_of_other_settings_is_refused_with_their_names(settings, names, saved):
    with pytest.raises(
        CheckpointError, match=f"^{re.escape(str(saved))}: .* other settings of {names}: resume"
    ):
        Training(**settings).load(saved)


def test_state_of_another_model_is_refused(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["bn2.weight"]
    save_file(weights, copied / "model.safetensors")
    resigned(copied)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors can\'t be loaded: .*bn2\.weight"
    ):
        Training().load(copied)


def test_state_of_another_optimizer_is_refused(saved):
    training = Training()
    groups = [{"params": [parameter]} for parameter in training.model.parameters()]
    training.optimizer = torch.optim.Adam(groups)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt can't be loaded: .*parameter groups"):
        training.load(saved)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_checkpoint_with_pruning_and_a_run_without_do_not_go_together(pruned, saved, tmp_path):
    training = Training()
    dense = save_checkpoint(tmp_path, 2, training.model, training.optimizer)
    with pytest.raises(CheckpointError, match="only one of the checkpoint and the recipe prunes"):
        load_checkpoint(
            saved if pruned else dense,
            training.model,
            training.optimizer,
            None if pruned else training.pruner,
        )


def test_a_model_whose_pruning_does_not_hold_is_not_saved(tmp_path):
    training = Training(7)
    training.save(tmp_path, 1)
    with torch.no_grad():
        training.model.body.weight.fill_(1.0)
    for write in (
        lambda: training.save(tmp_path, 2),
        lambda: save_pruned(
            training.model, tmp_path / "model.safetensors", pruner=training.pruner, unfinished=True
        ),
    ):
        with pytest.raises(RuntimeError, match=r"layer body: \d+ pruned weights are not zero"):
            write()
    assert os.listdir(tmp_path) == ["epoch-0001"]


# A full disk


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Let writes beyond a size fail, as those on a full disk do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class WideNet(nn.Sequential):
    """100 kB of weights, twice as much of optimizer state."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(250, 100))


def wide_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = WideNet()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 250)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("size_bytes", "file"), [(50_000, "model.safetensors"), (150_000, "optimizer.pt")]
)
def test_a_write_that_fails_leaves_the_earlier_checkpoints_whole(size_bytes, file, tmp_path):
    model, optimizer = wide_training()
    for epoch in (1, 2):
        save_checkpoint(tmp_path, epoch, model, optimizer)
    with files_of_at_most(size_bytes), pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 3, model, optimizer)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/epoch-0003 can't be written: ")
    assert "File too large" in message
    assert message.endswith("; earlier files are intact: make room and run the same command again")
    assert sorted(os.listdir(tmp_path)) == ["epoch-0001", "epoch-0002"]
    for epoch in (1, 2):
        load_checkpoint(tmp_path / f"epoch-000{epoch}", model, optimizer)


@pytest.mark.parametrize(
    "writer", ["save_model", "save_file", "torch.save", "json.dumps", "_sha256"]
)
def test_an_error_in_the_midst_of_a_checkpoint_leaves_nothing_of_it(writer, tmp_path, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    training = Training(5)
    training.save(tmp_path, 1)
    owner = checkpoint if "." not in writer else getattr(checkpoint, writer.partition(".")[0])
    with monkeypatch.context() as patch:
        patch.setattr(owner, writer.rpartition(".")[2], fail)
        with pytest.raises(
            CheckpointError, match=r"epoch-0002 can't be written: No space left on device; earlier"
        ):
            training.save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["epoch-0001"]
    Training().load(tmp_path / "epoch-0001")


def test_an_export_that_fails_leaves_the_earlier_one_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    model, _ = wide_training()
    save_pruned(model, path)
    content = path.read_bytes()
    with files_of_at_most(50_000), pytest.raises(CheckpointError, match="can't be written: "):
        save_pruned(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    training = Training()
    for epoch in (1, 2):
        training.save(tmp_path, epoch)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        training.save(tmp_path, 3)
    training.save(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["epoch-0003", "epoch-0004"]


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_the_first_writes(rank, tmp_path, monkeypatch):
    training = Training()
    monkeypatch.setattr(training.pruner, "check", lambda: None)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    training.save(tmp_path, 1)
    save_pruned(
        training.model, tmp_path / "model.safetensors", pruner=training.pruner, unfinished=True
    )
    assert len(os.listdir(tmp_path)) == (2 if rank == 0 else 0)


@pytest.mark.parametrize("write", ["checkpoint", "export"])
def test_every_rank_takes_part_in_the_comparison_of_masks(write, tmp_path, monkeypatch):
    training, checked = Training(), []
    monkeypatch.setattr(training.pruner, "check", lambda: checked.append(True))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    if write == "checkpoint":
        training.save(tmp_path)
    else:
        save_pruned(
            training.model, tmp_path / "model.safetensors", pruner=training.pruner, unfinished=True
        )
    assert checked == [True]
