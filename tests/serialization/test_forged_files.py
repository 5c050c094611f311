"""Files made to do harm, with all checksums right: refused before anything is allocated."""

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from starfire_prune import load_masks, load_pruned, load_pruned_model
from starfire_prune.serialization.container import DTYPES, StoredTensor, write_tensor_file
from starfire_prune.serialization.inspect import inspect_pruned
from starfire_prune.utils.errors import CheckpointError
from tests.serialization.test_pruned import every_form, same, saved
from tests.serialization.test_untrusted_files import refused
from tests.support.networks import SmallNet

# Headers


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "header too large"),
        (struct.pack("<Q", 3) + b"{}", "invalid header length"),
        (raw(b"{"), "invalid JSON in header"),
        (raw(b"[" * 60_000), "invalid JSON in header"),
        (raw(b'{"a":' * 9_000), "invalid JSON in header: recursion limit exceeded"),
        (raw(b"\xff{}"), "invalid UTF-8 in header"),
        (raw(b'{"a": 1, "a": 1}'), "invalid JSON in header"),
        (raw(b'{"a": NaN}'), "invalid JSON in header: expected value"),
        (raw(b'{"a": ' + b"1" * 5000 + b"}"), "invalid JSON in header: number out of range"),
        (raw([]), "invalid JSON in header: invalid type: sequence"),
        (raw({"__metadata__": []}), "invalid type: sequence, expected a map"),
        (raw({"__metadata__": {"a": 1}}), "invalid type: integer `1`, expected a string"),
        (raw({"a": 1}), "invalid type: integer `1`, expected struct TensorInfo"),
        (raw({"a": {**ENTRY, "more": 1}}, bytes(8)), "it has no checksum of its header"),
        (raw({"a": {**ENTRY, "dtype": "F99"}}), "unknown variant `F99`"),
        (
            raw({"a": {**ENTRY, "dtype": "U32"}}, bytes(8)),
            "tensor 'a': its dtype U32 is not one of F64, F32, ",
        ),
        (raw({"a": {**ENTRY, "dtype": []}}), "invalid type: sequence, expected string"),
        (raw({"a": {**ENTRY, "shape": 2}}), "invalid type: integer `2`, expected a sequence"),
        (
            raw({"a": {**ENTRY, "shape": [1] * 16 + [2]}}, bytes(8)),
            "tensor 'a': its shape must be a list of at most 16 ints",
        ),
        (raw({"a": {**ENTRY, "shape": [-2]}}), "invalid value: integer `-2`, expected usize"),
        (raw({"a": {**ENTRY, "shape": [2.0]}}), "invalid type: floating point `2.0`"),
        (raw({"a": {**ENTRY, "shape": [True]}}), "invalid type: boolean `true`"),
        (raw({"a": {**ENTRY, "shape": [2**63]}}), "overflow computing buffer size"),
        (
            raw({"a": {**ENTRY, "shape": [0, 2**63], "data_offsets": [0, 0]}}),
            "tensor 'a': its shape must have dimensions from 0 to 2**63 - 1",
        ),
        (raw({"a": {**ENTRY, "data_offsets": [0]}}), "expected a tuple of size 2"),
        (raw({"a": ENTRY}), "file not fully covered"),
        (raw({"a": {**ENTRY, "shape": [3]}}, bytes(8)), "invalid shape, data type, or offset"),
        (raw({"a": {**ENTRY, "shape": [2**62] * 16}}, bytes(8)), "overflow computing buffer size"),
        (raw({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "invalid offset for tensor"),
        (raw({"a": {**ENTRY, "data_offsets": [0, 2**62]}}, bytes(8)), "invalid shape"),
        (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)), "invalid offset for tensor `a`"),
        (
            raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
            "invalid offset for tensor `b`",
        ),
        (
            raw({"\x1b[2J": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
            r"invalid offset for tensor `\x1b[2J`",
        ),
        (raw({"a": ENTRY}, bytes(16)), "file not fully covered"),
        (raw({"a": ENTRY}, bytes(8)), "it has no checksum of its header, unlike files of save_pru"),
        (
            raw({"\ud800": ENTRY, "__metadata__": {"starfire_prune.crc32": ""}}, bytes(8)),
            "invalid JSON in header: unexpected end of hex escape",
        ),
    ],
)
def test_a_header_that_claims_nonsense_is_refused(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in refused(path)


def forged(
    folder: Path,
    stored: dict[str, StoredTensor],
    table: object,
    pruning: object = None,
    **texts: str,
) -> Path:
    """A file of any table whose header has its CRC-32."""
    path = folder / "model.safetensors"
    pruning = {"format_version": 1, "weights": {}} if pruning is None else pruning
    texts = {f"starfire_prune.{key}": text for key, text in texts.items()}
    texts |= {"starfire_prune": json.dumps(pruning), "starfire_prune.tensors": json.dumps(table)}
    with path.open("wb") as file:
        write_tensor_file(file, stored, texts)
    return path


def part(data: bytes, dtype: str = "U8") -> StoredTensor:
    size = len(data) // DTYPES[dtype].itemsize
    return StoredTensor(dtype, (size,), np.frombuffer(data, np.uint8))


def encoded(
    encoding: object, shape: object, parts: dict[str, StoredTensor], **more: object
) -> tuple[dict[str, StoredTensor], dict[str, object]]:
    """Stored parts of a tensor `a`, and its entry in the table."""
    crc32 = {name: zlib.crc32(stored.data.tobytes()) for name, stored in parts.items()}
    entry = {"encoding": encoding, "dtype": "F32", "shape": shape, "crc32": crc32, **more}
    return {f"a:{name}": stored for name, stored in parts.items()}, {"a": entry}


FLOATS = part(np.ones(9, "<f4").tobytes(), "F32")
BIT = part(b"\x01")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        # One kernel of nine weights, and what does not go with it
        (encoded("ck", [1, 1, 3, 4], {"kernels": BIT, "values": FLOATS}), "its 'values' have 36"),
        (encoded("ck", [2, 4, 3, 3], {"kernels": part(b"\x03"), "values": FLOATS}), "need 72"),
        (encoded("ck", [3, 3, 3, 3], {"kernels": BIT, "values": FLOATS}), "its 'kernels' have 1"),
        (
            encoded("ck", [1, 1, 3, 3], {"kernels": part(b"\3"), "values": FLOATS}),
            "padding bits after the last",
        ),
        (
            encoded("ck", [1, 1, 3, 3], {"kernels": FLOATS, "values": FLOATS}),
            "the dtype F32",
        ),
        (
            encoded("ck", [1, 1, 3, 3], {"kernels": BIT, "values": part(bytes(36))}),
            "with the dtype U8",
        ),
        (encoded("ck", [1, 1, 3, 3], {"values": FLOATS, "weights": BIT}), "not those of its enc"),
        (encoded("ck", [1, 1, 3, 3], {"values": FLOATS}), "its parts are not those of its enc"),
        (encoded("zip", [9], {"values": FLOATS}), "its encoding is unknown"),
        (encoded([], [9], {"values": FLOATS}), "its encoding is unknown"),
        (
            encoded("bitmap", [9], {"weights": part(b"\xff\x03"), "values": FLOATS}),
            "after the",
        ),
        (
            encoded("bitmap", [-9], {"weights": BIT, "values": FLOATS}),
            "must have dimensions from 0",
        ),
        (encoded("bitmap", "9", {"weights": BIT, "values": FLOATS}), "its shape must be a list"),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, dtype="X"), "its dtype is unk"),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, dtype=[]), "its dtype is unk"),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, more=1), "has unknown keys"),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, deflated=1), "wrong types"),
        (
            encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, deflated=["b"]),
            "an unknown",
        ),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, kept_zeros=1), "wrong types"),
        (encoded("bitmap", [9], {"weights": BIT, "values": FLOATS}, crc32=[]), "not those of its"),
        (
            encoded(
                "bitmap", [9], {"weights": BIT, "values": FLOATS}, crc32={"weights": 1, "values": 2}
            ),
            "CRC-32 mismatch in its 'weights'",
        ),
        (
            encoded("bitmap", [2], {"weights": part(b"\3"), "values": part(b"\1\2")}, dtype="BOOL"),
            "its 'values' are stored with the dtype U8",
        ),
        (
            encoded(
                "bitmap",
                [2],
                {"weights": part(b"\3"), "values": part(b"\1\2", "BOOL")},
                dtype="BOOL",
            ),
            "its bools are not all 0 or 1",
        ),
        # Bombs
        (
            encoded("ck", [8, 1, 2**40], {"kernels": part(b"\0"), "values": part(b"", "F32")}),
            "35,184",
        ),
        (encoded("ck", [8, 1, 2**62, 2**62], {"kernels": BIT, "values": FLOATS}), "`max_bytes`"),
        (encoded("ck", [0, 2**62, 2**62], {"kernels": BIT, "values": FLOATS}), "`max_bytes`"),
        (encoded("ck", [1, 1, 2**29], {"kernels": BIT, "values": FLOATS}), "has more than 1073741"),
        (encoded("ck", [0, 3, 3], {"kernels": BIT, "values": FLOATS}), "has no weights"),
        (
            encoded(
                "dense", [2**20], {"values": part(zlib.compress(bytes(2**23)))}, deflated=["values"]
            ),
            "don't hold the 4194304",
        ),
        (
            encoded(
                "dense", [2**20], {"values": part(zlib.compress(bytes(2**10)))}, deflated=["values"]
            ),
            "don't hold the 4194304",
        ),
        (encoded("dense", [9], {"values": part(b"\0" * 36)}, deflated=["values"]), "are damaged ("),
    ],
)
def test_parts_that_are_not_of_their_shape_are_refused(made, message, tmp_path):
    path = forged(tmp_path, *made)
    told = refused(path)
    assert message in told
    assert told.startswith("tensor 'a': ") or "`max_bytes`" in told


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "tensor 'a:kernels' is not in its table"),
        ([], "its table of tensors is not a JSON object"),
        ({"a": 1}, "tensor 'a': its entry in the table has unknown keys"),
        (
            {"b": {"encoding": "dense", "crc32": {"values": 0}}},
            "tensor 'b': its part 'b' is missing",
        ),
    ],
)
def test_a_table_that_is_not_of_the_stored_tensors_is_refused(table, message, tmp_path):
    stored, _ = encoded("ck", [1, 1, 3, 3], {"kernels": BIT, "values": FLOATS})
    assert refused(forged(tmp_path, stored, table)) == message


