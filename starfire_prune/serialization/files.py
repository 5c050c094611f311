"""What files of pruned and of quantized models share: their forms, atomic writes, and errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor, distributed

from starfire_prune.serialization.container import write_tensor_file
from starfire_prune.serialization.entries import TENSORS_KEY
from starfire_prune.serialization.store import store_tensors
from starfire_prune.utils.errors import CheckpointError, CodecError, DamageError
from starfire_prune.utils.files import reason, replaced_file, writing

__all__ = ["FileFormat", "StrPath", "check_format", "is_writer", "loading", "write_state"]


FileFormat = Literal["dense", "compressed"]
StrPath = str | os.PathLike[str]
_NO_MEMORY = re.compile("DefaultCPUAllocator|not enough memory|out of memory")  # torch's texts


def check_format(format: str, deflate: bool) -> None:
    """Raise ValueError unless a file can have this form."""
    if format not in ("dense", "compressed"):
        raise ValueError(f"`format` (={format!r}) must be 'dense' or 'compressed'")
    if deflate and format == "dense":
        raise ValueError("`deflate` needs format='compressed': other readers can't inflate")


def is_writer() -> bool:
    """Whether this process is the first rank, or the only one."""
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return not is_distributed or distributed.get_rank() == 0


def write_state(
    path: Path,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    compress: bool,
    deflate: bool,
) -> None:
    """Write plain tensors to a file, atomically.

    Args:
        path: Path of the file.
        state: Contiguous tensors on the CPU by name; pruned weights are +0.0.
        masks: Masks of pruned tensors by name, bool of their shapes, True = kept.
        metadata: JSON by key.
        compress: Whether each tensor gets the encoding that takes the fewest bytes.
        deflate: Whether to deflate parts that get smaller by it.

    Raises:
        CheckpointError: If the disk is full, or a tensor can't be stored.
    """
    try:
        tensors, table = store_tensors(state, masks, compress=compress, deflates=deflate)
        header = {"format": "pt", **metadata, TENSORS_KEY: table}
        with writing(path), replaced_file(path) as temporary, temporary.open("wb") as file:
            write_tensor_file(file, tensors, header)
    except (CodecError, DamageError) as error:
        raise CheckpointError(f"{path} can't be written: {error}") from error


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn errors in a file's content into a CheckpointError that names the file."""
    try:
        yield
    except (CodecError, DamageError) as error:
        raise CheckpointError(f"{path} can't be loaded: {reason(error)}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise CheckpointError(f"{path} can't be loaded: there is not enough memory") from error
