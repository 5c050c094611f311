"""The error of data sets, also as raised in a worker of a loader."""

from __future__ import annotations

__all__ = ["DataError", "error_sentence"]


class DataError(ValueError):
    """A data set can't be read; one sentence names the path and what to do."""


def error_sentence(error: DataError) -> str:
    """The message of an error, without the traceback that a loader adds to it.

    When an error is raised in a worker, the loader raises it again with the worker's traceback as
    its message; the original message is at the end.

    Args:
        error: The caught error.

    Returns:
        The original message.

    Example:
        >>> error_sentence(DataError("/data/train holds no images"))
        '/data/train holds no images'
    """
    heading = f"{DataError.__module__}.{DataError.__qualname__}: "
    return str(error).rpartition(heading)[2].strip()
