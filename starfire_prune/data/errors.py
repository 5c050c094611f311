"""The error of data sets, and the packages that they need."""

from __future__ import annotations

__all__ = ["DataError", "error_sentence"]


class DataError(ValueError):
    """A data set that cannot be read, in one sentence that names the path and the way out."""


def error_sentence(error: DataError) -> str:
    """Give the one sentence of an error, also of one raised in a worker of a loader.

    A loader raises the error of a worker again with the worker's whole traceback for a message,
    of which this keeps the sentence at the end.

    Args:
        error: The error as it was caught.

    Returns:
        The sentence, without the traceback.

    Example:
        >>> error_sentence(DataError("/data/train holds no images"))
        '/data/train holds no images'
    """
    heading = f"{DataError.__module__}.{DataError.__qualname__}: "
    return str(error).rpartition(heading)[2].strip()
