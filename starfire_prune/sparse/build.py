"""The native kernels: compiled at first use, kept in a cache, loaded through ctypes.

Only a C++ compiler is needed, and torch's own headers and libraries. What is built is kept by the
sources' hash, the compiler, torch's version and the machine, so that it is built once on each.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["BuildError", "Native", "native"]

SOURCES = Path(__file__).with_name("native")
MAIN = "sparse.cpp"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast")
FLAGS_VARIABLE = "STARFIRE_SPARSE_FLAGS"  # more of them, such as -fsanitize=address
CACHE_VARIABLE = "STARFIRE_SPARSE_CACHE"


class BuildError(RuntimeError):
    """The native kernels can't be built or loaded on this machine."""


class Native:
    """The library's functions; addresses are those of tensors' data."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        size, address = ctypes.c_int64, ctypes.c_void_p
        self.isa = _function(library.starfire_isa, size)
        self.arena = _function(library.starfire_arena, size, address, size, size)
        self.fill = _function(library.starfire_fill, None, address, size, address)
        self.run = _function(
            library.starfire_run, None, *(address, address, size, size, *[address] * 4)
        )
        self.best: int = self.isa()


def _function(function: ctypes._NamedFuncPointer, result: type | None, *arguments: type):  # type: ignore[no-untyped-def]
    function.restype, function.argtypes = result, list(arguments)
    return function


@functools.cache
def native() -> Native:
    """The native kernels, built if they aren't in the cache yet.

    Raises:
        BuildError: if there is no C++ compiler, or it can't build them, or they can't be loaded.
    """
    command = _command()
    path = _cache() / f"{_key(command)}.so"
    _build(command, path)
    try:
        return Native(path)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} can't be loaded: {error}; delete it to build it anew") from error


def _command() -> list[str]:
    """The compiler's command, but for the file that it writes."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None or shutil.which(shlex.split(name)[0]) is None:
        wanted = "c++, g++ or clang++" if name is None else f"CXX={name}"
        raise BuildError(f"there is no C++ compiler: {wanted} isn't in the PATH; install one")
    folder, includes = (Path(torch.__file__).with_name(name) for name in ("lib", "include"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*FLAGS, abi, *shlex.split(os.environ.get(FLAGS_VARIABLE, ""))]
    # torch's own OpenMP, if it brings one: with another there would be two sets of threads
    openmp = [str(path) for path in sorted(folder.glob("libgomp*.so*"))]
    libraries = [f"-L{folder}", "-lc10", "-ltorch_cpu", *openmp, f"-Wl,-rpath,{folder}"]
    return [*shlex.split(name), *flags, f"-I{includes}", str(SOURCES / MAIN), *libraries]


def _key(command: Sequence[str]) -> str:
    """Of all that the built library depends on."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    compiler = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    machine = [platform.machine(), sysconfig.get_platform(), torch.__version__]
    facts = [*sources, compiler, *(text.encode() for text in (*command, *machine))]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:32]


def _cache() -> Path:
    """The folder of built libraries.

    Raises:
        BuildError: if the user has no home and no variable names a folder.
    """
    base = os.environ.get(CACHE_VARIABLE)
    if base:
        return Path(base)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(
            f"{error}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return Path(home) / "starfire_prune"


def _build(command: Sequence[str], path: Path) -> None:
    """Build the library and put it at `path`, whole, unless it is there."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                _compile(command, built)
                built.replace(path)  # whoever else builds it too
    except OSError as error:
        raise BuildError(
            f"the native kernels can't be built in {path.parent}: {error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def _compile(command: Sequence[str], built: Path) -> None:
    done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines or ["no message"]
        raise BuildError(f"{command[0]} can't build the native kernels: {errors[0]}")
