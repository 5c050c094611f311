"""How a tensor with zeros is stored in fewer bytes: pure functions, specified in docs/format.md.

A tensor of shape `(K, C, *kernel)` is `K * C` kernels; one of fewer than three dimensions has a
kernel a weight. What is zero is decided by bits: +0.0 alone, so that -0.0 and NaNs stay as they
are. Four encodings, whose parts follow each other in this order:

- `dense`: `values`, every weight.
- `ck`: `kernels`, a bit a kernel; `values`, all weights of the kernels whose bit is set.
- `window`: `kernels`; `patterns`, a bit a weight of the kernels whose bit is set; `values`, the
  weights whose bit is set.
- `bitmap`: `weights`, a bit a weight; `values`, the weights whose bit is set.

Decoding checks whatever it reads: the sizes that a shape claims come before any memory.
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
_BYTES_AT_ONCE = 2**20  # about what a core's cache holds
_MAX_KERNEL_BYTES = 2**30
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor in one of the encodings.

    Attributes:
        encoding: a key of `PARTS`.
        shape: of the tensor.
        item_bytes: size of a weight, 1, 2, 4 or 8.
        parts: the bytes of each part, by its name, flat.
    """

    encoding: str
    shape: tuple[int, ...]
    item_bytes: int
    parts: Mapping[str, Bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts.values())


def encode(tensor: Tensor, encoding: str | None = None) -> Encoded:
    """Encode a tensor in the way that takes the fewest bytes; of equal ones the first of `PARTS`.

    Tensors of fewer than three dimensions have no kernels: `dense` and `bitmap` are for them.

    Args:
        tensor: of any shape and any dtype of 1, 2, 4 or 8 bytes, on the CPU.
        encoding: to take whatever its size; a tensor without weights is dense in any case.

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
    """Decode into memory that is there.

    Args:
        encoded: by `encode` or `read_parts`, which have checked it.
        out: integers of the weights' size, contiguous, of as many elements.
    """
    # NumPy's loops, and not torch's: they take one thread, and whoever calls may have several
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
    """The stored weights' bits as integers, flat."""
    dtype = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[encoded.item_bytes]
    return encoded.parts["values"].view(dtype)


def read_parts(
    encoding: str, shape: tuple[int, ...], item_bytes: int, read: Callable[[str, int], Bytes]
) -> Encoded:
    """Put an encoded tensor together from parts that are read, and check it.

    Args:
        encoding: a key of `PARTS`.
        shape: that the tensor claims, of ints from 0.
        item_bytes: size of a weight, 1, 2, 4 or 8.
        read: given a part's name and the bytes that it must have by all that was read before,
            returns it or raises.

    Raises:
        CodecError: if bits are set behind a bitmap's last one; what `read` raises.
    """
    n_kernels, kernel_size = _kernels_of(shape)
    count = n_kernels * kernel_size
    if encoding != "dense" and not count:
        raise CodecError(f"a tensor of shape {shape} holds no weights: it must be dense")
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
    """Bits in row-major order, eight a byte, the first in the lowest place; zeros at the end."""
    return np.packbits(bits, bitorder="little")


def unpack_bits(packed: Bytes, length: int) -> Bools:
    """The inverse of `pack_bits`, flat."""
    return np.unpackbits(packed, count=length, bitorder="little").view(np.bool_)


def deflate(data: Bytes, item_bytes: int) -> bytes:
    """Deflate items of several bytes by planes: first all their lowest bytes, the highest last.

    Returns:
        A zlib stream (RFC 1950).
    """
    planes = np.ascontiguousarray(data.reshape(-1, item_bytes).T)
    # Weights hardly repeat: entropy coding alone is faster, and smaller, than a search for matches
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return stream.compress(planes.data) + stream.flush()


