"""Emits the operations of a program on quantized values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from starfire_prune.sparse.ir import (
    Convolution,
    Copy,
    Dequantize,
    Layer,
    Linear,
    Mean,
    Op,
    Pooling,
    Quantization,
    Quantize,
)
from starfire_prune.sparse.layout import offset_of, plain
from starfire_prune.sparse.pack_merged import MergedQuads
from starfire_prune.sparse.pack_quads import is_narrow, pack_byte_rows, pack_quads, quads_of
from starfire_prune.sparse.pack_spatial import pack_byte_spatial
from starfire_prune.sparse.program_format import (
    CLAMPED_BYTES,
    FLOATS,
    SATURATED_BYTES,
    SHARED_OUTPUTS,
    Activation,
    Opcode,
)
from starfire_prune.sparse.spatial_tiling import spatial_fields
from starfire_prune.sparse.stored_values import NONE, StoredValues, geometry_of

__all__ = ["EMITTERS"]


Doubles = NDArray[np.float64]
MAX_CONVERTED = 2.0**30  # conversions of floats to int32 are right up to there


class _Requantization(NamedTuple):
    """How the int32 sums of a layer become results, see native/program.h.

    Attributes:
        scale: Factor of each output channel's sum, `(K,)`.
        shift: Summand of each output channel, `(K,)`.
        residual_scale: Factor of the added value.
        low: Lower bound of results.
        high: Upper bound of results.
        results: `FLOATS`, `CLAMPED_BYTES` or `SATURATED_BYTES`.
    """

    scale: Doubles
    shift: Doubles
    residual_scale: float
    low: float
    high: float
    results: int


def _requantization(op: Layer) -> _Requantization:
    """How the sums of products of integers of a layer become its results.

    A sum has the products of bytes and weights. The bytes' zero point, with which images are padded
    too, adds the same to all sums of an output channel, which the shift removes.
    """
    source, output = op.source.bytes_as, op.output.quantization
    weight_sums = op.weight.reshape(len(op.weight), -1).sum(1, dtype=np.int64)
    scale: Doubles = source.scale * np.asarray(op.weight_scale, np.float64)
    shift: Doubles = op.bias - scale * source.zero_point * weight_sums
    if output is None:
        return _Requantization(scale, shift, 1.0, op.low, op.high, FLOATS)
    residual_scale = 0.0
    shift = shift / output.scale + output.zero_point
    if op.residual is not None:
        added = op.residual.bytes_as
        residual_scale = added.scale / output.scale
        shift = shift - added.zero_point * residual_scale
    low, high = (_byte_of(bound, output) for bound in (op.low, op.high))
    scale = scale / output.scale
    largest = _largest_results(op, scale, shift) + 255 * residual_scale
    saturated = (low, high) == (0.0, 255.0) and largest < MAX_CONVERTED
    results = SATURATED_BYTES if saturated else CLAMPED_BYTES
    return _Requantization(scale, shift, residual_scale, low, high, results)


def _largest_results(op: Layer, scale: Doubles, shift: Doubles) -> float:
    """A bound of the size of all results, before they are rounded."""
    sizes = np.abs(op.weight.reshape(len(op.weight), -1).astype(np.int64)).sum(1)
    return float((255 * sizes * np.abs(scale) + np.abs(shift)).max(initial=0.0))


def _byte_of(bound: float, quantization: Quantization) -> float:
    """The byte that stands for a bound."""
    if math.isinf(bound):
        return float(quantization.high if bound > 0 else quantization.low)
    byte = round(bound / quantization.scale) + quantization.zero_point
    return float(min(max(byte, quantization.low), quantization.high))


def _emit_quantize(values: StoredValues, op: Quantize) -> None:
    source, output, _ = values.views(op, None)
    quantization = op.output.bytes_as
    bounds = (quantization.zero_point, quantization.low, quantization.high)
    fields = (source, output, 1.0 / quantization.scale, *map(float, bounds))
    values.program.add(Opcode.QUANTIZE, *fields)


def _emit_dequantize(values: StoredValues, op: Dequantize) -> None:
    source, output, _ = values.views(op, None)
    quantization = op.source.bytes_as
    scale, zero_point = quantization.scale, float(quantization.zero_point)
    values.program.add(Opcode.DEQUANTIZE, source, output, scale, zero_point)


def _emit_mean(values: StoredValues, op: Mean) -> None:
    source, output, _ = values.views(op, None)
    quantization = op.source.bytes_as
    scale, zero_point = quantization.scale, float(quantization.zero_point)
    values.program.add(Opcode.BYTE_MEAN, source, output, scale, zero_point)


def _emit_copy(values: StoredValues, op: Copy) -> None:
    source, output, _ = values.views(op, None)
    values.program.add(Opcode.BYTE_COPY, source, output, *op.stride)


def _emit_pooling(values: StoredValues, op: Pooling) -> None:
    geometry = geometry_of(op)
    source, output, _ = values.views(op, geometry)
    taps = np.ndindex(op.window.size)
    offsets = [offset_of(geometry, tap, op.window.dilation) for tap in taps]
    offsets_at = values.constant(offsets, np.int32)
    columns = op.window.stride[1] // geometry.phases[1]
    values.program.add(Opcode.BYTE_POOL, source, output, offsets_at, len(offsets), columns)


def _emit_convolution(values: StoredValues, op: Convolution) -> None:
    if op.is_linear:
        _emit_linear(values, op)
    elif op.is_pointwise:
        _emit_pointwise(values, op)
    else:
        _emit_spatial(values, op)


def _is_narrow(op: Layer, quads: NDArray[Any]) -> bool:
    return is_narrow(quads, op.source.bytes_as.high)


def _emit_pointwise(values: StoredValues, op: Convolution) -> None:
    geometry = geometry_of(op)
    views = values.views(op, geometry)
    packed = pack_quads(quads_of(op.weight[:, :, 0, 0], 1), geometry.tile)
    result = _requantization(op)
    padding = (0, -len(op.bias) % packed.output_tile_size)
    values.program.add(
        Opcode.BYTE_POINTWISE,
        *views,
        values.constant(np.pad(result.shift, padding)),
        values.constant(packed.tiles, packed.tiles.dtype),
        values.constant(packed.indices, np.uint16),
        values.constant(packed.weights, np.int32),
        *(len(op.bias), packed.output_tile_size, packed.input_tile_size),
        *(result.low, result.high, values.constant(np.pad(result.scale, padding))),
        *(result.residual_scale, result.results, _is_narrow(op, packed.weights)),
    )


def _emit_spatial(values: StoredValues, op: Convolution) -> None:
    geometry = geometry_of(op)
    views = values.views(op, geometry)
    result = _requantization(op)
    packed, tiling, merged = pack_byte_spatial(op, geometry)
    padding = (0, -len(op.bias) % SHARED_OUTPUTS)
    values.program.add(
        Opcode.BYTE_SPATIAL,
        *views,
        values.constant(np.pad(result.shift, padding)),
        *spatial_fields(values, packed, tiling, geometry, len(op.bias)),
        *(result.low, result.high, Activation.NO_ACTIVATION),
        values.constant(np.pad(result.scale, padding)),
        *(result.residual_scale, result.results, _is_narrow(op, packed.weights)),
        packed.shared,
        *_merged_fields(values, merged),
    )


def _merged_fields(values: StoredValues, merged: MergedQuads | None) -> list[int]:
    """The fields of the C++ structure `ByteSpatial` from `merged_at` on."""
    if merged is None:
        return [NONE, NONE, NONE, 0, 0, 0]
    return [
        values.constant(merged.starts, np.int32),
        values.constant(merged.sources, np.int32),
        values.constant(merged.vectors, np.int32),
        *(len(merged.vectors), merged.most, merged.row_stride),
    ]


def _emit_linear(values: StoredValues, op: Layer) -> None:
    source, output, _ = values.views(op, plain(1, 1))
    rows = pack_byte_rows(op.weight.reshape(len(op.weight), -1))
    result = _requantization(op)
    values.program.add(
        *(Opcode.BYTE_LINEAR, source, output, values.constant(result.shift)),
        *(values.constant(result.scale), values.constant(rows, np.int8)),
        *(*rows.shape, result.low, result.high, _is_narrow(op, rows.view("<i4"))),
    )


EMITTERS: Mapping[type[Op], Callable[[StoredValues, Any], None]] = {
    Convolution: _emit_convolution,
    Copy: _emit_copy,
    Dequantize: _emit_dequantize,
    Linear: _emit_linear,
    Mean: _emit_mean,
    Pooling: _emit_pooling,
    Quantize: _emit_quantize,
}
