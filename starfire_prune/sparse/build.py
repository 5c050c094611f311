"""Builds the kernels for torch at first use."""

from __future__ import annotations

from pathlib import Path

import torch

from starfire_prune.utils.cpp import (
    COMPILE_FLAGS,
    FLAGS_VARIABLE,
    Library,
    cached_library,
    compiler_command,
    words_of,
)

__all__ = ["built_library", "torch_library"]


SOURCES = Path(__file__).with_name("native")


def built_library() -> Path:
    """The path of the native library, which is built if it is not in the cache.

    Raises:
        BuildError: If there is no C++ compiler, if it can't build the kernels, or if the cache
            can't be written or is not safe.
    """
    return cached_library(torch_library())


def torch_library() -> Library:
    """How the library with the torch operations is built."""
    folder, includes = (Path(torch.__file__).with_name(name) for name in ("lib", "include"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    paths = (f"-I{includes}", f"-I{SOURCES}", f"-L{folder}", f"-Wl,-rpath,{folder}")
    flags = (*COMPILE_FLAGS, "-fopenmp", abi, *words_of(FLAGS_VARIABLE))
    # torch's own OpenMP, if it brings one: with another there would be two sets of threads
    openmp = sorted(folder.glob("libgomp*.so*"))
    return Library(
        command=[*compiler_command(), *flags, *paths],
        folders=(SOURCES, SOURCES / "torch"),
        linking=("-lc10", "-ltorch_cpu", *map(str, openmp)),
        facts=(torch.__version__,),
    )
