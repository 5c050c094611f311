"""Safetensors files, written and read with checks that the format itself lacks.

A reader of safetensors takes any bytes for the tensors. Here the names, dtypes and shapes and all
metadata carry a CRC-32 of their own (docs/format.md), in the metadata under `CRC_KEY`; those of the
data are up to who writes them. Nothing that a header claims is believed before it is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from starfire_prune.utils.errors import CheckpointError, DamageError
from starfire_prune.utils.files import reason

__all__ = [
    "CRC_KEY",
    "DTYPES",
    "MAX_BYTES",
    "StoredTensor",
    "TensorFile",
    "checked_shape",
    "dtype_code",
    "parse_json",
    "read_tensor_file",
    "write_tensor_file",
]


CRC_KEY = "starfire_prune.crc32"
MAX_BYTES = 2**32
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors
_MAX_DIMS = 16
_MAX_LEVELS = 64  # of JSON, so that whatever goes through it by recursion comes to an end
_METADATA_NAME = "__metadata__"
_ALIGNMENT = 8
# The names of dtypes in safetensors files
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: of the tensor.
        data: its bytes, flat.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        tensors: by their names, in the order of their bytes.
        metadata: strings by their names.
        size_bytes: of the file.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size_bytes: int


def write_tensor_file(
    file: BinaryIO, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, tensors of the largest items first so that all are aligned.

    Raises:
        DamageError: naming the tensor, for what `read_tensor_file` refuses; nothing is written.
    """
    for name, stored in tensors.items():
        _check_storable(name, stored)
    names = sorted(tensors, key=lambda name: -_item_bytes(tensors[name].dtype))  # stable
    crc = _header_crc(tensors, metadata)
    header: dict[str, Any] = {_METADATA_NAME: {**metadata, CRC_KEY: f"{crc:08x}"}}
    start = 0
    for name in names:
        end = start + tensors[name].data.size
        stored = tensors[name]
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise DamageError(
            f"its header would have {len(text):,} bytes, and may have {_MAX_HEADER_BYTES:,}: "
            f"shorten the names of its tensors, or what it notes of the model and the recipe"
        )
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(tensors[name].data.data)


def read_tensor_file(path: Path) -> TensorFile:
    """Read a safetensors file; its bytes are mapped to memory, and read as they are used.

    Raises:
        CheckpointError: if there is no such file, or it is no whole safetensors file whose header
            has the CRC-32 that it names.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise DamageError("there is no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise DamageError(f"a safetensors file has at least 8 bytes, and this has {size}")
            # Copied on a write, so that arrays over it count as writable
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return _parse(np.frombuffer(mapped, np.uint8))
    except (OSError, DamageError) as error:
        raise CheckpointError(f"{path} can't be loaded: {reason(error)}") from error


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of up to 64 levels, without duplicate keys or numbers that JSON has not.

    Raises:
        DamageError: if it is none; `what` names it.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{what} is no valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise DamageError(f"{what} is no JSON object")
    if _is_deep(content):
        raise DamageError(f"{what} is nested deeper than {_MAX_LEVELS} levels")
    return content


def checked_shape(shape: object) -> tuple[int, ...]:
    """A shape that a file claims, of up to 16 ints from 0.

    Raises:
        DamageError: if it is none.
    """
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise DamageError(f"its shape is no list of up to {_MAX_DIMS} ints")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise DamageError("its shape is not of ints from 0 to 2**63 - 1")
    return tuple(shape)


def dtype_code(dtype: torch.dtype) -> str | None:
    """The name of a dtype in safetensors files; None for one that these files don't hold."""
    return _CODES.get(dtype)


def _check_storable(name: str, stored: StoredTensor) -> None:
    if name == _METADATA_NAME:
        raise DamageError(f"a tensor must not be named {name!r}: rename it")
    if len(stored.shape) > _MAX_DIMS:
        raise DamageError(
            f"tensor {name!r} has {len(stored.shape)} dimensions, and may have {_MAX_DIMS}: "
            f"reshape it"
        )


def _parse(content: npt.NDArray[np.uint8]) -> TensorFile:
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    if length > min(_MAX_HEADER_BYTES, content.size - 8):
        raise DamageError(
            f"it is cut short, or no safetensors file: its first 8 bytes claim a header of "
            f"{length} bytes"
        )
    header = parse_json(_utf8(content[8 : 8 + length].tobytes()), "its header")
    metadata = header.pop(_METADATA_NAME, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamageError("its metadata are not of strings")
    tensors = _tensors(header, content[8 + length :])
    claimed = metadata.pop(CRC_KEY, None)
    if claimed is not None and claimed != f"{_header_crc(tensors, metadata):08x}":
        raise DamageError("its header is damaged: it has not the CRC-32 that it names")
    if claimed is None:
        raise DamageError(
            "it has no checksum of its header, as files of save_pruned have: it is damaged or of "
            "another program; safetensors.torch.load_file reads it without checks"
        )
    return TensorFile(tensors, metadata, content.size)


def _tensors(header: Mapping[str, Any], data: npt.NDArray[np.uint8]) -> dict[str, StoredTensor]:
    """The tensors of a header, which have to cover the data without gaps and overlaps."""
    claims = {name: _claim(name, entry) for name, entry in header.items()}
    tensors, position = {}, 0
    for name, (dtype, shape, start, end) in sorted(claims.items(), key=lambda item: item[1][2:]):
        if start != position or end < start:
            raise DamageError(f"tensor {name!r}: its bytes don't follow those of the one before")
        if end > data.size:
            raise DamageError(f"tensor {name!r}: the file is cut short, or claims too much")
        if end - start != math.prod(shape) * _item_bytes(dtype):
            raise DamageError(f"tensor {name!r}: its shape needs another number of bytes")
        tensors[name] = StoredTensor(dtype, shape, data[start:end])
        position = end
    if position != data.size:
        raise DamageError(f"{data.size - position} bytes at its end belong to no tensor")
    return tensors


def _claim(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    try:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise DamageError("its entry in the header has not dtype, shape and data_offsets")
        offsets = checked_shape(entry["data_offsets"])
        if entry["dtype"] not in list(DTYPES) or len(offsets) != 2:
            raise DamageError("its dtype is unknown, or its offsets are not two")
        return entry["dtype"], checked_shape(entry["shape"]), *offsets
    except DamageError as error:
        raise DamageError(f"tensor {name!r}: {error}") from error


def _header_crc(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> int:
    """The CRC-32 of what a header means, whatever the order and the places of tensors."""
    try:
        return zlib.crc32("".join(_meaning(tensors, metadata)).encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DamageError("a name or its metadata are no Unicode text") from error


def _meaning(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Iterable[str]:
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        yield f"{name}\0{tensors[name].dtype}\0{shape}\n"
    for key in sorted(metadata):
        yield f"{key}\0{metadata[key]}\n"


def _item_bytes(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamageError("its header is not of UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key comes twice")
    return content


def _is_deep(content: object) -> bool:
    level: list[Any] = [content]
    for _ in range(_MAX_LEVELS):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    return bool(level)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
