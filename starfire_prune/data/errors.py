"""The error of data sets, and the packages that they need."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

__all__ = ["DataError", "error_sentence", "import_optional", "listed"]


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


def import_optional(module: str, extra: str = "train") -> Any:
    """Import a module of an optional package; these are slow, so only where they are used.

    Args:
        module: The module's full name.
        extra: The extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If its package is missing, with the command that installs it.

    Example:
        >>> import_optional("json").dumps(3)
        '3'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise ModuleNotFoundError(
            f"this data set needs {package}: pip install 'starfire-prune[{extra}]'", name=error.name
        ) from error


def listed(names: Iterable[str], most: int = 5) -> str:
    """Enumerate names in sorted order, and only count those after the first few.

    Example:
        >>> listed(["c", "b", "a"], most=2)
        'a, b and 1 more'
    """
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
