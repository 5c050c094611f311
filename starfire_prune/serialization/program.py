"""Files of programs: compiled models for `starfire_prune.runtime` and its C library."""

from __future__ import annotations

import dataclasses
import io
import operator
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from starfire_prune.runtime.program import ProgramError, load
from starfire_prune.serialization.container import StoredTensor, write_tensor_file
from starfire_prune.sparse.module import CompiledModel, ExpectedTensor, Segment
from starfire_prune.sparse.program_format import HEADER_FIELDS, OUTPUT, SLOT_FIELDS, VIEW_FIELDS
from starfire_prune.utils.files import replaced_file, writing

__all__ = ["StoredProgram", "program_bytes", "save_program", "stored_program"]


FILE_VERSION = 1
PREFIX = "starfire_prune."


@dataclasses.dataclass(frozen=True)
class StoredProgram:
    """What a file of a program holds.

    Attributes:
        program: The program, `(n,)` in int64.
        constants: Its weights and indices, `(bytes,)` in uint8.
        inputs: Names and shapes of inputs, without the batch.
        outputs: The same of outputs.
    """

    program: NDArray[np.int64]
    constants: NDArray[np.uint8]
    inputs: Sequence[tuple[str, tuple[int, ...]]]
    outputs: Sequence[tuple[str, tuple[int, ...]]]


def save_program(compiled: CompiledModel, path: str | os.PathLike[str]) -> None:
    """Write a compiled model as a program, which runs without torch: `starfire_prune.runtime`.

    The file has packed weights that serve every instruction set. It is checked before it appears:
    a program that the runtime would refuse isn't written. Outputs that are in tuples or
    dictionaries become a list.

    Args:
        compiled: The result of `sparse.compile`, all of which is native.
        path: The file to write, atomically.

    Raises:
        TypeError: If `compiled` is not a compiled model.
        ValueError: If a part of the model runs on torch; it names the operations.
        BuildError: If the library that checks it can't be built.
        CheckpointError: If the file can't be written.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from starfire_prune import ck_structured, runtime, save_program, sparse
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU())
        >>> _ = ck_structured(model[0], amount=0.75)
        >>> images = torch.rand(1, 8, 16, 16)
        >>> compiled = sparse.compile(model, images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_program(compiled, f"{folder}/model.program")
        ...     program = runtime.load(f"{folder}/model.program")
        >>> bool((program(images.numpy()) == compiled(images).numpy()).all())
        True
    """
    content = program_bytes(stored_program(compiled))
    try:
        load(content)
    except ProgramError as error:
        raise ValueError(f"compiled can't be saved as a program: {error}") from error
    file = Path(path)
    with writing(file), replaced_file(file) as temporary:
        temporary.write_bytes(content)


def stored_program(compiled: CompiledModel) -> StoredProgram:
    """The content of a compiled model's file.

    Raises:
        TypeError: If `compiled` is not a compiled model.
        ValueError: If it isn't one native call.
    """
    if not isinstance(compiled, CompiledModel):
        raise TypeError(f"compiled must be the result of sparse.compile, not {type(compiled)}")
    segment = _only_segment(compiled)
    order = _order_of_results(compiled.network.graph)
    shapes = _output_shapes(segment)
    names = ["output"] if len(order) == 1 else [f"output{i}" for i in range(len(order))]
    return StoredProgram(
        _with_outputs(segment.program.numpy(), order),
        segment.constants.numpy(),
        inputs=_inputs(compiled),
        outputs=list(zip(names, (shapes[index] for index in order), strict=True)),
    )


def program_bytes(stored: StoredProgram) -> bytes:
    """The bytes of a program's file, see docs/format.md."""
    program, constants = (
        np.frombuffer(array.tobytes(), np.uint8) for array in (stored.program, stored.constants)
    )
    metadata = {
        "format": "program",
        "version": str(FILE_VERSION),
        "inputs": _described(stored.inputs),
        "outputs": _described(stored.outputs),
        "program.crc32": f"{zlib.crc32(program.data):08x}",
        "constants.crc32": f"{zlib.crc32(constants.data):08x}",
    }
    tensors = {
        "program": StoredTensor("I64", (len(program) // 8,), program),
        "constants": StoredTensor("U8", (len(constants),), constants),
    }
    file = io.BytesIO()
    write_tensor_file(file, tensors, {PREFIX + key: value for key, value in metadata.items()})
    return file.getvalue()


def _described(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    """Such as "images 3 32 32"; several are separated by semicolons."""
    return ";".join(" ".join((name, *map(str, shape))) for name, shape in tensors)


def _only_segment(compiled: CompiledModel) -> Segment:
    """The segment that is the whole model."""
    if compiled.torch_operations:
        names = ", ".join(sorted(set(compiled.torch_operations)))
        raise ValueError(
            f"compiled can't be saved as a program, which has no torch: these operations are left "
            f"to torch: {names}; remove them from the model, or save the part without them"
        )
    segments = compiled.segments
    if len(segments) != 1:
        why = compiled.reason or f"it consists of {len(segments)} native parts"
        raise ValueError(f"compiled can't be saved as a program: {why}")
    return segments[0]


def _order_of_results(graph: fx.Graph) -> list[int]:
    """The segment's outputs in the order in which the model returns them."""
    (call,) = graph.find_nodes(op="call_module")
    results: list[Any] = []
    fx.map_arg(graph.output_node().args[0], results.append)
    items = [node.args[1] if node.target is operator.getitem else 0 for node in results]
    sources = [node.args[0] if node.target is operator.getitem else node for node in results]
    if sorted(items) != list(range(len(items))) or any(source is not call for source in sources):
        raise ValueError(
            "compiled can't be saved as a program: the model returns an input, or a result twice; "
            "let it return each result once"
        )
    return items


def _with_outputs(program: NDArray[np.int64], order: Sequence[int]) -> NDArray[np.int64]:
    """A program whose outputs are in another order."""
    result = program.copy()
    _, slots, views, *_ = program[:HEADER_FIELDS]
    start = HEADER_FIELDS + SLOT_FIELDS * slots
    fields = result[start : start + VIEW_FIELDS * views].reshape(-1, VIEW_FIELDS)
    place, index = fields[:, 1], fields[:, 2]  # of the C++ structure View
    is_output = place == OUTPUT
    index[is_output] = np.argsort(order)[index[is_output]]
    return result


def _inputs(compiled: CompiledModel) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the segment's inputs."""
    graph = compiled.network.graph
    (call,) = graph.find_nodes(op="call_module")
    placeholders = graph.find_nodes(op="placeholder")
    shapes = [
        tuple(expected.shape) if isinstance(expected, ExpectedTensor) else None
        for expected in compiled.expected
    ]
    if len(placeholders) != len(shapes):
        raise ValueError("compiled can't be saved as a program: its inputs are not plain tensors")
    found = []
    for argument in call.args:
        index = placeholders.index(argument)
        names = compiled.names
        name = names[index] if len(names) == len(shapes) else f"input{index}"
        shape = shapes[index]
        if shape is None:
            raise ValueError(f"compiled can't be saved as a program: {name} is no tensor")
        found.append((name, shape[1:]))
    return found


def _output_shapes(segment: Segment) -> list[tuple[int, ...]]:
    """The shapes of a segment's outputs, without the batch."""
    rest, shapes = list(segment.output_shapes), []
    while rest:
        dims = rest[0]
        shapes.append(tuple(rest[1:dims]))
        rest = rest[dims:]
    return shapes
