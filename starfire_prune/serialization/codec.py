"""Encodings of one tensor that don't store its zeros: pure functions, specified in docs/format.md.

A tensor of shape `(K, C, *kernel)` consists of `K * C` kernels; in a tensor with fewer than three
dimensions each weight is a kernel. Only +0.0 counts as zero (compared bitwise); -0.0 and NaN are
stored. There are four encodings, with these parts in this order:

- `dense`: `values`, all weights.
- `ck`: `kernels`, one bit per kernel; `values`, all weights of the kernels whose bit is set.
- `window`: `kernels`; `patterns`, one bit per weight of the kernels whose bit is set; `values`, the
  weights whose bit is set.
- `bitmap`: `weights`, one bit per weight; `values`, the weights whose bit is set.

Decoding checks everything that it reads, and sizes before any memory is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starfire_prune.utils.errors import CodecError

__all__ = [
    "PARTS",
    "Encoded",
    "bits_of",
    "decode",
    "decode_into",
    "deflate",
    "encode",
    "inflate",
    "kept_values",
    "pack_bits",
    "read_parts",
    "unpack_bits",
]


Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.generic]
Items = npt.NDArray[np.generic]
PARTS: Mapping[str, tuple[str, ...]] = {
    "dense": ("values",),
    "ck": ("kernels", "values"),
    "window": ("kernels", "patterns", "values"),
    "bitmap": ("weights", "values"),
}
_BYTES_AT_ONCE = 2**20  # about the size of a core's cache
_MAX_KERNEL_BYTES = 2**30
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An encoded tensor.

    Attributes:
        encoding: A key of `PARTS`.
        shape: Shape of the tensor.
        item_bytes: Bytes of a weight: 1, 2, 4 or 8.
        parts: Bytes of each part by its name, flat.
    """

    encoding: str
    shape: tuple[int, ...]
    item_bytes: int
    parts: Mapping[str, Bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.size for part in self.parts.values())


def encode(tensor: Tensor, encoding: str | None = None) -> Encoded:
    """Encode a tensor in the encoding that takes the fewest bytes, the first of equals in `PARTS`.

    Tensors with fewer than three dimensions are encoded as `dense` or `bitmap`.

    Args:
        tensor: A tensor on the CPU of any shape, and of any dtype of 1, 2, 4 or 8 bytes.
        encoding: The encoding to use instead; a tensor without weights is always dense.

    Example:
        >>> weight = torch.zeros(8, 2, 3, 3)
        >>> weight[0, 0] = 1.0
        >>> encoded = encode(weight)
        >>> encoded.encoding, encoded.size_bytes  # 16 bits and 9 weights
        ('ck', 38)
    """
    values: npt.NDArray[np.generic] = bits_of(tensor.contiguous()).numpy()
    kernels = values.reshape(_kernels_of(tuple(tensor.shape)))
    kept = kernels != 0
    if not kept.size:
        encoding = "dense"
    elif encoding is None:
        encoding = _cheapest(kept, values.itemsize, tensor.ndim)
    parts = {
        name: part.reshape(-1).view(np.uint8) for name, part in _parts(encoding, kernels, kept)
    }
    return Encoded(encoding, tuple(tensor.shape), values.itemsize, parts)


def decode(encoded: Encoded) -> Tensor:
    """The bits of an encoded tensor, as integers of its shape."""
    out = torch.empty(math.prod(encoded.shape), dtype=_INTEGERS[encoded.item_bytes])
    decode_into(encoded, out)
    return out.view(encoded.shape)


def decode_into(encoded: Encoded, out: Tensor) -> None:
    """Decode a tensor into existing memory.

    Args:
        encoded: A tensor of `encode` or `read_parts`, which have checked it.
        out: Contiguous integers of the weights' size, as many as there are weights.
    """
    # NumPy's loops, not torch's: they use one thread, and the caller may have several
    values, weights = kept_values(encoded), out.view(-1).numpy()
    if encoded.encoding == "dense":
        np.copyto(weights, values)
        return
    if encoded.encoding == "bitmap":
        _scatter(weights, encoded.parts["weights"], values)
        return
    _, kernel_size = _kernels_of(encoded.shape)
    if encoded.encoding == "ck":
        bits, stored = encoded.parts["kernels"], _rows(values, kernel_size)
        _scatter(_rows(weights, kernel_size), bits, stored)
    else:
        _scatter_windows(weights, kernel_size, encoded.parts, values)


