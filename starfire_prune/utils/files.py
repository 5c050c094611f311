"""Atomic writes of files and folders, and their errors in one sentence."""

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
    """Turn errors of an atomic write to `path` into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a wrong position, raised in handling the real error
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} can't be written: {reason(cause)}; earlier files are intact: make "
            f"room and run the same command again"
        ) from error


def reason(error: BaseException) -> str:
    """The message of an error, in one line."""
    if isinstance(error, UnpicklingError):  # torch would advise to execute the file's code
        return "it is damaged, or holds more than tensors and plain values"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return textwrap.shorten(str(error), 300) or type(error).__name__


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and replace `path` by it if the block succeeds.

    The file gets the permissions of a newly created one. A temporary file that a kill leaves behind
    is removed by the next write of the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors creates files that nobody else may read
        move_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def checked_file(path: Path, writes: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield a written file to a block that checks it before it appears at `path`.

    Errors of the block are raised unchanged.

    Args:
        path: Path at which the file appears if the block succeeds.
        writes: Writes the file on entering, and moves it to `path` on leaving.

    Raises:
        CheckpointError: If the file can't be written or moved.
    """
    with ExitStack() as stack:
        with writing(path):
            file = stack.enter_context(writes)
        yield file
        with writing(path):
            stack.close()


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and replace `path` by it if the block succeeds.

    All files in it get the permissions of newly created ones.
    """
    path = path.resolve()  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        mode = _mode_of_new_files(temporary)
        yield temporary
        for file in temporary.iterdir():
            if file.is_file():
                file.chmod(mode)  # safetensors creates files that nobody else may read
            _sync(file)
        _sync(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)  # atomic: the folder is never visible in part
        temporary.replace(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that a new file in a folder gets, of which the umask is a part."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def move_file(source: Path, path: Path) -> None:
    """Replace a file by another one of the same disk, atomically."""
    _sync(source)
    source.replace(path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until the contents of a file or folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
