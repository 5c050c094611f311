"""Compiles the native kernels at first use and keeps the library in a cache.

A library is cached by the hash of everything it depends on: the sources, the compiler, its options,
torch's version and the machine.
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

import torch

__all__ = ["BuildError", "built_library"]


SOURCES = Path(__file__).with_name("native")
FOLDERS = (SOURCES, SOURCES / "torch")
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")
FLAGS_VARIABLE = "STARFIRE_SPARSE_FLAGS"  # more options, such as -fsanitize=address
CACHE_VARIABLE = "STARFIRE_SPARSE_CACHE"


class BuildError(RuntimeError):
    """The native kernels can't be built or loaded on this machine."""


def built_library() -> Path:
    """The path of the native library, which is built if it is not in the cache.

    Raises:
        BuildError: If there is no C++ compiler, if it can't build the kernels, or if the cache
            can't be written or is not safe.
    """
    command = [*_compiler(), *_options()]
    name = f"{_key(command)}.so"
    try:
        folder = _cache()
        for parent in (*reversed(folder.parents), folder):
            parent.mkdir(mode=0o700, exist_ok=True)
        _check_cache(folder)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                # atomic: others may build it too
                _build(command, Path(temporary)).replace(folder / name)
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:  # of a user without a home
        raise BuildError(
            f"the native kernels can't be cached, {CACHE_VARIABLE} "
            f"(={os.environ.get(CACHE_VARIABLE, '')!r}): {error}; set {CACHE_VARIABLE} to a folder "
            f"that can be written"
        ) from error
    return folder / name


def _words(variable: str) -> list[str]:
    """The words of an environment variable, split like a shell does."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable} (={value!r}) can't be split into words: {error}") from error


def _compiler() -> list[str]:
    """The compiler and the options that `CXX` gives it."""
    value = os.environ.get("CXX")
    words = _words("CXX") if value else [next(filter(shutil.which, COMPILERS), "")]
    if not words or shutil.which(words[0]) is None:
        names = ", ".join(COMPILERS)
        reason = f"CXX (={value!r}) is not a program" if value else f"{names} are not in the PATH"
        raise BuildError(f"there is no C++ compiler: {reason}; install one, or set CXX to one")
    return words


def _options() -> list[str]:
    """Options for the compiler and the linker."""
    folder, includes = (Path(torch.__file__).with_name(name) for name in ("lib", "include"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    linking = (f"-L{folder}", f"-Wl,-rpath,{folder}")
    return [*FLAGS, abi, *_words(FLAGS_VARIABLE), f"-I{includes}", f"-I{SOURCES}", *linking]


def _key(command: Sequence[str]) -> str:
    """Cache key: a hash of everything that the library depends on."""
    files = [path for folder in FOLDERS for path in sorted(folder.iterdir()) if path.is_file()]
    sources = [path.read_bytes() for path in files]
    version = _run([*_compiler(), "--version"]).stdout  # with ccache, of both
    machine = (platform.machine(), sysconfig.get_platform(), torch.__version__)
    facts = [*sources, *(os.fsencode(text) for text in (*command, version, *machine))]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:32]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler, whatever its exit status."""
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        return subprocess.run(
            command, check=False, text=True, errors="replace", stdin=null, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        text = f"{command[0]} can't be run: {error}; set CXX to another C++ compiler"
        raise BuildError(text) from error


def _cache() -> Path:
    """The absolute path of the folder for built libraries."""
    if value := os.environ.get(CACHE_VARIABLE):
        return Path(value).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, by its standard
    home = shared if shared.is_absolute() else Path.home() / ".cache"
    return (home / "starfire_prune").absolute()


def _check_cache(folder: Path) -> None:
    """Refuse a folder that other users can write: a library in it runs as the user."""
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022):
        raise BuildError(
            f"{folder} can be written by other users (owner {status.st_uid}, "
            f"mode {status.st_mode & 0o7777:04o}), who could run code in this process; "
            f"set {CACHE_VARIABLE} to a folder that only you can write"
        )


def _build(command: Sequence[str], folder: Path) -> Path:
    """Compile the sources in parallel and link them; returns the library."""
    sources = [source for each in FOLDERS for source in each.glob("*.cpp")]
    library = folder / "library.so"
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as threads:
        arguments = [["-c", str(source)] for source in sources]
        list(threads.map(_compile, [command] * len(sources), arguments, objects))
    # torch's own OpenMP, if it brings one: with another there would be two sets of threads
    openmp = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    _compile(command, [*map(str, objects), "-lc10", "-ltorch_cpu", *map(str, openmp)], library)
    library.chmod(0o755)  # whatever the umask
    return library


def _compile(command: Sequence[str], arguments: Sequence[str], output: Path) -> None:
    done = _run([*command, *arguments, "-o", str(output)])
    if done.returncode != 0 or not output.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        error = next((line for line in lines if "error" in line), (lines or ["no message"])[0])
        flags = os.environ.get(FLAGS_VARIABLE)
        hint = f", or unset {FLAGS_VARIABLE} (={flags!r})" if flags else ""
        raise BuildError(
            f"{command[0]} can't build the native kernels: {error}; "
            f"set CXX to another C++ compiler{hint}"
        )
