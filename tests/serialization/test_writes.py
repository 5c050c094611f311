"""A file of a pruned model is written whole or not at all, whatever stops the writing."""

import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from starfire_prune import load_pruned, save_pruned
from starfire_prune.serialization import container as tensor_file
from starfire_prune.serialization import files
from starfire_prune.serialization.container import StoredTensor, write_tensor_file
from starfire_prune.utils.errors import CheckpointError, DamageError
from tests.runs.test_checkpoint import files_of_at_most
from tests.serialization.test_pruned import FORMS, every_form, same
from tests.support.networks import SmallNet
from tests.support.paths import ROOT

N_TENSORS = len(SmallNet().state_dict())

# Kills itself at each call of what a writer does to the disk, the last ones included, in a fork
# each, and prints which calls were reached: `write` of an open file, `fsync`, `replace`
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from starfire_prune.serialization import files
from starfire_prune import save_pruned
from tests.support.networks import SmallNet

calls = 0

def killing(function, at):
    def call(*arguments):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

class Killing:
    def __init__(self, file, at):
        self.write = killing(file.write, at)

folder, options, model = Path(sys.argv[1]), eval(sys.argv[2]), SmallNet(seed=1)
write = files.write_tensor_file
save_pruned(SmallNet(), folder / "old", **options)
old = (folder / "old").read_bytes()
at = 0
while True:
    at += 1
    path = folder / f"{at}.safetensors"
    path.write_bytes(old)
    child = os.fork()
    if child == 0:
        files.write_tensor_file = lambda file, *rest: write(Killing(file, at), *rest)
        os.fsync = killing(os.fsync, at)
        Path.replace = killing(Path.replace, at)
        save_pruned(model, path, **options)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    print(at, flush=True)
"""


class FullDisk:
    """A file on a disk that is full after so many writes."""

    def __init__(self, file: Any, writes: int) -> None:
        self.file, self.writes = file, writes

    def write(self, data: Any) -> int:
        if self.writes == 0:
            raise OSError(28, "No space left on device")
        self.writes -= 1
        written: int = self.file.write(data)
        return written


def write_until(writes: int, file: Any, *rest: Any) -> None:
    full: Any = FullDisk(file, writes)
    write_tensor_file(full, *rest)


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), repr(FORMS["compressed"])]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    points = len(done.stdout.split())
    assert points == 1 + N_TENSORS + 3  # writes; the file's and the folder's fsync, the renaming
    states = [load_pruned(tmp_path / f"{at}.safetensors") for at in range(1, points + 2)]
    old, new = (dict(SmallNet(seed).state_dict()) for seed in (0, 1))
    which = [same(state, new) for state in states]
    assert all(same(state, old) or is_new for state, is_new in zip(states, which, strict=True))
    assert which == sorted(which)
    assert which[-2:] == [True, True]  # killed after the renaming, and not killed
    assert not which[-4]


@every_form
def test_a_disk_that_is_full_at_any_write_leaves_the_old_file(form, tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", SmallNet(seed=1)
    save_pruned(SmallNet(), path, **FORMS[form])
    before = path.read_bytes()
    for writes in range(1 + N_TENSORS):
        monkeypatch.setattr(
            files,
            "write_tensor_file",
            partial(write_until, writes),
        )
        with pytest.raises(CheckpointError) as caught:
            save_pruned(model, path, **FORMS[form])
        assert str(caught.value) == (
            f"{path} can't be written: No space left on device; earlier files are intact: "
            f"make room and run the same command again"
        )
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]


@every_form
@pytest.mark.parametrize("size_bytes", [0, 100, 6_000])
def test_a_file_that_may_not_grow_leaves_the_old_one(form, size_bytes, tmp_path):
    path = tmp_path / "model.safetensors"
    save_pruned(SmallNet(), path, **FORMS[form])
    before = path.read_bytes()
    with (
        files_of_at_most(size_bytes),
        pytest.raises(CheckpointError, match="can't be written: File too large; earlier files"),
    ):
        save_pruned(SmallNet(seed=1), path, **FORMS[form])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# What a reader would refuse is not written


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("argument", "content", "message"),
    [
        ("recipe", {"clip": float("inf")}, "Out of range float values"),
        ("recipe", {"clip": [float("nan")]}, "Out of range float values"),
        ("recipe", {"root": Path("a")}, "is not JSON serializable"),
        ("recipe", {"a": {1: 0, "1": 0}}, "a key appears twice"),
        ("recipe", nested(65), "nested deeper than 64 levels"),
        ("architecture", {"name": "x", "scale": nested(65)}, "nested deeper than 64 levels"),
        ("average_decay", float("nan"), "Out of range float values"),
    ],
)
def test_settings_that_no_reader_accepts_are_not_written(argument, content, message, tmp_path):
    with pytest.raises(
        ValueError, match=rf"^`{argument}` can't be stored in the file \(.*{message}"
    ):
        save_pruned(SmallNet(), tmp_path / "a", **{argument: content})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_architecture_of_no_finite_number_is_not_written(value, tmp_path):
    with pytest.raises(ValueError, match=r"^`architecture` \(=.*has the argument 'drop_rate'"):
        save_pruned(SmallNet(), tmp_path / "a", architecture={"name": "x", "drop_rate": value})
    assert not os.listdir(tmp_path)


@every_form
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("__metadata__", (1,), "tensor '__metadata__' has a reserved name: rename it"),
        ("a", (1,) * 17, "tensor 'a' has 17 dimensions, more than the 16 allowed: reshape it"),
    ],
)
def test_tensors_that_no_reader_accepts_are_not_written(form, name, shape, message, tmp_path):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    with pytest.raises(CheckpointError, match=f"can't be written: {message}"):
        save_pruned(model, tmp_path / "a", **FORMS[form])
    assert not os.listdir(tmp_path)


def test_a_header_that_no_reader_accepts_is_not_written(monkeypatch):
    monkeypatch.setattr(tensor_file, "_MAX_HEADER_BYTES", 1_000)
    file, tensors = io.BytesIO(), {"a": StoredTensor("U8", (0,), np.zeros(0, np.uint8))}
    write_tensor_file(io.BytesIO(), tensors, {"a": "x" * 800})
    with pytest.raises(
        DamageError, match=r"its header has 1,1\d\d bytes, more than the 1,000 allowed"
    ):
        write_tensor_file(file, tensors, {"a": "x" * 1_000})
    assert file.getvalue() == b""
