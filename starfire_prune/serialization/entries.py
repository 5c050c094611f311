"""Tensors of a pruned model as the stored tensors of a file, and back.

A tensor that is stored dense keeps its name, dtype and shape, so that every reader of safetensors
finds it. The parts of an encoded one are `name:part`. A table, JSON under `TENSORS_KEY` in the
file's metadata, tells for each tensor the encoding and a CRC-32 a part (docs/format.md).
"""

from __future__ import annotations

import base64
import binascii
import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starfire_prune.serialization.codec import (
    PARTS,
    Encoded,
    bits_of,
    decode_into,
    inflate,
    read_parts,
    unpack_bits,
)
from starfire_prune.serialization.container import (
    DTYPES,
    StoredTensor,
    TensorFile,
    checked_shape,
    parse_json,
)
from starfire_prune.serialization.state import check_tied
from starfire_prune.utils.errors import CodecError, DamageError

__all__ = [
    "NOTE_BYTES",
    "TENSORS_KEY",
    "TensorEntry",
    "decode_tensors",
    "fill_tensors",
    "in_parallel",
    "read_entries",
    "stored_names",
]


TENSORS_KEY = "starfire_prune.tensors"
NOTE_BYTES = 200  # about what an encoded tensor adds to the header: it has to save more
_KEYS = frozenset({"encoding", "dtype", "shape", "deflated", "crc32", "kept_zeros"})
_MAX_THREADS = 8
_LARGE_BYTES = 2**16
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, checked but not decoded.

    Attributes:
        name: of the tensor.
        dtype: of its numbers.
        encoded: its parts, inflated.
        deflated: names of the parts that are stored deflated.
        stored_bytes: that its parts take in the file.
        kept_zeros: base64 of the deflated bitmap of weights that are +0.0 and not pruned.
    """

    name: str
    dtype: torch.dtype
    encoded: Encoded
    deflated: tuple[str, ...]
    stored_bytes: int
    kept_zeros: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.encoded.shape

    @property
    def size_bytes(self) -> int:
        """That the tensor takes once decoded."""
        return math.prod(self.shape) * self.encoded.item_bytes

    def decode(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        decode_into(self.encoded, bits_of(tensor))
        return tensor

    def fits_in(self, target: Tensor) -> bool:
        """Whether the tensor can be decoded in the memory of another of its shape."""
        is_plain = target.device.type == "cpu" and target.is_contiguous()
        return is_plain and target.dtype == self.dtype

    def mask(self) -> Tensor:
        """Which weights are kept, bool of the tensor's shape: those that are not +0.0, but noted.

        Raises:
            DamageError: if the note is damaged.
        """
        kept = bits_of(self.decode()) != 0
        if self.kept_zeros is None:
            return kept
        try:
            packed = base64.b64decode(self.kept_zeros, validate=True)
            flat = inflate(np.frombuffer(packed, np.uint8), -(-kept.numel() // 8), 1)
        except (binascii.Error, CodecError) as error:
            raise DamageError(f"tensor {self.name!r}: its kept zeros are damaged") from error
        return kept | torch.from_numpy(unpack_bits(flat, kept.numel())).view(self.shape)


def decode_tensors(entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Decode tensors of a file into memory of their own."""
    decoded = in_parallel(TensorEntry.decode, entries.values(), _decoded_bytes)
    return dict(zip(entries, decoded, strict=True))


@torch.no_grad()
def fill_tensors(targets: Mapping[str, Tensor], entries: Mapping[str, TensorEntry]) -> None:
    """Decode tensors into others: in their own memory, or, where that is of another dtype, device
    or order, by copies, all of which are decoded before anything is changed.

    Args:
        targets: of the entries' names and shapes.
        entries: of a file.

    Raises:
        DamageError: if a dtype is of another kind, such as ints for floats, or targets that share
            their memory would differ; nothing is changed.
    """
    for name, entry in entries.items():
        if _kind(entry.dtype) != _kind(targets[name].dtype):
            raise DamageError(
                f"tensor {name!r} is of {entry.dtype}, and the model's of {targets[name].dtype}"
            )
    try:
        check_tied(targets, lambda name: entries[name].decode())
    except ValueError as error:
        raise DamageError(str(error)) from error
    in_place: list[TensorEntry] = []
    others: list[TensorEntry] = []
    for name, entry in entries.items():
        (in_place if entry.fits_in(targets[name]) else others).append(entry)
    decoded = in_parallel(TensorEntry.decode, others, _decoded_bytes)
    in_parallel(
        lambda entry: decode_into(entry.encoded, bits_of(targets[entry.name])),
        in_place,
        _decoded_bytes,
    )
    for entry, tensor in zip(others, decoded, strict=True):
        targets[entry.name].detach().copy_(tensor)


def _decoded_bytes(entry: TensorEntry) -> int:
    return entry.size_bytes


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "int"


def read_entries(file: TensorFile, max_bytes: int) -> dict[str, TensorEntry]:
    """Check a file's tensors: sizes before anything is allocated, then the checksums.

    Args:
        file: with a table.
        max_bytes: that all tensors may take once decoded.

    Raises:
        DamageError: naming the tensor, if anything does not fit.
    """
    if TENSORS_KEY not in file.metadata:
        raise DamageError("its metadata hold no table of tensors")
    table = parse_json(file.metadata[TENSORS_KEY], "its table of tensors")
    claims = [_named(name, lambda: _Claim.parse(name, table[name], file)) for name in table]  # noqa: B023
    total = sum(claim.size_bytes for claim in claims)
    if total > max_bytes:
        raise DamageError(
            f"its tensors take {total:,} bytes, and `max_bytes` (={max_bytes:,}) allows no more: "
            f"raise it if you trust the file"
        )
    used = collections.Counter(part for claim in claims for part in claim.stored)
    missing = set(file.tensors) - set(used)
    if missing:
        raise DamageError(f"tensor {min(missing)!r} is not in its table")
    if shared := [part for part, times in used.items() if times > 1]:
        raise DamageError(f"tensor {min(shared)!r} is in its table twice")
    entries = in_parallel(
        lambda claim: _named(claim.name, claim.read), claims, lambda claim: claim.stored_bytes
    )
    return {entry.name: entry for entry in entries}


