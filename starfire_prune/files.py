"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from starfire_prune.file_errors import writing

__all__ = ["checked_file", "move_file", "replaced_file", "replaced_folder", "write_text"]


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
