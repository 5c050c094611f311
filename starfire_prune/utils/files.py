"""Atomic file and folder writes, and errors of files in one sentence."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from starfire_prune.utils.errors import CheckpointError

__all__ = [
    "checked_file",
    "move_file",
    "reason",
    "replaced_file",
    "replaced_folder",
    "write_text",
    "writing",
]


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


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which it replaces once the block has ended well.

    The file gets the mode of a newly made one, whatever the block does. What a kill leaves beside
    `path` the next write of the same file clears away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        move_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def checked_file(path: Path, writes: AbstractContextManager[Path]) -> Iterator[Path]:
    """Give what is written, whose checks in the block fail with errors of their own.

    Args:
        path: where it appears once the block has ended well.
        writes: enters with the written file's temporary path, and exits by putting it at `path`.

    Raises:
        CheckpointError: if it can't be written or put there.
    """
    with ExitStack() as stack:
        with writing(path):
            file = stack.enter_context(writes)
        yield file
        with writing(path):
            stack.close()


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which it replaces once the block has ended well."""
    path = path.resolve()  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)  # at once out of sight: a folder is never half there
        temporary.replace(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_file(source: Path, path: Path) -> None:
    """Put a whole file in the place of another, on the same disk, at once."""
    _sync(source)
    source.replace(path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until the file's or folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