def test_a_stored_tensor_belongs_to_one_entry_of_the_table(tmp_path):
    stored = {"a:values": part(zlib.compress(bytes(4)))}
    crc32 = {"values": zlib.crc32(stored["a:values"].data.tobytes())}
    deflated = {"dtype": "F32", "shape": [1], "deflated": ["values"]}
    table = {
        "a": {"encoding": "dense", "crc32": crc32, **deflated},
        "a:values": {"encoding": "dense", "crc32": crc32},
    }
    told = refused(forged(tmp_path, stored, table))
    assert told == "tensor 'a:values' is in its table twice"


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (
            {"format_version": 2},
            "its format_version is 2, but this version of starfire_prune reads 1",
        ),
        ({"format_version": "1"}, "its format_version is '1', but"),
        ({}, "it is not a file of save_pruned: its metadata have no format_version"),
        ([], "its metadata 'starfire_prune' is not a JSON object"),
    ],
)
def test_another_version_is_refused(pruning, message, tmp_path):
    path = forged(tmp_path, {}, {}, pruning)
    assert refused(path).startswith(message)


@pytest.mark.parametrize("key", ["model", "recipe"])
@pytest.mark.parametrize("levels", [64, 480])
def test_metadata_that_are_nested_deep_are_refused(key, levels, tmp_path):
    text = '{"name":"test_resnet","x":' + '{"a":' * levels + "1" + "}" * levels + "}"
    message = f"its metadata 'starfire_prune.{key}' is nested deeper than 64 levels"
    assert refused(forged(tmp_path, {}, {}, **{key: text})) == message


