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
import stat
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
COMPILERS = ("c++", "g++", "clang++")
FLAGS_VARIABLE = "STARFIRE_SPARSE_FLAGS"  # more of them, such as -fsanitize=address
CACHE_VARIABLE = "STARFIRE_SPARSE_CACHE"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


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
        self.takes = _function(library.starfire_takes, size, address, size, address, size, address)
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
        BuildError: if there is no C++ compiler, or it can't build them, or they can't be loaded, or
            others could have written them.
    """
    command = _command()
    path = _cache() / f"{_key(command)}.so"
    _build(command, path)
    try:
        return Native(path)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} can't be loaded: {error}; delete it to build it anew") from error


def _words(variable: str) -> list[str]:
    """The words of a variable, as a shell splits them; none if it isn't set.

    Raises:
        BuildError: if a quotation in it doesn't end.
    """
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(
            f"{variable} (={value!r}) can't be split into words: {error}; correct or unset it"
        ) from error


def _compiler() -> list[str]:
    """The compiler's name and the options that `CXX` gives it."""
    value = os.environ.get("CXX")
    if not value:
        found = next(filter(shutil.which, COMPILERS), None)
        if found is None:
            raise BuildError(
                f"there is no C++ compiler: none of {', '.join(COMPILERS)} is in the PATH; "
                "install one, or set CXX to one"
            )
        return [found]
    words = _words("CXX")
    if not words or shutil.which(words[0]) is None:
        raise BuildError(
            f"there is no C++ compiler: CXX (={value!r}) names no program that can be run; "
            "set it to a compiler, or unset it"
        )
    return words


def _command() -> list[str]:
    """The compiler's command, but for the file that it writes."""
    folder, includes = (Path(torch.__file__).with_name(name) for name in ("lib", "include"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*FLAGS, abi, *_words(FLAGS_VARIABLE)]
    # torch's own OpenMP, if it brings one: with another there would be two sets of threads
    openmp = [str(path) for path in sorted(folder.glob("libgomp*.so*"))]
    libraries = [f"-L{folder}", "-lc10", "-ltorch_cpu", *openmp, f"-Wl,-rpath,{folder}"]
    return [*_compiler(), *flags, f"-I{includes}", str(SOURCES / MAIN), *libraries]


def _key(command: Sequence[str]) -> str:
    """Of all that the built library depends on."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    version = _run([*_compiler(), "--version"]).stdout.encode()  # with ccache, of both
    machine = [platform.machine(), sysconfig.get_platform(), torch.__version__]
    facts = [*sources, version, *(os.fsencode(text) for text in (*command, *machine))]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:32]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler, whatever it answers.

    Raises:
        BuildError: if the system can't run it.
    """
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise BuildError(
            f"{command[0]} can't be run: {error}{_settings()}; set CXX to a C++ compiler that can"
        ) from error


def _settings() -> str:
    """What the user's variables say of the command, for messages."""
    variables = [name for name in ("CXX", FLAGS_VARIABLE) if os.environ.get(name)]
    text = ", ".join(f"{name} (={os.environ[name]!r})" for name in variables)
    return f", with {text}" if text else ""


def _cache() -> Path:
    """The folder of built libraries, absolute.

    Raises:
        BuildError: if the user has no home and no variable names a folder.
    """
    base = os.environ.get(CACHE_VARIABLE, "")
    try:
        if base:
            return Path(base).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored
        home = shared if shared.is_absolute() else Path.home() / ".cache"
        return (home / "starfire_prune").absolute()
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"{CACHE_VARIABLE} (={base!r}) leads to no folder: {error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def _distrusted(status: os.stat_result, user: int) -> str | None:
    """Why others than the user and root could have written what has this status, if so."""
    if status.st_uid not in (user, 0):
        return f"belongs to another user ({status.st_uid}, and you are {user})"
    if status.st_mode & OTHERS_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _check_trusted(path: Path) -> None:
    """Refuse what others could have written: a library that is loaded runs as the user.

    Raises:
        BuildError: if `path` isn't the user's or root's, or group or others can write it.
    """
    if not hasattr(os, "getuid"):  # no POSIX
        return
    status, user = path.stat(), os.getuid()
    if reason := _distrusted(status, user):
        ours = status.st_uid in (user, 0)
        way_out = f"`chmod go-w {shlex.quote(str(path))}` if you trust what is in it, or " * ours
        raise BuildError(
            f"{path} {reason}, who could run code in this process; "
            f"{way_out}set {CACHE_VARIABLE} to a folder that you alone can write"
        )


def _build(command: Sequence[str], path: Path) -> None:
    """Build the library and put it at `path`, whole, unless it is there.

    Raises:
        BuildError: if it can't be built, or others could have written it.
    """
    try:
        for folder in (*reversed(path.parent.parents), path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        _check_trusted(path.parent)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
                built = Path(temporary) / path.name
                _compile(command, built)
                built.chmod(built.stat().st_mode & ~OTHERS_WRITE)  # whatever the umask
                built.replace(path)  # whoever else builds it too
        _check_trusted(path)
    except OSError as error:
        raise BuildError(
            f"the native kernels can't be built in {path.parent}: {error}; "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def _compile(command: Sequence[str], built: Path) -> None:
    done = _run([*command, "-o", str(built)])
    if done.returncode != 0 or not built.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines or ["no message"]
        flags = f", or unset {FLAGS_VARIABLE}" if os.environ.get(FLAGS_VARIABLE) else ""
        raise BuildError(
            f"{command[0]} can't build the native kernels: {errors[0]}{_settings()}; "
            f"set CXX to another C++ compiler{flags}"
        )
