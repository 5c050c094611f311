"""Packages that only some parts of the library need."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_optional"]


def import_optional(module: str, extra: str = "train", needed_by: str = "this data set") -> Any:
    """Import a module of an optional package, which may be slow or not installed.

    Args:
        module: The module's full name.
        extra: The extra of this package that installs it.
        needed_by: Subject of the error message, such as "this data set".

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
            f"{needed_by} needs {package}: pip install 'starfire-prune[{extra}]'", name=error.name
        ) from error
