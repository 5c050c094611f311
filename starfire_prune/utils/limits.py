"""Errors of a machine that has too little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["explained_limits"]


@contextmanager
def explained_limits(
    error_type: type[Exception], *, less_memory: str, fewer_workers: str
) -> Iterator[None]:
    """Explain, in one sentence, errors of a device or a loader that ran out of memory.

    Args:
        error_type: Type of the errors that are raised instead.
        less_memory: What to do if the device has too little memory.
        fewer_workers: What to do if a loader's worker was killed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise error_type(f"the device has too little memory: {less_memory}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise error_type(
            f"a DataLoader worker was killed, usually because memory or /dev/shm ran out: "
            f"{fewer_workers}"
        ) from error
