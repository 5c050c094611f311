"""Files that are damaged or made to do harm: one sentence, and never a crash or a wrong tensor."""

import ast
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import starfire_prune
from starfire_prune import load_masks, load_pruned, load_pruned_model
from starfire_prune.serialization.inspect import inspect_pruned
from starfire_prune.utils.errors import CheckpointError
from tests.serialization.test_pruned import every_form, saved
from tests.support.networks import SmallNet

READERS: list[Callable[[Path], object]] = [
    load_pruned,
    load_masks,
    inspect_pruned,
    lambda path: load_pruned_model(path, SmallNet()),
]


def refused(path: Path, *readers: Callable[[Path], object]) -> str:
    """What the readers all say of a file, behind its name."""
    messages = set()
    for reader in readers or READERS:
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        message = str(caught.value)
        assert message.startswith(f"{path} can't be loaded: ")
        assert "\n" not in message
        messages.add(message.removeprefix(f"{path} can't be loaded: "))
    assert len(messages) == 1
    return messages.pop()


# Damage


@every_form
def test_a_file_that_is_cut_short_is_refused(form, tmp_path):
    path = saved(tmp_path, form)
    size_bytes = path.stat().st_size
    assert 4_000 < size_bytes < 65_536
    for length in [size_bytes - 1, *reversed(range(0, size_bytes - 1, 64))]:
        os.truncate(path, length)
        refused(path, load_pruned)


@every_form
def test_a_file_with_more_behind_it_is_refused(form, tmp_path):
    path = saved(tmp_path, form)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "not a complete safetensors file" in refused(path)


def flipped(path: Path, bits: Iterable[int]) -> Iterator[None]:
    """Let each bit of a file be flipped in turn, and the others be as they were."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            index = bit // 8
            os.pwrite(file.fileno(), bytes([content[index] ^ 1 << bit % 8]), index)
            yield
            os.pwrite(file.fileno(), content[index : index + 1], index)


@pytest.mark.parametrize(
    ("form", "flips"), [("dense", 2_000), ("compressed", 6_000), ("deflated", 2_000)]
)
def test_any_flipped_bit_is_refused(form, flips, tmp_path):
    path = saved(tmp_path, form)
    chosen = random.Random(0)
    n_bits = 8 * path.stat().st_size
    for _ in flipped(path, (chosen.randrange(n_bits) for _ in range(flips))):
        refused(path, load_pruned)
    assert load_pruned(path)


def test_every_bit_of_the_beginning_is_guarded(tmp_path):
    path = saved(tmp_path, "compressed")
    for _ in flipped(path, range(8 * 100)):
        refused(path, load_pruned)


def test_damaged_data_are_refused_with_the_tensors_name(tmp_path):
    path = saved(tmp_path, "compressed")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, part in (("body.weight", ":patterns"), ("body.weight", ":values"), ("bn1.bias", "")):
        damaged = bytearray(content)
        damaged[8 + length + header[f"{name}{part}"]["data_offsets"][0]] ^= 0x10
        path.write_bytes(damaged)
        assert refused(path) == (
            f"tensor '{name}': CRC-32 mismatch in its {part[1:] or 'values'!r}: the file is corrupt"
        )


@pytest.mark.parametrize("content", [None, b"", b"1234567", "folder", "pipe"])
def test_missing_and_tiny_files_are_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    expected = "header too small" if isinstance(content, bytes) else "there is no such file"
    assert expected in refused(path)


# Pickles


class Poison:
    """What pickle would make a folder of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["of torch", "plain", "within the header"])
def test_a_pickle_in_disguise_is_refused_and_not_executed(kind, tmp_path):
    path, poison = tmp_path / "model.safetensors", Poison(tmp_path / "executed")
    if kind == "of torch":
        torch.save({"weight": poison}, path)
    elif kind == "plain":
        path.write_bytes(pickle.dumps(poison, protocol=2))
    else:
        poisoned = pickle.dumps(poison)
        path.write_bytes(struct.pack("<Q", len(poisoned)) + poisoned)
    refused(path)
    assert not (tmp_path / "executed").exists()


def test_no_module_unpickles():
    """`torch.load` always with `weights_only=True`, and nothing else that executes a file."""
    for file in Path(starfire_prune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "Unpickler", "eval", "exec")
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{file}:{node.lineno}"