@dataclasses.dataclass(frozen=True)
class _Claim:
    """What the table claims of a tensor, well-formed but not compared with the bytes."""

    name: str
    encoding: str
    dtype: str
    shape: tuple[int, ...]
    deflated: tuple[str, ...]
    crc32: Mapping[str, int]
    kept_zeros: str | None
    stored: Mapping[str, StoredTensor]

    @classmethod
    def parse(cls, name: str, entry: object, file: TensorFile) -> _Claim:
        if not isinstance(entry, dict) or not entry.keys() <= _KEYS:
            raise DamageError("its entry in the table has unknown keys")
        encoding, crc32 = entry.get("encoding"), entry.get("crc32")
        if encoding not in list(PARTS):
            raise DamageError("its encoding is unknown")
        if not isinstance(crc32, dict) or crc32.keys() != set(PARTS[encoding]):
            raise DamageError("its parts are not those of its encoding")
        kept_zeros, deflated = entry.get("kept_zeros"), entry.get("deflated", [])
        if not isinstance(kept_zeros, str | None) or not isinstance(deflated, list):
            raise DamageError("its entry in the table is of wrong types")
        if any(part not in PARTS[encoding] for part in deflated):
            raise DamageError("an unknown part of it is deflated")
        names = stored_names(name, encoding, deflated)
        missing = [stored for stored in names.values() if stored not in file.tensors]
        if missing:
            raise DamageError(f"its part {missing[0]!r} is missing")
        stored = {names[part]: file.tensors[names[part]] for part in names}
        if names["values"] == name:
            entry = {"dtype": stored[name].dtype, "shape": list(stored[name].shape)}
        dtype, shape = entry.get("dtype"), checked_shape(entry.get("shape"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise DamageError("its dtype is unknown")
        return cls(name, encoding, dtype, shape, tuple(deflated), crc32, kept_zeros, stored)

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def size_bytes(self) -> int:
        # Dimensions of 0 count as 1: torch works out strides with them all the same
        return math.prod(max(length, 1) for length in self.shape) * self.item_bytes

    @property
    def stored_bytes(self) -> int:
        return sum(stored.data.size for stored in self.stored.values())

    def read(self) -> TensorEntry:
        encoded = read_parts(self.encoding, self.shape, self.item_bytes, self._read_part)
        if self.dtype == "BOOL" and bool((encoded.parts["values"] > 1).any()):
            raise DamageError("its bools are not all 0 or 1")
        return TensorEntry(
            name=self.name,
            dtype=DTYPES[self.dtype],
            encoded=encoded,
            deflated=self.deflated,
            stored_bytes=self.stored_bytes,
            kept_zeros=self.kept_zeros,
        )

    def _read_part(self, part: str, size_bytes: int) -> npt.NDArray[np.uint8]:
        name = stored_names(self.name, self.encoding, self.deflated)[part]
        stored, is_deflated = self.stored[name], part in self.deflated
        if zlib.crc32(stored.data.data) != self.crc32[part]:
            raise DamageError(f"its {part} are damaged: they have not the CRC-32 of the table")
        item_bytes = self.item_bytes if part == "values" else 1
        if stored.dtype != (self.dtype if part == "values" and not is_deflated else "U8"):
            raise DamageError(f"its {part} are stored as {stored.dtype}")
        if is_deflated:
            return inflate(stored.data, size_bytes, item_bytes)
        if stored.data.size != size_bytes:
            raise DamageError(
                f"its {part} have {stored.data.size} bytes, and its shape and the parts before "
                f"need {size_bytes}"
            )
        return stored.data


def stored_names(name: str, encoding: str, deflated: Iterable[str]) -> dict[str, str]:
    """The names in the file of a tensor's parts."""
    if encoding == "dense" and not list(deflated):
        return {"values": name}
    return {part: f"{name}:{part}" for part in PARTS[encoding]}


def _named(name: str, function: Callable[[], Result]) -> Result:
    try:
        return function()
    except (CodecError, DamageError) as error:
        raise DamageError(f"tensor {name!r}: {error}") from error


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], size_bytes: Callable[[Item], int]
) -> list[Result]:
    """Map over items, the large ones by as many threads as torch uses.

    Args:
        function: which checksums and NumPy's loops are most of: they release the GIL.
        items: most of which are small, where threads would only wait for each other.
        size_bytes: of an item.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), _MAX_THREADS)
    sizes = list(map(size_bytes, items))
    large = [place for place, size in enumerate(sizes) if size >= _LARGE_BYTES]
    if threads == 1 or len(large) < 2:
        return list(map(function, items))
    rest = set(range(len(items))).difference(large)
    results = {place: function(items[place]) for place in rest}
    places = iter(sorted(large, key=lambda place: -sizes[place]))

    def work(_: int) -> None:
        for place in places:  # the next one that no thread has taken
            results[place] = function(items[place])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return [results[place] for place in range(len(items))]
