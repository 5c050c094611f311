"""Programs: models that `save_program` wrote, run with NumPy alone."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.runtime.library import INPUT, MAX_DIMS, OUTPUT, library

__all__ = ["Program", "ProgramError", "TensorSpec", "load"]


Floats = NDArray[np.float32]
INSTRUCTIONS = (0, 128, 256, 257, 512)


class ProgramError(ValueError):
    """A file is no program that this library can run, or is damaged."""


class TensorSpec(NamedTuple):
    """An input or output of a program: float32 arrays of shape `(N, *shape)`.

    Attributes:
        name: Its name.
        shape: Its shape without the batch size.
    """

    name: str
    shape: tuple[int, ...]


def load(
    source: str | os.PathLike[str] | bytes, *, threads: int | None = None, instructions: int = 0
) -> Program:
    """Load a program, whose content is checked completely.

    Args:
        source: A file that `save_program` or `starfire export --format program` wrote; or its
            bytes.
        threads: Number of threads of each call, 1 to 1024; all cores by default.
        instructions: Width in bits of the widest instruction set to use: 512, 256 or 128; 0 for
            the widest of this machine.

    Raises:
        FileNotFoundError: If there is no such file.
        ProgramError: If it is no program, is damaged, or is of a newer version.
        ValueError: If `threads` or `instructions` is out of range.
        BuildError: If this installation lacks the native library and it can't be built.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise ValueError(f"threads (={threads!r}) must be an int from 1 to 1024, or None")
    if instructions not in INSTRUCTIONS:
        raise ValueError(f"instructions (={instructions!r}) must be 512, 256, 128 or 0")
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise TypeError(f"source must be a path or bytes, not {type(source).__name__}")
    return Program(_opened(source), threads, instructions)


def _opened(source: str | os.PathLike[str] | bytes) -> int:
    """The handle of a loaded program."""
    if isinstance(source, bytes):
        handle, what = library().starfire_load(source, len(source)), "source"
    else:
        path = Path(source)
        if path.is_dir():
            raise ProgramError(f"{path} is a folder: name the file of a program")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: export one with --format program")
        handle, what = library().starfire_load_file(os.fsencode(path)), str(path)
    if not handle:
        raise ProgramError(f"{what} can't be loaded: {_error()}")
    return int(handle)


def _error() -> str:
    text: bytes = library().starfire_error()
    return text.decode("utf-8", "replace")


class Program:
    """A loaded program. Several threads may call it at once. Made by `load`.

    Attributes:
        inputs: The inputs, in the order of the arguments.
        outputs: The outputs, in the order of the results.
    """

    def __init__(self, handle: int, threads: int | None, instructions: int) -> None:
        native = library()
        self._handle = handle
        self._close = weakref.finalize(self, native.starfire_free, handle)
        self.inputs, self.outputs = _specs(handle, INPUT), _specs(handle, OUTPUT)
        if threads is not None:
            native.starfire_set_threads(handle, threads)
        native.starfire_set_instructions(handle, instructions)

    def __call__(self, *arrays: Any, **named: Any) -> Floats | list[Floats]:
        """The outputs for a batch: one array, or a list of several.

        Args:
            arrays: Float32 arrays of shape `(N, *shape)`, in the order of `inputs`.
            named: Inputs by name instead.

        Raises:
            TypeError: If an input is missing or unknown, or is no float32 array.
            ValueError: If an input has another shape, or the batch needs too much memory.
        """
        sources = self._sources(arrays, named)
        batch = len(sources[0])
        results = [np.empty((batch, *spec.shape), np.float32) for spec in self.outputs]
        if library().starfire_run(self._handle, batch, _pointers(sources), _pointers(results)):
            raise ValueError(f"the program can't be run: {_error()}")
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        sides = (self.inputs, self.outputs)
        texts = (", ".join(f"{spec.name} {('N', *spec.shape)}" for spec in side) for side in sides)
        return "Program({} -> {})".format(*texts).replace("'", "")

    def __reduce__(self) -> Any:
        raise TypeError("a Program can't be pickled or copied: load its file again")

    def _sources(self, arrays: Sequence[Any], named: dict[str, Any]) -> list[Floats]:
        names = [spec.name for spec in self.inputs]
        given = dict(zip(names, arrays, strict=False))
        for name in named:
            if name not in names or name in given:
                again = "given twice" if name in given else "not an input"
                raise TypeError(f"`{name}` is {again}; the inputs are {', '.join(names)}")
        given.update(named)
        if len(arrays) > len(names) or len(given) < len(names):
            raise TypeError(
                f"there must be {len(names)} inputs ({', '.join(names)}), "
                f"not {max(len(arrays), len(given))}"
            )
        sources = [_checked(spec, given[spec.name]) for spec in self.inputs]
        if any(len(source) != len(sources[0]) for source in sources):
            sizes = [len(source) for source in sources]
            raise ValueError(f"inputs must have one batch size, but have {sizes}")
        return sources


def _specs(handle: int, side: int) -> list[TensorSpec]:
    native, specs = library(), []
    for index in range(native.starfire_count(handle, side)):
        sizes = (ctypes.c_int64 * MAX_DIMS)()
        dims = native.starfire_shape(handle, side, index, sizes)
        name: bytes = native.starfire_name(handle, side, index)
        specs.append(TensorSpec(name.decode("utf-8", "replace"), tuple(sizes[:dims])))
    return specs


def _checked(spec: TensorSpec, value: Any) -> Floats:
    """An input as a contiguous array."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{spec.name} must be a NumPy array, not {type(value).__name__}")
    if value.dtype != np.float32:
        raise TypeError(
            f"{spec.name} must be of float32, not {value.dtype}: convert it by .astype('float32')"
        )
    if value.ndim != len(spec.shape) + 1 or value.shape[1:] != spec.shape or not len(value):
        expected = str(("N", *spec.shape)).replace("'", "")
        raise ValueError(
            f"{spec.name} has the shape {value.shape}, but must have {expected} with N of at least "
            f"1: export the model again for other shapes"
        )
    return np.ascontiguousarray(value)


def _pointers(arrays: Sequence[Floats]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
