"""Inspecting a file of a pruned model: shape, sparsity, encoding and bytes of each tensor."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from starfire_prune.serialization.codec import kept_values
from starfire_prune.serialization.container import MAX_BYTES
from starfire_prune.serialization.entries import TensorEntry
from starfire_prune.serialization.pruned import read_pruned_file
from starfire_prune.utils.text import format_columns

__all__ = ["Inspection", "TensorInfo", "format_inspection", "inspect_pruned"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the tensor.
        dtype: Dtype, such as `"float32"`.
        zeros: Number of elements that are +0.0.
        total: Number of elements.
        encoding: `"dense"`, `"ck"`, `"window"` or `"bitmap"`, followed by `"+deflate"` if a part
            is deflated.
        size_bytes: Bytes in the file.
        share: Share of the file's bytes, in [0, 1].
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    total: int
    encoding: str
    size_bytes: int
    share: float

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return self.zeros / self.total if self.total else 0.0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A file of a pruned model.

    Attributes:
        tensors: The tensors in the order of the model's state dict.
        size_bytes: Size of the file.
        header_bytes: Size of its header.
        dense_bytes: Bytes of all tensors once decoded.
        pruning: Method, amount, era and phase, and the zeros of each pruned weight.
        model: Arguments of `timm.create_model`; None if unknown.
        recipe: The run's recipe; None if unknown.
    """

    tensors: tuple[TensorInfo, ...]
    size_bytes: int
    header_bytes: int
    dense_bytes: int
    pruning: dict[str, Any]
    model: dict[str, Any] | None
    recipe: dict[str, Any] | None

    def __repr__(self) -> str:
        return f"Inspection({len(self.tensors)} tensors, size_bytes={self.size_bytes})"


def inspect_pruned(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Inspection:
    """Describe the content of a file of `save_pruned`, and verify all its checksums.

    Args:
        path: Path of the file.
        max_bytes: Most bytes that all decoded tensors may take, as in `load_pruned`.

    Raises:
        CheckpointError: As `load_pruned`.

    Example:
        >>> print(format_inspection(inspect_pruned("model.safetensors")))  # doctest: +SKIP
    """
    file = read_pruned_file(path, max_bytes=max_bytes)
    tensors = tuple(_info(entry, file.size_bytes) for entry in file.entries.values())
    return Inspection(
        tensors=tensors,
        size_bytes=file.size_bytes,
        header_bytes=file.size_bytes - sum(tensor.size_bytes for tensor in tensors),
        dense_bytes=sum(entry.size_bytes for entry in file.entries.values()),
        pruning=file.pruning,
        model=file.model,
        recipe=file.recipe,
    )


def format_inspection(inspection: Inspection) -> str:
    """A table of a file's tensors, with the header and the totals at the end."""
    header = ("tensor", "shape", "dtype", "sparsity", "encoding", "bytes", "share")
    rows = [
        (
            _printable(tensor.name),
            "x".join(map(str, tensor.shape)),
            tensor.dtype,
            f"{tensor.sparsity:.2%}",
            tensor.encoding,
            f"{tensor.size_bytes:,}",
            f"{tensor.share:.2%}",
        )
        for tensor in inspection.tensors
    ]
    share = inspection.header_bytes / inspection.size_bytes
    rows.append(("(header)", "", "", "", "", f"{inspection.header_bytes:,}", f"{share:.2%}"))
    of_dense = inspection.size_bytes / inspection.dense_bytes if inspection.dense_bytes else 1.0
    return "\n".join(
        [
            format_columns(header, rows, left=(0, 1, 2, 4)),
            f"{inspection.size_bytes:,} bytes, {of_dense:.1%} of the {inspection.dense_bytes:,} "
            f"of all tensors dense",
        ]
    )


def _info(entry: TensorEntry, file_bytes: int) -> TensorInfo:
    total = entry.size_bytes // entry.encoded.item_bytes
    return TensorInfo(
        name=entry.name,
        shape=entry.shape,
        dtype=str(entry.dtype).removeprefix("torch."),
        zeros=total - int(np.count_nonzero(kept_values(entry.encoded))),
        total=total,
        encoding=entry.encoded.encoding + ("+deflate" if entry.deflated else ""),
        size_bytes=entry.stored_bytes,
        share=entry.stored_bytes / file_bytes,
    )


def _printable(name: str) -> str:
    """A name without characters that control a terminal."""
    return name if name.isprintable() else repr(name)
