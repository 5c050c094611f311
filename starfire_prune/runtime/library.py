"""The native library that runs programs, whose functions are those of starfire.h."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from starfire_prune.utils.errors import BuildError

__all__ = ["HEADER", "INPUT", "MAX_DIMS", "OUTPUT", "PREBUILT", "library", "library_path"]


PREBUILT = Path(__file__).with_name("libstarfire.so")  # in wheels
HEADER = Path(__file__).parent.with_name("sparse") / "native" / "library" / "starfire.h"
INPUT, OUTPUT = 0, 1  # enum starfire_side
MAX_DIMS = 8
_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_SIGNATURES = {
    "starfire_load_file": (_POINTER, (_TEXT,)),
    "starfire_load": (_POINTER, (_TEXT, ctypes.c_size_t)),
    "starfire_count": (_INT, (_POINTER, _INT)),
    "starfire_name": (_TEXT, (_POINTER, _INT, _INT)),
    "starfire_shape": (_INT, (_POINTER, _INT, _INT, ctypes.POINTER(ctypes.c_int64))),
    "starfire_run": (_INT, (_POINTER, ctypes.c_int64, _POINTER, _POINTER)),
    "starfire_set_threads": (_INT, (_POINTER, _INT)),
    "starfire_set_instructions": (_INT, (_POINTER, _INT)),
    "starfire_error": (_TEXT, ()),
    "starfire_free": (None, (_POINTER,)),
}


def library_path() -> Path:
    """The path of the native library: that of the wheel, or one that is built at first use.

    Raises:
        BuildError: If the wheel has none and it can't be built.
    """
    if PREBUILT.exists():
        return PREBUILT
    # Imported only here, for a start in a tenth of a second
    from starfire_prune.runtime.building import runtime_library
    from starfire_prune.utils.cpp import cached_library

    try:
        return cached_library(runtime_library())
    except BuildError as error:
        raise BuildError(
            f"this installation has no {PREBUILT.name}, and it can't be built: {error}; or install "
            f"a wheel for this platform, which has it"
        ) from error


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BuildError: If it can't be built or loaded.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} can't be loaded: {error}; delete it to build it again") from error
    return loaded
