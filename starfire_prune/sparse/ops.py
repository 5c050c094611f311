"""The operation `starfire_prune::sparse_inference`, which graphs of torch can hold."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from starfire_prune.sparse.build import native

__all__ = ["new_arena", "sparse_inference"]


_LIBRARY = torch.library.Library("starfire_prune", "DEF")  # type: ignore[no-untyped-call]
# The arena is written to, but what it holds means nothing before or after; as `Tensor(a!)?` torch
# could not functionalize an operation that gives a list
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "sparse_inference(Tensor[] inputs, Tensor program, Tensor constants, int[] sizes, "
    "Tensor? arena=None, int isa=0) -> Tensor[]"
)


def _shapes(batch: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of outputs, of which `sizes` has the number of dimensions and each but the first."""
    shapes, rest = [], list(sizes)
    while rest:
        dims = rest[0]
        shapes.append((batch, *rest[1:dims]))
        rest = rest[dims:]
    return shapes


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def new_arena(program: Tensor, batch: int) -> Tensor:
    """The memory that a program works in, for a batch of that size.

    Raises:
        ValueError: if it is no program.
    """
    arena = torch.empty(_floats(program, batch), dtype=torch.float32)
    native().fill(program.data_ptr(), batch, arena.data_ptr())
    return arena


def _floats(program: Tensor, batch: int) -> int:
    """Of the arena."""
    plain = program.device.type == "cpu" and program.dtype == torch.int64
    floats: int = -1
    if plain and program.is_contiguous():
        floats = native().arena(program.data_ptr(), program.numel(), batch)
    if floats < 0:
        raise ValueError(
            f"program (= {program.numel()} numbers of {program.dtype} on {program.device}) is no "
            f"program of these kernels, which run on the CPU"
        )
    return floats


def _check_tensors(
    program: Tensor, constants: Tensor, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Refuse tensors that are not those of a program, beyond which it would read or write."""
    if constants.device.type != "cpu" or not constants.is_contiguous():
        raise ValueError(f"constants (= {constants.device}) must be contiguous on the CPU")
    sizes = [
        (ctypes.c_int64 * len(tensors))(*[math.prod(tensor.shape[1:]) for tensor in tensors])
        for tensors in (inputs, outputs)
    ]
    counts = len(inputs), len(outputs)
    if not native().takes(program.data_ptr(), counts[0], sizes[0], counts[1], sizes[1]):
        shapes = [tuple(tensor.shape) for tensor in inputs]
        raise ValueError(
            f"inputs (= {shapes}) are not of the shapes that the model is compiled for; compile it "
            f"for other shapes by themselves"
        )


@torch.library.impl(_LIBRARY, "sparse_inference", "CPU")
def _run(
    inputs: list[Tensor],
    program: Tensor,
    constants: Tensor,
    sizes: list[int],
    arena: Tensor | None = None,
    isa: int = 0,
) -> list[Tensor]:
    library = native()
    batch = inputs[0].shape[0]
    if any(tensor.shape[0] != batch or tensor.dtype != torch.float32 for tensor in inputs):
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]
        raise ValueError(f"inputs (= {kinds}) must be float32 and batches of one size")
    inputs = [tensor.contiguous() for tensor in inputs]
    outputs = [torch.empty(shape, dtype=torch.float32) for shape in _shapes(batch, sizes)]
    floats = _floats(program, batch)
    _check_tensors(program, constants, inputs, outputs)
    if arena is None:
        arena = new_arena(program, batch)
    elif arena.numel() < floats:
        raise ValueError(f"arena (= {arena.numel()} floats) is too small for {batch} images")
    library.run(
        program.data_ptr(),
        constants.data_ptr(),
        batch,
        min(isa or library.best, library.best),
        arena.data_ptr(),
        _pointers(inputs),
        _pointers(outputs),
        None,
    )
    return outputs


@torch.library.register_fake("starfire_prune::sparse_inference", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    inputs: list[Tensor],
    program: Tensor,
    constants: Tensor,
    sizes: list[int],
    arena: Tensor | None = None,
    isa: int = 0,
) -> list[Tensor]:
    batch = inputs[0].shape[0]
    return [inputs[0].new_empty(shape) for shape in _shapes(batch, sizes)]


sparse_inference = torch.ops.starfire_prune.sparse_inference.default
