"""Chooses the memory layouts of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starfire_prune.sparse.ir import (
    ChannelNorm,
    Convolution,
    Flatten,
    Layer,
    Mean,
    Norm,
    Op,
    Pooling,
    Value,
)
from starfire_prune.sparse.layout import Geometry, Window, float_bits, padded, plain, tiles

__all__ = ["choose_geometries", "required_geometry"]


def required_geometry(op: Op) -> Geometry | None:
    """The layout in which an op reads its source; None if it reads any."""
    size, quantization = op.source.size, op.source.quantization
    if isinstance(op, ChannelNorm):
        return tiles(*size)
    if isinstance(op, Convolution) and op.is_pointwise and not op.is_linear:
        return tiles(*size)
    if isinstance(op, (Layer, Flatten)) and not _is_spatial(op):
        return plain(*size)
    if isinstance(op, Convolution):
        return padded(*size, op.window, 0 if quantization is None else quantization.fill)
    if isinstance(op, Pooling):
        fill = float_bits(op.fill) if quantization is None else 0  # the smallest bytes
        return padded(*size, _pooling_window(op.window), fill)
    return None


def _is_spatial(op: Op) -> bool:
    return isinstance(op, Convolution) and not op.is_pointwise


def _pooling_window(window: Window) -> Window:
    """The window for a pooling's layout: for horizontal stride 2, rows are not split into phases.

    The kernel reads every second column of them.
    """
    vertical, horizontal = window.stride
    return window._replace(stride=(vertical, 1)) if horizontal == 2 else window


def choose_geometries(ops: Sequence[Op], outputs: Sequence[Value]) -> Mapping[Value, Geometry]:
    """A layout for each value that an op computes: the one that its first reader requires.

    Parts of a value are stored in its layout: the one that its own first reader requires.

    Additions and copies prefer the layout of their output, which is chosen before that of their
    source because ops are visited from the last one to the first.
    """
    required: dict[Value, list[Geometry]] = {value.root: [plain(*value.size)] for value in outputs}
    preferred: dict[Value, Geometry] = {}
    chosen: dict[Value, Geometry] = {}
    for op in reversed(ops):
        value, source = op.output.root, op.source.root
        if value not in chosen:
            default = preferred.get(value, plain(*value.size))
            chosen[value] = required.get(value, [default])[-1]
            if _adds_bytes_to_pixels(op):
                chosen[value] = tiles(*value.size)
        geometry = required_geometry(op)
        if geometry is not None:
            required.setdefault(source, []).append(geometry)
        elif isinstance(op, (Mean, Norm)):
            preferred[source] = tiles(*source.size)
        elif source.size == value.size:
            preferred[source] = chosen[value]
        for operand in op.operands:
            if operand.size == value.size:
                preferred[operand.root] = chosen[value]
    return chosen


def _adds_bytes_to_pixels(op: Op) -> bool:
    """Whether it is a 1x1 convolution of bytes that adds to its sums, which are tiles of pixels."""
    added = isinstance(op, Convolution) and op.is_pointwise and op.residual is not None
    return added and op.weight_scale is not None  # type: ignore[attr-defined]
