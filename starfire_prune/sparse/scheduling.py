"""Schedules IR ops: chooses layouts, inserts conversions, packs weights and emits a program."""

from __future__ import annotations

from collections.abc import Sequence

from starfire_prune.sparse import emit_bytes, emit_floats
from starfire_prune.sparse.geometries import choose_geometries
from starfire_prune.sparse.ir import Op, Value
from starfire_prune.sparse.program import Program
from starfire_prune.sparse.stored_values import StoredValues

__all__ = ["schedule"]


def schedule(ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]) -> Program:
    """The program that runs the ops.

    Args:
        ops: The ops in an order in which they can run.
        inputs: The values that the caller passes, in floats.
        outputs: The values that the caller receives, in floats.
    """
    values = StoredValues(choose_geometries(ops, outputs))
    for index, value in enumerate(inputs):
        values.add_input(value, index)
    for op in ops:
        emitters = emit_bytes.EMITTERS if _is_on_bytes(op) else emit_floats.EMITTERS
        emitters[type(op)](values, op)
    for index, value in enumerate(outputs):
        values.add_output(value, index)
    return values.program


def _is_on_bytes(op: Op) -> bool:
    """Whether it reads or writes quantized values."""
    return op.source.quantization is not None or op.output.quantization is not None
