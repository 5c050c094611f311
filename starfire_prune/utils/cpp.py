"""Compiles C++ libraries at their first use and keeps them in a cache. It needs no torch.

A library is cached by the hash of everything it depends on: the sources, the compiler, its options
and the machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from starfire_prune.utils.errors import BuildError

__all__ = [
    "CACHE_VARIABLE",
    "COMPILE_FLAGS",
    "FLAGS_VARIABLE",
    "Library",
    "build_library",
    "cache_folder",
    "cached_library",
    "check_cache",
    "compiler_command",
    "library_key",
    "run_compiler",
    "words_of",
]


COMPILE_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")
FLAGS_VARIABLE = "STARFIRE_SPARSE_FLAGS"  # more options, such as -fsanitize=address
CACHE_VARIABLE = "STARFIRE_SPARSE_CACHE"


class Library(NamedTuple):
    """How a library is built.

    Attributes:
        command: The compiler with its options.
        folders: Folders of the sources, without those within them.
        linking: What is linked beside the sources.
        facts: What else the library depends on.
    """

    command: Sequence[str]
    folders: Sequence[Path]
    linking: Sequence[str] = ()
    facts: Sequence[str] = ()


def cached_library(library: Library) -> Path:
    """The path of a library, which is built if it is not in the cache.

    Raises:
        BuildError: If the compiler can't build it, or if the cache can't be written or is not safe.
    """
    name = f"{library_key(library)}.so"
    try:
        folder = cache_folder()
        for parent in (*reversed(folder.parents), folder):
            parent.mkdir(mode=0o700, exist_ok=True)
        check_cache(folder)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                # atomic: others may build it too
                build_library(library, Path(temporary)).replace(folder / name)
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:  # of a user without a home
        raise BuildError(
            f"the native kernels can't be cached, {CACHE_VARIABLE} "
            f"(={os.environ.get(CACHE_VARIABLE, '')!r}): {error}; set {CACHE_VARIABLE} to a folder "
            f"that can be written"
        ) from error
    return folder / name


def words_of(variable: str) -> list[str]:
    """The words of an environment variable, split like a shell does."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable} (={value!r}) can't be split into words: {error}") from error


def compiler_command() -> list[str]:
    """The compiler and the options that `CXX` gives it."""
    value = os.environ.get("CXX")
    words = words_of("CXX") if value else [next(filter(shutil.which, COMPILERS), "")]
    if not words or shutil.which(words[0]) is None:
        names = ", ".join(COMPILERS)
        reason = f"CXX (={value!r}) is not a program" if value else f"{names} are not in the PATH"
        raise BuildError(f"there is no C++ compiler: {reason}; install one, or set CXX to one")
    return words


def library_key(library: Library) -> str:
    """Cache key: a hash of everything that the library depends on."""
    folders = library.folders
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    version = run_compiler([*compiler_command(), "--version"]).stdout  # with ccache, of both
    machine = (platform.machine(), sysconfig.get_platform(), *library.facts)
    texts = (*library.command, version, *machine)
    facts = [*(path.read_bytes() for path in files), *(os.fsencode(text) for text in texts)]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:32]


def run_compiler(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler, whatever its exit status."""
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        return subprocess.run(
            command, check=False, text=True, errors="replace", stdin=null, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        text = f"{command[0]} can't be run: {error}; set CXX to another C++ compiler"
        raise BuildError(text) from error


def cache_folder() -> Path:
    """The absolute path of the folder for built libraries."""
    if value := os.environ.get(CACHE_VARIABLE):
        return Path(value).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, by its standard
    home = shared if shared.is_absolute() else Path.home() / ".cache"
    return (home / "starfire_prune").absolute()


def check_cache(folder: Path) -> None:
    """Refuse a folder that other users can write: a library in it runs as the user."""
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022):
        raise BuildError(
            f"{folder} can be written by other users (owner {status.st_uid}, "
            f"mode {status.st_mode & 0o7777:04o}), who could run code in this process; "
            f"set {CACHE_VARIABLE} to a folder that only you can write"
        )


def build_library(library: Library, folder: Path) -> Path:
    """Compile a library's sources in parallel and link them, in a folder; returns its path."""
    sources = [source for each in library.folders for source in sorted(each.glob("*.cpp"))]
    path = folder / "library.so"
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as threads:
        arguments = [["-c", str(source)] for source in sources]
        list(threads.map(_compile, [library.command] * len(sources), arguments, objects))
    _compile(library.command, [*map(str, objects), *library.linking], path)
    path.chmod(0o755)  # whatever the umask
    return path


def _compile(command: Sequence[str], arguments: Sequence[str], output: Path) -> None:
    done = run_compiler([*command, *arguments, "-o", str(output)])
    if done.returncode != 0 or not output.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        error = next((line for line in lines if "error" in line), (lines or ["no message"])[0])
        flags = os.environ.get(FLAGS_VARIABLE)
        hint = f", or unset {FLAGS_VARIABLE} (={flags!r})" if flags else ""
        raise BuildError(
            f"{command[0]} can't build the native kernels: {error}; "
            f"set CXX to another C++ compiler{hint}"
        )
