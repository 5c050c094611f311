"""What goes wrong with files of weights, in a sentence that names the file and the way out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

__all__ = ["CheckpointError", "reason", "writing"]


class CheckpointError(ValueError):
    """A checkpoint or file of weights that can't be read or written, or does not fit."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a sentence; what stood at `path` or beside it is whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch tells a full disk as a mismatch of positions, within the real error
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} can't be written: {reason(cause)}; what was saved before is whole: make "
            f"room and run the same command again"
        ) from error


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, UnpicklingError):  # torch would advise to execute what the file holds
        return "it is damaged, or holds more than tensors and plain values"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return textwrap.shorten(str(error), 300) or type(error).__name__
