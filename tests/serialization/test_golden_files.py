"""The file format, byte by byte: files that earlier versions wrote, and how each byte came about.

`golden/raw.safetensors` stays byte-equal as long as `FORMAT_VERSION` does. What zlib makes of
bytes differs between its versions, so `deflated.safetensors` has to be read, not written, alike.
"""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import apply_masks, load_masks, load_pruned, save_pruned
from starfire_prune.serialization.codec import bits_of
from starfire_prune.serialization.metadata import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
TAKES = {"raw": {}, "deflated": {"deflate": True}}


class Kernels(nn.Module):
    """A tensor for each encoding and several dtypes, of numbers that every machine has alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.windows = nn.Conv2d(16, 16, 3, bias=False, dtype=torch.float16)
        self.head = nn.Linear(60, 7, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.tensor(1234567890123))
        self.register_buffer("flags", torch.arange(5) % 2 == 0)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                count = torch.arange(parameter.numel()).view(parameter.shape)
                parameter.copy_((count * 37 % 101 - 50.25) / 2 ** (5 + number))
            self.conv.weight[0, 0, 0, 0] = -0.0
            self.conv.weight[0, 0, 0, 1] = 0.0


def golden_model() -> Kernels:
    model = Kernels()
    index = torch.arange(256).view(16, 16, 1, 1)
    places = torch.arange(256 * 9).view(16, 16, 3, 3)
    masks = {
        "conv.weight": (index % 3 == 0).expand(16, 16, 3, 3),
        "windows.weight": (index % 4 == 1) & (places % 5 > 1),
        "head.weight": torch.arange(420).view(7, 60) % 7 == 3,
    }
    apply_masks(model, masks)
    return model


def write_golden(path: Path, take: str) -> None:
    architecture = {"name": "küçük", "num_classes": 7}
    save_pruned(golden_model(), path, "compressed", architecture=architecture, **TAKES[take])  # type: ignore[arg-type]


def test_the_golden_file_is_written_byte_for_byte(tmp_path):
    write_golden(tmp_path / "raw.safetensors", "raw")
    assert (tmp_path / "raw.safetensors").read_bytes() == (GOLDEN / "raw.safetensors").read_bytes()


@pytest.mark.parametrize("take", TAKES)
def test_the_golden_files_are_read_bit_for_bit(take):
    loaded = load_pruned(GOLDEN / f"{take}.safetensors")
    masks = load_masks(GOLDEN / f"{take}.safetensors")
    model = golden_model()
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_buffer(f"{name}_mask"))
    for name, parameter in Kernels().state_dict().items():
        expected = parameter.masked_fill(~masks[name], 0.0) if name in masks else parameter
        assert torch.equal(bits_of(loaded[name]), bits_of(expected))
    assert len(masks) == 3


@pytest.mark.parametrize("take", TAKES)
def test_a_reader_written_from_the_specification_reads_the_golden_files(take):
    path = GOLDEN / f"{take}.safetensors"
    loaded = load_pruned(path)
    assert plain_read(path) == {
        name: bits_of(tensor).numpy().tobytes() for name, tensor in loaded.items()
    }


def test_the_golden_files_use_every_encoding():
    entries = {take: table_of(GOLDEN / f"{take}.safetensors") for take in TAKES}
    assert {name: entry["encoding"] for name, entry in entries["raw"].items()} == {
        "conv.weight": "ck",
        "conv.bias": "dense",
        "windows.weight": "window",
        "head.weight": "bitmap",
        "head.bias": "dense",
        "steps": "dense",
        "flags": "dense",
    }
    assert entries["deflated"]["conv.weight"]["deflated"] == ["values"]
    assert "kept_zeros" in entries["raw"]["conv.weight"]
    assert FORMAT_VERSION == 1  # with another, write other golden files


# docs/format.md in plain Python, which shares nothing with the package

SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
PARTS = {
    "dense": ["values"],
    "ck": ["kernels", "values"],
    "window": ["kernels", "patterns", "values"],
    "bitmap": ["weights", "values"],
}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def table_of(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(header_of(path)[0]["__metadata__"]["starfire_prune.tensors"])
    return table


def plain_read(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, by plain loops, with all checksums compared."""
    header, data = header_of(path)
    metadata = header.pop("__metadata__")
    claimed = metadata.pop("starfire_prune.crc32")
    lines = [
        f"{name}\0{header[name]['dtype']}\0{','.join(map(str, header[name]['shape']))}\n"
        for name in sorted(header)
    ] + [f"{key}\0{metadata[key]}\n" for key in sorted(metadata)]
    assert claimed == f"{zlib.crc32(''.join(lines).encode()):08x}"
    tensors = {}
    for name, entry in json.loads(metadata["starfire_prune.tensors"]).items():
        parts = {}
        for part in PARTS[entry["encoding"]]:
            is_plain = entry["encoding"] == "dense" and not entry.get("deflated")
            stored = header[name if is_plain else f"{name}:{part}"]
            start, end = stored["data_offsets"]
            assert zlib.crc32(data[start:end]) == entry["crc32"][part]
            parts[part] = data[start:end]
            if part in entry.get("deflated", []):
                size = SIZES[entry["dtype"]] if part == "values" else 1
                planes = zlib.decompress(parts[part])
                count = len(planes) // size
                parts[part] = bytes(
                    planes[place * count + item] for item in range(count) for place in range(size)
                )
        dtype, shape = (stored if is_plain else entry)["dtype"], entry.get("shape")
        tensors[name] = plain_decode(entry["encoding"], shape, SIZES[dtype], parts)
    return tensors


def plain_decode(encoding: str, shape: list[int], item: int, parts: dict[str, bytes]) -> bytes:
    """The bytes of a tensor."""
    if encoding == "dense":
        return parts["values"]

    def bit(part: str, index: int) -> bool:
        return bool(parts[part][index // 8] >> index % 8 & 1)

    words, taken, alive, size = [], 0, 0, math.prod(shape[2:])
    for kernel in range(math.prod(shape[:2])):
        is_alive = encoding == "bitmap" or bit("kernels", kernel)
        for place in range(size):
            stored = is_alive
            if encoding == "bitmap":
                stored = bit("weights", kernel * size + place)
            elif encoding == "window" and is_alive:
                stored = bit("patterns", alive * size + place)
            words.append(parts["values"][taken * item :][:item] if stored else b"\0" * item)
            taken += stored
        alive += is_alive
    assert taken * item == len(parts["values"])
    return b"".join(words)
