"""The encodings of tensors: bits out as bits went in, in as few bytes as the zeros allow."""

import math
import re
import tracemalloc
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starfire_prune import ck_mask, intra_mask, magnitude_mask, window_mask
from starfire_prune.serialization import codec
from starfire_prune.serialization.codec import (
    PARTS,
    Encoded,
    bits_of,
    decode,
    decode_into,
    deflate,
    encode,
    inflate,
    read_parts,
)
from starfire_prune.utils.errors import CodecError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ENCODINGS = [None, *PARTS]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, NaNs, infinities and -0.0 among them, with zeros by weight and by kernel."""
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    words = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).byte()
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    bits: Tensor = words.view(INTEGERS[dtype.itemsize]).view(shape)
    sign = torch.tensor([0x80], dtype=torch.uint8)
    negative_zero: Tensor = torch.cat([sign.new_zeros(dtype.itemsize - 1), sign]).view(bits.dtype)
    kinds = torch.rand(shape, generator=generator)
    bits = torch.where(kinds < 0.1, negative_zero, bits)
    bits[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    rows = bits.view(math.prod(shape[:2]), -1)
    rows[torch.rand(len(rows), generator=generator) < draw(st.sampled_from([0.0, 0.6]))] = 0
    return bits.view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(bits_of(one), bits_of(other))


def read_again(
    encoded: Encoded, parts: Mapping[str, npt.NDArray[np.uint8]] | None = None
) -> Encoded:
    """What a reader makes of parts, which have to be of the sizes that it asks for."""
    held = encoded.parts if parts is None else parts

    def read(name: str, size_bytes: int) -> npt.NDArray[np.uint8]:
        if held[name].size != size_bytes:
            raise CodecError(f"{name} has {held[name].size} bytes, wanted {size_bytes}")
        return held[name]

    return read_parts(encoded.encoding, encoded.shape, encoded.item_bytes, read)


def sparse(shape: tuple[int, ...], kind: str, amount: float = 0.6) -> Tensor:
    """Weights that a method has pruned."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    masks: dict[str, Callable[..., Tensor]] = {
        "ck": ck_mask,
        "window": window_mask,
        "intra": intra_mask,
        "fine": magnitude_mask,
    }
    return weight.masked_fill(~masks[kind](weight, amount), 0.0) if amount else weight


# Out as it went in


@given(tensors(), st.sampled_from(ENCODINGS))
def test_every_encoding_gives_back_all_bits(tensor, encoding):
    encoded = encode(tensor, encoding)
    assert same_bits(decode(encoded), bits_of(tensor))
    assert same_bits(decode(read_again(encoded)), bits_of(tensor))


@given(tensors())
def test_the_encoding_of_the_fewest_bytes_is_chosen(tensor):
    kinds = list(PARTS) if tensor.ndim > 2 else ["dense", "bitmap"]
    sizes = [encode(tensor, kind).size_bytes for kind in kinds]
    assert encode(tensor).size_bytes == min(sizes)


@given(tensors(), st.sampled_from(ENCODINGS))
def test_a_reader_written_from_the_specification_reads_the_same(tensor, encoding):
    encoded = encode(tensor, encoding)
    item = encoded.item_bytes
    words = bits_of(tensor).numpy().tobytes()
    expected = [words[i : i + item] for i in range(0, len(words), item)]
    assert plain_decode(encoded.encoding, tuple(tensor.shape), item, encoded.parts) == expected