def kept_values(encoded: Encoded) -> Integers:
    """The bits of the stored weights as integers, flat."""
    dtype = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[encoded.item_bytes]
    return encoded.parts["values"].view(dtype)


def read_parts(
    encoding: str, shape: tuple[int, ...], item_bytes: int, read: Callable[[str, int], Bytes]
) -> Encoded:
    """Read the parts of an encoded tensor, and check them.

    Args:
        encoding: A key of `PARTS`.
        shape: The tensor's shape, of ints that are not negative.
        item_bytes: Bytes of a weight: 1, 2, 4 or 8.
        read: Returns a part, or raises, given its name and the number of bytes that it must have
            according to the shape and the parts before.

    Raises:
        CodecError: If the parts are not a tensor of this shape; also the errors of `read`.
    """
    n_kernels, kernel_size = _kernels_of(shape)
    count = n_kernels * kernel_size
    if encoding != "dense" and not count:
        raise CodecError(f"a tensor of shape {shape} has no weights: its encoding must be dense")
    if encoding in ("ck", "window") and kernel_size * item_bytes > _MAX_KERNEL_BYTES:
        raise CodecError(f"a kernel of shape {shape[2:]} has more than {_MAX_KERNEL_BYTES} bytes")
    parts: dict[str, Bytes] = {}
    for name in PARTS[encoding][:-1]:
        length = n_kernels if name == "kernels" else count
        parts[name] = read(name, -(-length // 8))
        _check_end(name, parts[name], length)
        count = _n_set(parts[name]) * (kernel_size if name == "kernels" else 1)
    parts["values"] = read("values", count * item_bytes)
    return Encoded(encoding, shape, item_bytes, parts)


def pack_bits(bits: Bools) -> Bytes:
    """Pack bits in row-major order, eight per byte, the first lowest; padding bits are zero."""
    return np.packbits(bits, bitorder="little")


def unpack_bits(packed: Bytes, length: int) -> Bools:
    """The bits that `pack_bits` packed, flat."""
    return np.unpackbits(packed, count=length, bitorder="little").view(np.bool_)


def deflate(data: Bytes, item_bytes: int) -> bytes:
    """Deflate items by byte planes: first the lowest byte of all items, the highest last.

    Returns:
        A zlib stream (RFC 1950).
    """
    planes = np.ascontiguousarray(data.reshape(-1, item_bytes).T)
    # Weights hardly repeat: entropy coding without a search for matches is faster and smaller
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return stream.compress(planes.data) + stream.flush()


def inflate(data: Bytes, size_bytes: int, item_bytes: int) -> Bytes:
    """The data that `deflate` deflated, of which no more than `size_bytes` are inflated.

    Raises:
        CodecError: If the stream is damaged, or holds fewer or more bytes.
    """
    stream = zlib.decompressobj()
    try:
        planes = stream.decompress(data.data, size_bytes) if size_bytes else b""
        rest = stream.decompress(stream.unconsumed_tail if size_bytes else data.data, 1)
    except zlib.error as error:
        raise CodecError(f"its deflated bytes are damaged ({error})") from error
    if len(planes) != size_bytes or rest or not stream.eof or stream.unused_data:
        raise CodecError(
            f"its deflated bytes don't hold the {size_bytes} bytes that its shape needs"
        )
    items = np.empty((size_bytes // item_bytes, item_bytes), np.uint8)
    for place, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(item_bytes, -1)):
        items[:, place] = plane
    return items.reshape(-1)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same size, in the same memory.

    Raises:
        CodecError: If a number of its dtype has more than 8 bytes.
    """
    if tensor.element_size() not in _INTEGERS:
        raise CodecError(f"{tensor.dtype} can't be stored: its numbers have more than 8 bytes")
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def _parts(
    encoding: str, kernels: npt.NDArray[np.generic], kept: Bools
) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """The parts of a tensor of shape `(kernels, weights of a kernel)`."""
    stored = np.ones_like(kept) if encoding == "dense" else kept
    if encoding == "bitmap":
        yield "weights", pack_bits(kept)
    if encoding in ("ck", "window"):
        alive: Bools = np.logical_or.reduce(kept, axis=1)
        yield "kernels", pack_bits(alive)
        if encoding == "window":
            yield "patterns", pack_bits(kept[alive])
        else:
            stored = np.broadcast_to(alive[:, None], kept.shape)
    yield "values", kernels[stored]


def _cheapest(kept: Bools, item_bytes: int, n_dims: int) -> str:
    alive: Bools = np.logical_or.reduce(kept, axis=1)
    kernel_size = kept.shape[1]
    n_alive, n_kept = int(np.count_nonzero(alive)), int(np.count_nonzero(kept))
    n_kernels = -(-alive.size // 8)
    sizes: dict[str, int] = {"dense": kept.size * item_bytes}
    if n_dims > 2 and kernel_size * item_bytes <= _MAX_KERNEL_BYTES:
        sizes["ck"] = n_kernels + n_alive * kernel_size * item_bytes
        sizes["window"] = n_kernels - (-n_alive * kernel_size // 8) + n_kept * item_bytes
    sizes["bitmap"] = -(-kept.size // 8) + n_kept * item_bytes
    return min(sizes, key=lambda encoding: sizes[encoding])


def _kernels_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of kernels of a tensor, and of weights per kernel."""
    return math.prod(shape[:2]), math.prod(shape[2:])


def _n_set(packed: Bytes) -> int:
    """Number of bits that are set, counted in chunks because an unpacked bit takes a byte."""
    chunks = (
        packed[first : first + _BYTES_AT_ONCE] for first in range(0, len(packed), _BYTES_AT_ONCE)
    )
    return sum(int(np.count_nonzero(np.unpackbits(chunk))) for chunk in chunks)


def _bits(packed: Bytes, first: int, length: int) -> Bools:
    """The `length` bits from bit `first` on."""
    skipped = first % 8
    return unpack_bits(packed[first // 8 :], skipped + length)[skipped:]


def _chunks(out: Items) -> Iterator[Items]:
    """Consecutive chunks of an array that fit in the cache."""
    at_once = max(_BYTES_AT_ONCE // out.itemsize, 1)
    return (out[first : first + at_once] for first in range(0, len(out), at_once))


def _scatter(out: Items, packed: Bytes, values: Items, first: int = 0) -> int:
    """Write values, in their order, where bits are set, and zeros elsewhere.

    This is done in chunks, because a position takes eight bytes.

    Args:
        out: The items to write, one per bit.
        packed: The packed bits.
        values: Items of the same size, beginning with that of the first bit that is set.
        first: Index of the first bit.

    Returns:
        The number of bits that are set.
    """
    start = 0
    for chunk in _chunks(out):
        chunk.view(np.uint8).fill(0)
        positions = np.flatnonzero(_bits(packed, first, len(chunk)))
        end = start + len(positions)
        chunk[positions] = values[start:end]
        start, first = end, first + len(chunk)
    return start


def _scatter_windows(
    out: Integers, kernel_size: int, packed: Mapping[str, Bytes], values: Integers
) -> None:
    """Write values where the patterns of kernels whose bit is set have a bit set."""
    first = pattern = start = 0
    for kernels in _chunks(_rows(out, kernel_size)):
        alive = np.flatnonzero(_bits(packed["kernels"], first, len(kernels)))
        is_sparse = len(alive) < len(kernels)
        weights = kernels.view(out.dtype)
        dense = np.empty(len(alive) * kernel_size, out.dtype) if is_sparse else weights
        start += _scatter(dense, packed["patterns"], values[start:], pattern)
        if is_sparse:
            weights.view(np.uint8).fill(0)
            kernels[alive] = _rows(dense, kernel_size)
        first, pattern = first + len(kernels), pattern + len(dense)


def _rows(weights: Integers, kernel_size: int) -> Items:
    """The kernels as items of a flat array, which is faster to index than rows."""
    if kernel_size == 1:
        return weights  # NumPy copies numbers faster than items of other sizes
    return weights.view(f"V{kernel_size * weights.itemsize}")


def _check_end(name: str, packed: Bytes, length: int) -> None:
    if length % 8 and packed[-1] >> length % 8:
        raise CodecError(f"padding bits after the last of its {name} are not zero")
