"""Files of programs, written and damaged without the package: straight from docs/format.md."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INTERESTING = (0, 1, -1, 2, 3, 4, 8, 15, 16, 17, 31, 64, 65, 112, 255, 256, 1 << 16, 1 << 20)
HUGE = (1 << 30, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63))


class Content(NamedTuple):
    """What a file holds: as `StoredProgram`."""

    program: NDArray[np.int64]
    constants: NDArray[np.uint8]
    inputs: str
    outputs: str

    def save(self, path: Path) -> None:
        texts = np.array([self.inputs, self.outputs])
        np.savez(path, program=self.program, constants=self.constants, texts=texts)

    @classmethod
    def load(cls, path: Path) -> "Content":
        with np.load(path) as file:
            inputs, outputs = map(str, file["texts"])
            return cls(file["program"], file["constants"], inputs, outputs)


def file_bytes(content: Content, **changes: str) -> bytes:
    """A file with right checksums; `changes` replace metadata, such as the version."""
    parts = {"program": content.program.tobytes(), "constants": content.constants.tobytes()}
    metadata = {
        "format": "program",
        "version": "1",
        "inputs": content.inputs,
        "outputs": content.outputs,
        **{f"{name}.crc32": f"{zlib.crc32(part):08x}" for name, part in parts.items()},
        **changes,
    }
    metadata = {f"starfire_prune.{key}": value for key, value in metadata.items()}
    shapes = {
        "program": ("I64", len(parts["program"]) // 8),
        "constants": ("U8", len(parts["constants"])),
    }
    meaning = "".join(
        f"{name}\0{dtype}\0{size}\n" for name, (dtype, size) in sorted(shapes.items())
    )
    meaning += "".join(f"{key}\0{value}\n" for key, value in sorted(metadata.items()))
    metadata["starfire_prune.crc32"] = f"{zlib.crc32(meaning.encode()):08x}"
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, size) in shapes.items():
        end = start + len(parts[name])
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + parts["program"] + parts["constants"]


def damaged(file: bytes, random: np.random.Generator) -> bytes:
    """A file with some flipped bits, cut off, or with bytes that are moved."""
    content = bytearray(file)
    kind = random.integers(4)
    if kind == 0:
        return bytes(content[: random.integers(len(content))])
    if kind == 1:
        first, length = random.integers(len(content)), int(random.integers(1, 200))
        del content[first : first + length]
        return bytes(content)
    header = 8 + struct.unpack("<Q", file[:8])[0]
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(header if kind == 2 else len(content)))
        content[at] ^= 1 << int(random.integers(8))
    return bytes(content)


def mutated(content: Content, random: np.random.Generator) -> Content:
    """A program with other fields or constants, which a file has with right checksums."""
    program, constants = content.program.copy(), content.constants.copy()
    texts = [content.inputs, content.outputs]
    for _ in range(random.integers(1, 4)):
        kind = random.integers(10)
        if kind < 6:
            at = random.integers(len(program))
            program[at] = other_number(int(program[at]), program, random)
        elif kind < 9:
            dtype = (np.uint8, np.uint16, np.int32, np.int64)[random.integers(4)]
            items = constants[: len(constants) // 8 * 8].view(dtype)
            at = random.integers(len(items))
            number = other_number(int(items[at]), program, random)
            items[at] = np.array([number], np.int64).astype(dtype)[0]
        else:
            side = random.integers(2)
            words = texts[side].split(" ")
            words[random.integers(len(words))] = str(random.choice(INTERESTING))
            texts[side] = " ".join(words)
    return Content(program, constants, *texts)


def other_number(number: int, program: NDArray[np.int64], random: np.random.Generator) -> int:
    kind = random.integers(6)
    if kind == 0:
        result = int(random.choice(INTERESTING))
    elif kind == 1:
        result = int(random.choice(HUGE))
    elif kind == 2:
        result = number + int(random.integers(-4, 5))
    elif kind == 3:
        result = number * int(random.integers(2, 5)) // int(random.integers(1, 4))
    elif kind == 4:
        result = int(program[random.integers(len(program))])
    else:
        result = number ^ 1 << int(random.integers(24))
    return (result + (1 << 63)) % (1 << 64) - (1 << 63)
