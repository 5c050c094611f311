"""The binary format of programs: constants, opcodes and structures, as in native/program.h."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import numpy as np

from starfire_prune.utils.errors import BuildError

__all__ = [
    "AVERAGE",
    "CLAMPED_BYTES",
    "EUCLIDEAN",
    "FLOATS",
    "FORMAT",
    "INPUT",
    "LANES",
    "MAGIC",
    "MAXIMUM",
    "MAX_OUTPUT_TILE",
    "MAX_ROWS",
    "MAX_SPILLED",
    "MAX_TILE",
    "OUTPUT",
    "PLANES",
    "QUAD_TILE",
    "RECTANGLE_RUN",
    "REGISTER_TILE",
    "SATURATED_BYTES",
    "SHARED_OUTPUTS",
    "SUM",
    "TILES",
    "WORKSPACE",
    "Activation",
    "Opcode",
    "check_format",
]


MAGIC: Final = 0x5354415246495245
LANES: Final = 16  # unit of the sizes of tiles and rows in floats, on every machine
MAX_TILE: Final = 112  # pixels per tile
MAX_OUTPUT_TILE: Final = 64  # output channels per work item of a 1x1 convolution
MAX_ROWS: Final = 14  # accumulators of the spatial kernel
MAX_SPILLED: Final = 16  # output channels per work item with input-channel tiles
SHARED_OUTPUTS: Final = 4  # neighbouring output channels that may share taps
PLANES, TILES = 0, 1  # kinds of layouts
WORKSPACE, INPUT, OUTPUT = 0, 1, 2  # places of views
MAXIMUM, SUM = 0, 1  # modes of pooling
AVERAGE, EUCLIDEAN = 0, 1  # modes of means
FLOATS, CLAMPED_BYTES, SATURATED_BYTES = 0, 1, 2  # results of layers that multiply bytes


class Activation(enum.IntEnum):
    """What is computed of the results of operations on floats."""

    NO_ACTIVATION = 0
    SILU = 1
    HARD_SWISH = 2
    HARD_SIGMOID = 3
    SIGMOID = 4
    GELU = 5
    GELU_TANH = 6


class Opcode(enum.IntEnum):
    """Numbers of the operations."""

    COPY = 1
    POINTWISE = 2
    SPATIAL = 3
    POOL = 4
    MEAN = 5
    LINEAR = 6
    QUANTIZE = 7
    DEQUANTIZE = 8
    BYTE_COPY = 9
    BYTE_POINTWISE = 10
    BYTE_SPATIAL = 11
    BYTE_POOL = 12
    BYTE_LINEAR = 13
    BYTE_MEAN = 14
    UPSAMPLE = 15
    CHANNEL_NORM = 16
    RESPONSE = 17

    @property
    def structure(self) -> str:
        """The name of its structure in C++."""
        return "".join(word.title() for word in self.name.split("_"))


HEADER_FIELDS, SLOT_FIELDS, VIEW_FIELDS = 6, 3, 16
OPERATION_FIELDS: Final = {  # 64-bit integers after the opcode
    Opcode.COPY: 11,
    Opcode.POINTWISE: 15,
    Opcode.SPATIAL: 17,
    Opcode.POOL: 10,
    Opcode.MEAN: 3,
    Opcode.LINEAR: 10,
    Opcode.QUANTIZE: 6,
    Opcode.DEQUANTIZE: 4,
    Opcode.BYTE_COPY: 4,
    Opcode.BYTE_POINTWISE: 16,
    Opcode.BYTE_SPATIAL: 28,
    Opcode.BYTE_POOL: 5,
    Opcode.BYTE_LINEAR: 10,
    Opcode.BYTE_MEAN: 4,
    Opcode.UPSAMPLE: 4,
    Opcode.CHANNEL_NORM: 5,
    Opcode.RESPONSE: 3,
}
REGISTER_TILE: Final = np.dtype([("channel", "<i4", 4), ("count", "<i8"), ("start", "<i8")])
RECTANGLE_RUN: Final = np.dtype(
    [("rows", "<i4"), ("columns", "<i4"), ("count", "<i8"), ("offsets", "<i8"), ("weights", "<i8")]
)
QUAD_TILE: Final = np.dtype(
    [("indices", "<i8"), ("weights", "<i8"), ("counts", "<i4", 4), ("shared", "<i8")]
)
_STRUCTURES: Final = {
    "RegisterTile": REGISTER_TILE,
    "RectangleRun": RECTANGLE_RUN,
    "QuadTile": QUAD_TILE,
}
# By the C++ expression that must have this value
FORMAT: Final[dict[str, int]] = {
    "MAGIC": MAGIC,
    "LANES": LANES,
    "MAX_TILE": MAX_TILE,
    "MAX_OUTPUT_TILE": MAX_OUTPUT_TILE,
    "MAX_ROWS": MAX_ROWS,
    "MAX_SPILLED": MAX_SPILLED,
    "SHARED_OUTPUTS": SHARED_OUTPUTS,
    "PLANES": PLANES,
    "TILES": TILES,
    "WORKSPACE": WORKSPACE,
    "INPUT": INPUT,
    "OUTPUT": OUTPUT,
    "MAXIMUM": MAXIMUM,
    "SUM": SUM,
    "AVERAGE": AVERAGE,
    "EUCLIDEAN": EUCLIDEAN,
    "FLOATS": FLOATS,
    "CLAMPED_BYTES": CLAMPED_BYTES,
    "SATURATED_BYTES": SATURATED_BYTES,
    **{opcode.name: opcode.value for opcode in Opcode},
    **{activation.name: activation.value for activation in Activation},
    "sizeof(Header)": 8 * HEADER_FIELDS,
    "sizeof(Slot)": 8 * SLOT_FIELDS,
    "sizeof(View)": 8 * VIEW_FIELDS,
    **{f"sizeof({code.structure})": 8 * size for code, size in OPERATION_FIELDS.items()},
    **{f"sizeof({name})": dtype.itemsize for name, dtype in _STRUCTURES.items()},
    **{
        f"offsetof({name}, {field})": dtype.fields[field][1]  # type: ignore[index]
        for name, dtype in _STRUCTURES.items()
        for field in dtype.names or ()
    },
}


def check_format(compiled: Mapping[str, int]) -> None:
    """Compare the constants and structure sizes of the library with Python's.

    Args:
        compiled: Values of the C++ expressions that the library was compiled with.

    Raises:
        BuildError: If they differ.
    """
    for name in sorted(FORMAT.keys() | compiled.keys()):
        python, native = FORMAT.get(name), compiled.get(name)
        if python != native:
            raise BuildError(
                f"{name} is {native} in the native kernels and {python} in Python: "
                "program.h and program_format.py must agree"
            )
