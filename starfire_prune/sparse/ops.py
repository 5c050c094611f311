"""The torch operations of the native kernels, such as `starfire_prune::sparse_inference`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from starfire_prune.sparse.build import built_library
from starfire_prune.sparse.program_format import check_format
from starfire_prune.utils.errors import BuildError

__all__ = ["load_kernels", "new_workspace", "sparse_inference"]


_LOCK = threading.Lock()


@functools.cache
def load_kernels() -> None:
    """Load the native kernels and register their operations with torch; build them at first use.

    `compile` does this. Call it before loading an exported program that has such an operation.

    Raises:
        BuildError: If the kernels can't be built or loaded.
    """
    with _LOCK:
        if not _are_registered():
            path = built_library()
            try:
                torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            except OSError as error:
                raise BuildError(
                    f"{path} can't be loaded: {error}; delete it to build it again"
                ) from error
            torch.library.register_fake("starfire_prune::sparse_inference", _fake)
        check_format(torch.ops.starfire_prune.program_format())


def _are_registered() -> bool:
    """Whether the process has loaded the operations; it can do so only once."""
    return hasattr(torch.ops.starfire_prune, "sparse_inference")


def _fake(
    inputs: list[Tensor],
    program: Tensor,
    constants: Tensor,
    output_shapes: list[int],
    workspace: Tensor | None = None,
    isa: int = 0,
) -> list[Tensor]:
    """Outputs without values, for tracing."""
    outputs, rest = [], list(output_shapes)
    while rest:
        dims = rest[0]
        outputs.append(inputs[0].new_empty((inputs[0].shape[0], *rest[1:dims])))
        rest = rest[dims:]
    return outputs


def new_workspace(program: Tensor, batch: int) -> Tensor:
    """The memory for one call of a program with a batch of that size.

    Raises:
        ValueError: If `program` is not a program.
    """
    workspace: Tensor = torch.ops.starfire_prune.new_workspace.default(program, batch)
    return workspace


def sparse_inference(
    inputs: Sequence[Tensor],
    program: Tensor,
    constants: Tensor,
    output_shapes: Sequence[int],
    workspace: Tensor | None = None,
    isa: int = 0,
) -> list[Tensor]:
    """Run a program.

    Args:
        inputs: Float32 tensors with one batch size.
        program: The program, `(n,)` in int64.
        constants: The program's weights and indices, `(bytes,)` in uint8.
        output_shapes: For each output, the number of dimensions and all sizes but the first.
        workspace: Memory from `new_workspace`; a new one by default.
        isa: Width of the instruction set: 512, 256 or 128; 0 for the widest one.

    Raises:
        ValueError: If the tensors do not fit the program.
    """
    operation = torch.ops.starfire_prune.sparse_inference.default
    outputs: list[Tensor] = operation(inputs, program, constants, output_shapes, workspace, isa)
    return outputs
