"""Safetensors files of raw bytes, with a checksum of the header, which the format itself lacks.

The CRC-32 of all names, dtypes, shapes and metadata is in the metadata under `CRC_KEY`
(docs/format.md). Checksums of the data are left to the caller.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

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
_MAX_LEVELS = 64  # of JSON, so that recursive readers of it can't overflow the stack
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
    """A tensor in the container format.

    Attributes:
        dtype: A key of `DTYPES`.
        shape: Shape of the tensor.
        data: Bytes of the tensor, flat.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The content of a file.

    Attributes:
        tensors: Tensors by name, in the order of their bytes.
        metadata: Strings by name.
        size_bytes: Size of the file.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size_bytes: int


def write_tensor_file(
    file: BinaryIO, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file. Tensors of the largest items come first, so that all are aligned.

    Raises:
        DamageError: If `read_tensor_file` would refuse the file; it names the tensor, and nothing
            is written.
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
            f"its header has {len(text):,} bytes, more than the {_MAX_HEADER_BYTES:,} allowed: "
            f"shorten the names of its tensors, or its recipe or architecture"
        )
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(tensors[name].data.data)


def read_tensor_file(path: Path) -> TensorFile:
    """Read a safetensors file; its bytes are mapped to memory, and read as they are used.

    Raises:
        CheckpointError: If the file does not exist, is not a complete safetensors file, or its
            header does not match the CRC-32 in its metadata.
    """
    try:
        if not path.is_file():  # opening a pipe would wait forever
            raise DamageError("there is no such file")
        # safetensors checks that the tensors cover the data without gaps and overlaps, each in the
        # bytes that its shape needs. So their order gives their places, and a slice of the mapped
        # file costs a hundredth of `get_tensor`.
        with safe_open(str(path), framework="pt") as file:
            content = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
            tensors = _tensors(file, content)
            metadata = file.metadata() or {}
        _check_header_crc(tensors, metadata.pop(CRC_KEY, None), metadata)
    except SafetensorError as error:
        text = reason(error)  # which may quote a name that would move a terminal's cursor
        raise CheckpointError(
            f"{path} can't be loaded: it is not a complete safetensors file "
            f"({text if text.isprintable() else repr(text)})"
        ) from error
    except (OSError, DamageError) as error:
        raise CheckpointError(f"{path} can't be loaded: {reason(error)}") from error
    return TensorFile(tensors, metadata, content.size)


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most 64 levels without duplicate keys, NaN and infinities.

    Args:
        text: The JSON.
        what: What the text is, the subject of an error's sentence.

    Raises:
        DamageError: If the text is not such an object.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{what} is not valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise DamageError(f"{what} is not a JSON object")
    if _is_deep(content):
        raise DamageError(f"{what} is nested deeper than {_MAX_LEVELS} levels")
    return content


def checked_shape(shape: object) -> tuple[int, ...]:
    """A shape in a file as a tuple.

    Raises:
        DamageError: If it is not a list of at most 16 ints that are not negative.
    """
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise DamageError(f"its shape must be a list of at most {_MAX_DIMS} ints")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise DamageError("its shape must have dimensions from 0 to 2**63 - 1")
    return tuple(shape)


def dtype_code(dtype: torch.dtype) -> str | None:
    """The name of a dtype in safetensors files; None if such files can't hold it."""
    return _CODES.get(dtype)


def _check_storable(name: str, stored: StoredTensor) -> None:
    if name == _METADATA_NAME:
        raise DamageError(f"tensor {name!r} has a reserved name: rename it")
    if len(stored.shape) > _MAX_DIMS:
        raise DamageError(
            f"tensor {name!r} has {len(stored.shape)} dimensions, more than the {_MAX_DIMS} "
            f"allowed: reshape it"
        )


def _tensors(file: Any, content: npt.NDArray[np.uint8]) -> dict[str, StoredTensor]:
    """The tensors of an open file, in the order of their bytes, which end the file's content."""
    names = file.offset_keys()
    slices = [file.get_slice(name) for name in names]
    kinds = [
        _checked_kind(name, view.get_dtype(), view.get_shape())
        for name, view in zip(names, slices, strict=True)
    ]
    sizes = [math.prod(shape) * _item_bytes(dtype) for dtype, shape in kinds]
    tensors, start = {}, content.size - sum(sizes)
    for name, (dtype, shape), size in zip(names, kinds, sizes, strict=True):
        tensors[name] = StoredTensor(dtype, shape, content[start : start + size])
        start += size
    return tensors


def _checked_kind(name: str, dtype: str, shape: object) -> tuple[str, tuple[int, ...]]:
    """A stored tensor's dtype and shape, if this package stores such ones."""
    try:
        if dtype not in DTYPES:
            raise DamageError(f"its dtype {dtype} is not one of {', '.join(DTYPES)}")
        return dtype, checked_shape(shape)
    except DamageError as error:
        raise DamageError(f"tensor {name!r}: {error}") from error


def _check_header_crc(
    tensors: Mapping[str, StoredTensor], claimed: str | None, metadata: Mapping[str, str]
) -> None:
    if claimed is None:
        raise DamageError(
            "it has no checksum of its header, unlike files of save_pruned: it is damaged or was "
            "written by another program; safetensors.torch.load_file reads it without checks"
        )
    if claimed != f"{_header_crc(tensors, metadata):08x}":
        raise DamageError("CRC-32 mismatch in its header: the file is corrupt")


def _header_crc(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> int:
    """The CRC-32 of a header's content, independent of the order of tensors in the file."""
    try:
        return zlib.crc32("".join(_meaning(tensors, metadata)).encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DamageError("a name or the metadata are not valid Unicode") from error


def _meaning(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Iterable[str]:
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        yield f"{name}\0{tensors[name].dtype}\0{shape}\n"
    for key in sorted(metadata):
        yield f"{key}\0{metadata[key]}\n"


def _item_bytes(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _is_deep(content: object) -> bool:
    level: list[Any] = [content]
    for _ in range(_MAX_LEVELS):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    return bool(level)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")
