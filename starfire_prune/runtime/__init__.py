"""Runs exported programs with NumPy alone: without torch, and in wheels without a compiler.

`save_program` and `starfire export --format program` write the files. The library behind it may
also be used from C, by the header `starfire.h`.
"""

from starfire_prune.runtime.library import HEADER, library_path
from starfire_prune.runtime.program import Program, ProgramError, TensorSpec, load
from starfire_prune.utils.errors import BuildError

__all__ = [
    "HEADER",
    "BuildError",
    "Program",
    "ProgramError",
    "TensorSpec",
    "library_path",
    "load",
]
