"""Writing the tensors of a pruned file: their encoding, their parts and the table of entries."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starfire_prune.serialization.codec import bits_of, deflate, encode, pack_bits
from starfire_prune.serialization.container import DTYPES, StoredTensor, dtype_code
from starfire_prune.serialization.entries import ENTRY_BYTES, in_parallel, part_names
from starfire_prune.utils.errors import DamageError

__all__ = ["store_tensors"]


def store_tensors(
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    compress: bool,
    deflates: bool = False,
) -> tuple[dict[str, StoredTensor], str]:
    """Encode tensors for a file.

    Args:
        state: Contiguous tensors on the CPU by name; pruned weights are +0.0.
        masks: Masks of pruned tensors by name, bool of their shapes, True = kept.
        compress: Whether to use the encoding that takes the fewest bytes instead of dense.
        deflates: Whether to deflate parts that get smaller.

    Returns:
        The stored tensors by name, and the table as JSON.

    Raises:
        DamageError: If a tensor's dtype can't be stored, or its name is that of another's part.
    """

    def store(name: str) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        stored, entry = _store(name, state[name], compress, deflates)
        return stored, {**entry, **_kept_zeros(state[name], masks.get(name))}

    results = dict(
        zip(state, in_parallel(store, state, lambda name: state[name].nbytes), strict=True)
    )
    tensors = {name: part for stored, _ in results.values() for name, part in stored.items()}
    table = {name: entry for name, (_, entry) in results.items()}
    if len(tensors) != sum(len(stored) for stored, _ in results.values()):
        raise DamageError("a tensor has the name of another tensor's part: rename it")
    return tensors, json.dumps(table, separators=(",", ":"), ensure_ascii=False)


def _store(
    name: str, tensor: Tensor, compress: bool, deflates: bool
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    code = dtype_code(tensor.dtype)
    if code is None:
        raise DamageError(f"tensor {name!r} has the dtype {tensor.dtype}, which can't be stored")
    encoded = encode(tensor, "dense")
    if compress and (tensor.is_floating_point() or tensor.dtype == torch.int8):
        smallest = encode(tensor)
        if smallest.size_bytes + ENTRY_BYTES < encoded.size_bytes:
            encoded = smallest
    parts, dtypes, deflated = dict(encoded.parts), dict.fromkeys(encoded.parts, "U8"), []
    dtypes["values"] = code
    for part in parts if deflates else ():
        item_bytes = encoded.item_bytes if part == "values" else 1
        smaller = np.frombuffer(deflate(parts[part], item_bytes), np.uint8)
        if smaller.size + ENTRY_BYTES < parts[part].size:
            parts[part], dtypes[part] = smaller, "U8"
            deflated.append(part)
    names = part_names(name, encoded.encoding, deflated)
    stored = {
        names[part]: StoredTensor(
            dtypes[part],
            encoded.shape if names[part] == name else (data.size // DTYPES[dtypes[part]].itemsize,),
            data,
        )
        for part, data in parts.items()
    }
    entry: dict[str, Any] = {"encoding": encoded.encoding}
    if names["values"] != name:
        entry |= {"dtype": code, "shape": list(encoded.shape)}
    if deflated:
        entry["deflated"] = deflated
    return stored, {**entry, "crc32": {part: zlib.crc32(data.data) for part, data in parts.items()}}


def _kept_zeros(tensor: Tensor, mask: Tensor | None) -> dict[str, str]:
    """The entry's `kept_zeros`: weights that are +0.0 but not pruned; empty if there are none."""
    if mask is None:
        return {}
    kept_zeros = mask & (bits_of(tensor) == 0)
    if not bool(kept_zeros.any()):
        return {}
    packed = deflate(pack_bits(kept_zeros.contiguous().numpy()), 1)
    return {"kept_zeros": base64.b64encode(packed).decode("ascii")}