def plain_decode(
    encoding: str, shape: tuple[int, ...], item: int, parts: Mapping[str, npt.NDArray[np.uint8]]
) -> list[bytes]:
    """The words of a tensor, by plain loops over docs/format.md."""
    data = {name: bytes(part) for name, part in parts.items()}

    def bit(part: str, index: int) -> bool:
        return bool(data[part][index // 8] >> index % 8 & 1)

    n_kernels, size = math.prod(shape[:2]), math.prod(shape[2:])
    words, taken, alive = [], 0, 0
    for kernel in range(n_kernels):
        is_alive = encoding not in ("ck", "window") or bit("kernels", kernel)
        for place in range(size):
            stored = is_alive
            if encoding == "bitmap":
                stored = bit("weights", kernel * size + place)
            elif encoding == "window" and is_alive:
                stored = bit("patterns", alive * size + place)
            words.append(
                data["values"][taken * item : (taken + 1) * item] if stored else b"\0" * item
            )
            taken += stored
        alive += is_alive
    assert taken * item == len(data["values"])
    return words


def test_the_parts_of_a_tensor_by_hand():
    weight = torch.tensor([[[1.0, 0.0, 2.0]], [[0.0] * 3], [[-0.0, 3.0, 0.0]]])
    one, two, three = (np.array([value], "<f4").tobytes() for value in (1, 2, 3))
    zero, negative = b"\0" * 4, b"\0\0\0\x80"
    assert parts_of(weight, "ck") == {
        "kernels": b"\x05",
        "values": one + zero + two + negative + three + zero,
    }
    assert parts_of(weight, "window") == {
        "kernels": b"\x05",
        "patterns": bytes([0b011_101]),
        "values": one + two + negative + three,
    }
    assert parts_of(weight, "bitmap") == {
        "weights": bytes([0b11_000_101, 0b0]),
        "values": one + two + negative + three,
    }


def parts_of(tensor: Tensor, encoding: str) -> dict[str, bytes]:
    return {name: part.tobytes() for name, part in encode(tensor, encoding).parts.items()}


@pytest.mark.parametrize("at_once", [1, 36, 100, 2**15])
def test_windows_are_decoded_some_at_a_time(at_once, monkeypatch):
    monkeypatch.setattr(codec, "_BYTES_AT_ONCE", at_once)
    weight = sparse((9, 7, 3, 3), "intra")
    assert same_bits(decode(encode(weight, "window")), bits_of(weight))


@pytest.mark.parametrize("at_once", [1, 8, 100, 2**18])
@pytest.mark.parametrize(("shape", "encoding"), [((9, 77), "bitmap"), ((9, 7, 1, 1), "ck")])
def test_bits_are_decoded_some_at_a_time(shape, encoding, at_once, monkeypatch):
    monkeypatch.setattr(codec, "_BYTES_AT_ONCE", at_once)
    weight = sparse(shape, "fine" if encoding == "bitmap" else "ck")
    assert same_bits(decode(encode(weight, encoding)), bits_of(weight))


@pytest.mark.parametrize(
    ("shape", "encoding"),
    [((2**22, 1), "bitmap"), ((2**22, 1, 1), "window"), ((4, 1, 2**20), "window")],
)
def test_decoding_allocates_little_more_than_the_tensor(shape, encoding):
    weight = torch.ones(shape)
    weight[-1] = 0.0
    encoded, out = encode(weight, encoding), torch.empty(2**22, dtype=torch.int32)
    tracemalloc.start()
    try:
        decode_into(encoded, out)
        assert tracemalloc.get_traced_memory()[1] < 2**23  # positions all at once took 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_kernel_that_numpy_has_no_item_for_is_decoded():
    weight = torch.zeros(1, 1, 2**31, dtype=torch.uint8)
    weight[..., -1] = 7
    encoded = encode(weight)
    assert encoded.encoding == "bitmap"
    assert torch.equal(decode(encoded), weight)


def test_decoding_overwrites_what_was_there():
    weight = sparse((8, 4, 3, 3), "ck")
    for encoding in PARTS:
        out = torch.full((8 * 4 * 9,), -1, dtype=torch.int32)
        decode_into(encode(weight, encoding), out)
        assert same_bits(out.view(weight.shape), bits_of(weight))


def test_a_channels_last_weight_is_encoded_in_the_order_of_its_shape():
    weight = sparse((8, 4, 3, 3), "intra")
    apart = weight.to(memory_format=torch.channels_last)
    assert parts_of(apart, "window") == parts_of(weight, "window")


# In few bytes


@pytest.mark.parametrize(
    ("shape", "kind", "amount", "encoding", "bits"),
    [
        ((16, 16, 3, 3), "ck", 0.75, "ck", 256 + 64 * 9 * 32),
        ((16, 16, 3, 3), "window", 5 / 9, "bitmap", 256 * 9 + 256 * 4 * 32),
        ((16, 16, 1, 1), "ck", 0.75, "ck", 256 + 64 * 32),
        ((16, 16), "fine", 0.75, "bitmap", 256 + 64 * 32),
        ((16, 16, 3, 3), "none", 0.0, "dense", 256 * 9 * 32),
        ((16, 16), "none", 0.0, "dense", 256 * 32),
    ],
)
def test_each_method_gets_the_encoding_of_its_structure(shape, kind, amount, encoding, bits):
    encoded = encode(sparse(shape, kind, amount))
    assert (encoded.encoding, encoded.size_bytes) == (encoding, bits // 8)


def test_intra_gets_a_bit_a_kernel_and_a_pattern_a_surviving_one():
    weight = sparse((16, 16, 3, 3), "intra")
    alive = int((weight != 0).flatten(2).any(2).sum())
    encoded = encode(weight)
    assert encoded.encoding == "window"
    assert encoded.size_bytes == 32 + math.ceil(alive * 9 / 8) + 4 * int((weight != 0).sum())


def test_a_tensor_of_zeros_is_stored_as_one_bit_per_kernel():
    encoded = encode(torch.zeros(16, 16, 3, 3))
    assert (encoded.encoding, encoded.size_bytes) == ("ck", 32)


# Refused


@pytest.mark.parametrize("part", ["kernels", "patterns", "weights"])
def test_bits_behind_the_last_are_refused(part):
    encoding = "bitmap" if part == "weights" else "window"
    encoded = encode(torch.eye(3).view(3, 1, 3), encoding)
    damaged = encoded.parts[part].copy()
    damaged[-1] |= 0x80
    with pytest.raises(CodecError, match=f"padding bits after the last of its {part} are"):
        read_again(encoded, {**encoded.parts, part: damaged})


@pytest.mark.parametrize("encoding", PARTS)
def test_the_sizes_that_are_asked_for_follow_from_what_was_read(encoding):
    encoded = encode(sparse((5, 3, 3, 3), "intra"), encoding)
    for part in encoded.parts:
        for change in (encoded.parts[part][:-1], np.append(encoded.parts[part], np.uint8(0))):
            with pytest.raises(CodecError, match=f"{part} has {change.size} bytes, wanted"):
                read_again(encoded, {**encoded.parts, part: change})


@pytest.mark.parametrize("encoding", ["ck", "window", "bitmap"])
def test_an_encoded_tensor_without_weights_is_refused(encoding):
    with pytest.raises(CodecError, match=re.escape(f"shape (0, {2**40}) has no weights")):
        read_parts(encoding, (0, 2**40), 4, lambda name, size_bytes: np.zeros(0, np.uint8))


@pytest.mark.parametrize("encoding", ["ck", "window"])
def test_kernels_that_no_network_has_are_refused(encoding):
    with pytest.raises(CodecError, match="has more than 1073741824 bytes"):
        read_parts(encoding, (1, 1, 2**29), 4, lambda name, size_bytes: np.zeros(1, np.uint8))


def test_numbers_of_more_than_eight_bytes_are_refused():
    with pytest.raises(CodecError, match="complex128 can't be stored: its numbers have more"):
        encode(torch.zeros(2, dtype=torch.complex128))


# Deflated


@given(tensors())
def test_deflated_items_inflate_to_the_same_bytes(tensor):
    data = encode(tensor, "dense").parts["values"]
    item_bytes = tensor.element_size()
    deflated = np.frombuffer(deflate(data, item_bytes), np.uint8)
    assert inflate(deflated, data.size, item_bytes).tobytes() == data.tobytes()


def test_planes_follow_each_other_from_the_lowest_byte():
    data = np.array([0x04030201, 0x08070605], "<u4").view(np.uint8)
    assert zlib.decompress(deflate(data, 4)) == bytes([1, 5, 2, 6, 3, 7, 4, 8])


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.83), (torch.float16, 0.81), (torch.bfloat16, 0.65)]
)
def test_weights_that_pruning_has_left_deflate(dtype, most):
    weight = sparse((256, 400), "fine", 0.7).to(dtype)
    data = encode(weight, "bitmap").parts["values"]
    assert len(deflate(data, weight.element_size())) < most * data.size


@pytest.mark.parametrize("size_bytes", [0, 4, 1000, 999_996, 1_000_004])
def test_a_stream_of_another_size_is_refused_without_inflating_it_all(size_bytes):
    bomb = np.frombuffer(zlib.compress(b"\0" * 1_000_000, 9), np.uint8)
    with pytest.raises(CodecError, match=f"don't hold the {size_bytes} bytes that its shape needs"):
        inflate(bomb, size_bytes, 4)


@pytest.mark.parametrize("damage", ["cut", "trailing", "flipped", "empty", "noise"])
def test_a_damaged_stream_is_refused(damage):
    stream = bytearray(deflate(np.arange(200, dtype=np.uint8), 4))
    if damage == "flipped":
        stream[-1] ^= 1
    damaged = {
        "cut": stream[:-1],
        "trailing": stream + b"\0",
        "flipped": stream,
        "empty": b"",
        "noise": b"\xff" * 50,
    }[damage]
    with pytest.raises(CodecError, match="its deflated bytes"):
        inflate(np.frombuffer(bytes(damaged), np.uint8), 200, 4)
