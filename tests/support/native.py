"""Runs programs of single operations, on each instruction set."""

import torch
from torch import Tensor

from starfire_prune.sparse.ir import Op, Value
from starfire_prune.sparse.ops import new_workspace, sparse_inference
from starfire_prune.sparse.scheduling import schedule

TOLERANCE = 1e-5  # of the largest output; the kernels add in another order
ISAS = (128, 256, 512)


def run(ops: list[Op], inputs: dict[Value, Tensor], output: Value, isa: int) -> Tensor:
    """The output of a program of the ops for the inputs."""
    scheduled = schedule(ops, list(inputs), [output])
    program = torch.from_numpy(scheduled.to_array())
    constants = torch.from_numpy(scheduled.constants.to_array())
    shape = [4, output.channels, output.height, output.width]
    batch = len(next(iter(inputs.values())))
    workspace = new_workspace(program, batch)
    tensors = list(inputs.values())
    first = sparse_inference(tensors, program, constants, shape, workspace, isa)[0]
    again = sparse_inference(tensors, program, constants, shape, workspace, isa)[0]
    bits = (first.view(torch.int32), again.view(torch.int32))
    assert torch.equal(*bits)  # the padding has kept its value
    return first


def close(output: Tensor, expected: Tensor, scale: float | None = None) -> bool:
    scale = scale or float(expected.abs().max()) or 1.0
    return output.shape == expected.shape and float((output - expected).abs().max()) <= (
        TOLERANCE * scale
    )
