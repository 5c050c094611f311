"""How the library that runs programs without torch is built, for a wheel or at first use."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from starfire_prune.utils.cpp import (
    COMPILE_FLAGS,
    FLAGS_VARIABLE,
    Library,
    build_library,
    compiler_command,
    words_of,
)

__all__ = ["build_for_wheel", "runtime_library"]


SOURCES = Path(__file__).parent.with_name("sparse") / "native"
FLAGS = ("-pthread", "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc")


def runtime_library() -> Library:
    """How the library is built.

    Raises:
        BuildError: If there is no C++ compiler.
    """
    command = [*compiler_command(), *COMPILE_FLAGS, *FLAGS, *words_of(FLAGS_VARIABLE)]
    return Library(command, folders=(SOURCES, SOURCES / "library"))


def build_for_wheel(path: Path) -> None:
    """Build the library as a file of a wheel.

    Raises:
        BuildError: If there is no C++ compiler, or if it can't build the library.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy2(build_library(runtime_library(), Path(folder)), path)
