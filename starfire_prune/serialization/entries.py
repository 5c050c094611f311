"""Reading the tensors of a pruned file: its table of entries, their checks and their decoding.

A dense tensor is stored under its own name, dtype and shape, so that every reader of safetensors
finds it. The parts of an encoded one are stored as `name:part`. A table, JSON under `TENSORS_KEY`
in the file's metadata, gives each tensor's encoding and the CRC-32 of each part (docs/format.md).
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
    "ENTRY_BYTES",
    "TENSORS_KEY",
    "TensorEntry",
    "decode_tensors",
    "fill_tensors",
    "in_parallel",
    "part_names",
    "read_entries",
]


TENSORS_KEY = "starfire_prune.tensors"
ENTRY_BYTES = 200  # that an encoded tensor adds to the header, about; it has to save more
_KEYS = frozenset({"encoding", "dtype", "shape", "deflated", "crc32", "kept_zeros"})
_MAX_THREADS = 8
_LARGE_BYTES = 2**16
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, checked but not decoded.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype of the tensor.
        encoded: The tensor's parts, inflated.
        deflated: Names of the parts that are stored deflated.
        stored_bytes: Bytes of its parts in the file.
        kept_zeros: Base64 of the deflated bitmap of weights that are +0.0 but not pruned; None if
            there are none.
    """

    name: str
    dtype: torch.dtype
    encoded: Encoded
    deflated: tuple[str, ...]
    stored_bytes: int
    kept_zeros: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.encoded.shape

    @property
    def size_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * self.encoded.item_bytes

    def decode(self) -> Tensor:
        """The decoded tensor, in new memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        decode_into(self.encoded, bits_of(tensor))
        return tensor

    def fits_in(self, target: Tensor) -> bool:
        """Whether the tensor can be decoded directly into the memory of a tensor of its shape."""
        is_plain = target.device.type == "cpu" and target.is_contiguous()
        return is_plain and target.dtype == self.dtype

    def mask(self) -> Tensor:
        """The tensor's mask, bool, True = kept: weights other than +0.0, and those in `kept_zeros`.

        Raises:
            DamageError: If `kept_zeros` is damaged.
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
    """Decode the tensors of a file into new memory."""
    decoded = in_parallel(TensorEntry.decode, entries.values(), _decoded_bytes)
    return dict(zip(entries, decoded, strict=True))


@torch.no_grad()
def fill_tensors(targets: Mapping[str, Tensor], entries: Mapping[str, TensorEntry]) -> None:
    """Decode tensors into existing ones.

    They are decoded directly into the targets' memory. For targets of another dtype, device or
    memory format they are decoded to copies, before anything is changed.

    Args:
        targets: The tensors to change, of the entries' names and shapes.
        entries: Entries of a file.

    Raises:
        DamageError: If a dtype is of another kind, such as int for float, or targets that share
            memory would differ; nothing is changed then.
    """
    for name, entry in entries.items():
        if _kind(entry.dtype) != _kind(targets[name].dtype):
            raise DamageError(
                f"tensor {name!r} has the dtype {entry.dtype}, but {targets[name].dtype} in the "
                f"model"
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
    """Check a file's tensors: first all sizes, before anything is allocated, then the checksums.

    Args:
        file: A file with a table.
        max_bytes: Most bytes that all decoded tensors may take together.

    Raises:
        DamageError: If the table and the file's bytes disagree; it names the tensor.
    """
    if TENSORS_KEY not in file.metadata:
        raise DamageError("its metadata have no table of tensors")
    table = parse_json(file.metadata[TENSORS_KEY], "its table of tensors")
    claims = [_named(name, lambda: _Claim.parse(name, table[name], file)) for name in table]  # noqa: B023
    total = sum(claim.size_bytes for claim in claims)
    if total > max_bytes:
        raise DamageError(
            f"its tensors take {total:,} bytes, more than `max_bytes` (={max_bytes:,}) allows: "
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
    """A tensor's entry in the table, well-formed but not yet compared with the bytes."""

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
            raise DamageError("its entry in the table has values of wrong types")
        if any(part not in PARTS[encoding] for part in deflated):
            raise DamageError("its list of deflated parts names an unknown part")
        names = part_names(name, encoding, deflated)
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
        # Dimensions of 0 count as 1, because torch computes strides with them
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
        name = part_names(self.name, self.encoding, self.deflated)[part]
        stored, is_deflated = self.stored[name], part in self.deflated
        if zlib.crc32(stored.data.data) != self.crc32[part]:
            raise DamageError(f"CRC-32 mismatch in its {part!r}: the file is corrupt")
        item_bytes = self.item_bytes if part == "values" else 1
        if stored.dtype != (self.dtype if part == "values" and not is_deflated else "U8"):
            raise DamageError(f"its {part!r} are stored with the dtype {stored.dtype}")
        if is_deflated:
            return inflate(stored.data, size_bytes, item_bytes)
        if stored.data.size != size_bytes:
            raise DamageError(
                f"its {part!r} have {stored.data.size} bytes, but its shape and the parts before "
                f"need {size_bytes}"
            )
        return stored.data


def part_names(name: str, encoding: str, deflated: Iterable[str]) -> dict[str, str]:
    """Names of the stored tensors that hold a tensor's parts, by part."""
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
    """Apply a function to items; the large items are shared among as many threads as torch uses.

    Args:
        function: A function that mostly computes checksums or runs NumPy's loops, which release
            the GIL.
        items: The items. Small ones are not given to threads, which would wait for each other.
        size_bytes: Returns the size of an item.
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
        for place in places:  # each thread continues with the next one that is left
            results[place] = function(items[place])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return [results[place] for place in range(len(items))]