@pytest.mark.parametrize(
    ("weights", "note", "message"),
    [
        (None, None, "its metadata name pruned weights that it does not hold"),
        ([], None, "its metadata name pruned weights that it does not hold"),
        ({"b": {}}, None, "its metadata name pruned weights that it does not hold"),
        ({"a": {}}, "!", "tensor 'a': its kept zeros are damaged"),
        ({"a": {}}, base64.b64encode(b"abc").decode(), "tensor 'a': its kept zeros are damaged"),
        (
            {"a": {}},
            base64.b64encode(zlib.compress(bytes(2**20))).decode(),
            "tensor 'a': its kept zeros are damaged",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(weights, note, message, tmp_path):
    more = {} if note is None else {"kept_zeros": note}
    stored, table = encoded("bitmap", [9], {"weights": part(b"\xff\x01"), "values": FLOATS}, **more)
    path = forged(tmp_path, stored, table, {"format_version": 1, "weights": weights})
    assert refused(path, load_masks) == message


@every_form
def test_the_decoded_size_is_bounded(form, tmp_path):
    path = saved(tmp_path, form)
    total = sum(tensor.nbytes for tensor in load_pruned(path).values())
    readers: list[Callable[..., object]] = [load_pruned, load_masks, inspect_pruned]
    for reader in readers:
        assert reader(path, max_bytes=total)
        with pytest.raises(
            CheckpointError, match=re.escape(f"`max_bytes` (={total - 1:,}) allows")
        ):
            reader(path, max_bytes=total - 1)


def test_parts_that_lie_unaligned_are_read(tmp_path):
    path = saved(tmp_path, "compressed")
    expected = load_pruned(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(
        struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    assert same(load_pruned(path), expected)
    model = load_pruned_model(path, SmallNet(seed=1))
    assert same(dict(model.state_dict()), expected)