def inflate(data: Bytes, size_bytes: int, item_bytes: int) -> Bytes:
    """The inverse of `deflate`, into at most `size_bytes`.

    Raises:
        CodecError: if the stream is damaged, or holds fewer or more bytes.
    """
    stream = zlib.decompressobj()
    try:
        planes = stream.decompress(data.data, size_bytes) if size_bytes else b""
        rest = stream.decompress(stream.unconsumed_tail if size_bytes else data.data, 1)
    except zlib.error as error:
        raise CodecError(f"its deflated bytes are damaged ({error})") from error
    if len(planes) != size_bytes or rest or not stream.eof or stream.unused_data:
        raise CodecError(f"its deflated bytes don't hold the {size_bytes} that its shape needs")
    items = np.empty((size_bytes // item_bytes, item_bytes), np.uint8)
    for place, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(item_bytes, -1)):
        items[:, place] = plane
    return items.reshape(-1)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same size, in the same memory.

    Raises:
        CodecError: if a weight has more than 8 bytes.
    """
    if tensor.element_size() not in _INTEGERS:
        raise CodecError(f"{tensor.dtype} has more than 8 bytes a number: it can't be stored")
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
    """How many kernels a tensor has, and how many weights a kernel."""
    return math.prod(shape[:2]), math.prod(shape[2:])


def _n_set(packed: Bytes) -> int:
    """How many bits are set; by parts, as an unpacked bit takes a byte."""
    parts = (
        packed[first : first + _BYTES_AT_ONCE] for first in range(0, len(packed), _BYTES_AT_ONCE)
    )
    return sum(int(np.count_nonzero(np.unpackbits(part))) for part in parts)


def _bits(packed: Bytes, first: int, length: int) -> Bools:
    """So many bits from a first one on."""
    skipped = first % 8
    return unpack_bits(packed[first // 8 :], skipped + length)[skipped:]


def _parts_of(out: Items) -> Iterator[Items]:
    """Consecutive parts of an array, that stay in the cache."""
    at_once = max(_BYTES_AT_ONCE // out.itemsize, 1)
    return (out[first : first + at_once] for first in range(0, len(out), at_once))


def _scatter(out: Items, packed: Bytes, values: Items, first: int = 0) -> int:
    """Put values, in their order, where bits are set, and zeros elsewhere.

    By parts, as a position takes eight bytes.

    Args:
        out: as many items as there are bits.
        packed: the bits.
        values: items of the same size, from the one of the first bit that is set on.
        first: of the bits.

    Returns:
        The number of bits that are set.
    """
    start = 0
    for part in _parts_of(out):
        part.view(np.uint8).fill(0)
        positions = np.flatnonzero(_bits(packed, first, len(part)))
        end = start + len(positions)
        part[positions] = values[start:end]
        start, first = end, first + len(part)
    return start


def _scatter_windows(
    out: Integers, kernel_size: int, packed: Mapping[str, Bytes], values: Integers
) -> None:
    """Put values where bits of the patterns of the kernels that are alive are set."""
    first = pattern = start = 0
    for kernels in _parts_of(_rows(out, kernel_size)):
        alive = np.flatnonzero(_bits(packed["kernels"], first, len(kernels)))
        some = len(alive) < len(kernels)
        weights = kernels.view(out.dtype)
        dense = np.empty(len(alive) * kernel_size, out.dtype) if some else weights
        start += _scatter(dense, packed["patterns"], values[start:], pattern)
        if some:
            weights.view(np.uint8).fill(0)
            kernels[alive] = _rows(dense, kernel_size)
        first, pattern = first + len(kernels), pattern + len(dense)


def _rows(weights: Integers, kernel_size: int) -> Items:
    """The kernels as items of an array, which is faster to index than rows."""
    if kernel_size == 1:
        return weights  # whose copies are faster than those of items of any size
    return weights.view(f"V{kernel_size * weights.itemsize}")


def _check_end(name: str, packed: Bytes, length: int) -> None:
    if length % 8 and packed[-1] >> length % 8:
        raise CodecError(f"bits are set behind the last of its {name}")
