"""Emits the operations of a program on floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from starfire_prune.sparse.ir import (
    ChannelNorm,
    Convolution,
    Copy,
    Flatten,
    Layer,
    Linear,
    Mean,
    Norm,
    Op,
    Pooling,
    Response,
    Upsampling,
)
from starfire_prune.sparse.layout import offset_of, plain
from starfire_prune.sparse.pack_pointwise import pack_linear, pack_pointwise
from starfire_prune.sparse.pack_rectangles import pack_rectangles
from starfire_prune.sparse.program_format import (
    AVERAGE,
    EUCLIDEAN,
    MAX_ROWS,
    MAXIMUM,
    SUM,
    Opcode,
)
from starfire_prune.sparse.spatial_tiling import spatial_fields, spatial_tiling
from starfire_prune.sparse.stored_values import NONE, StoredValues, geometry_of

__all__ = ["EMITTERS"]


def _emit_copy(values: StoredValues, op: Copy) -> None:
    views = values.views(op, None)
    scale, shift = NONE, NONE
    if op.scale is not None:
        scale, shift = values.constant(op.scale), values.constant(op.shift)
    values.program.add(
        *(Opcode.COPY, *views, values.factor_view(op), *op.stride, scale, shift),
        *(op.low, op.high, op.activation),
    )


def _emit_convolution(values: StoredValues, op: Convolution) -> None:
    if op.is_linear:
        _emit_linear(values, op)
    elif op.is_pointwise:
        _emit_pointwise(values, op)
    else:
        _emit_spatial(values, op)


def _emit_pointwise(values: StoredValues, op: Convolution) -> None:
    geometry = geometry_of(op)
    views = values.views(op, geometry)
    packed = pack_pointwise(op.weight[:, :, 0, 0].astype(np.float32), geometry.tile)
    bias = np.pad(op.bias, (0, -len(op.bias) % packed.output_tile_size))
    values.program.add(
        Opcode.POINTWISE,
        *views,
        values.constant(bias),
        values.constant(packed.tiles, packed.tiles.dtype),
        values.constant(packed.indices, np.uint16),
        values.constant(packed.weights),
        *(len(op.bias), packed.output_tile_size, packed.input_tile_size),
        *(packed.index_lists, packed.outputs_per_list, op.low, op.high, op.activation),
    )


def _emit_spatial(values: StoredValues, op: Convolution) -> None:
    geometry = geometry_of(op)
    views = values.views(op, geometry)
    weight = op.weight.astype(np.float32)
    tiling = spatial_tiling(op, geometry, MAX_ROWS)
    packed = pack_rectangles(weight, op.groups, geometry, op.window, tiling.rows)
    values.program.add(
        Opcode.SPATIAL,
        *views,
        values.constant(op.bias),
        *spatial_fields(values, packed, tiling, geometry, len(op.bias)),
        *(op.low, op.high, op.activation),
    )


def _emit_pooling(values: StoredValues, op: Pooling) -> None:
    geometry = geometry_of(op)
    source, output, _ = values.views(op, geometry)
    taps = np.ndindex(op.window.size)
    offsets = [offset_of(geometry, tap, op.window.dilation) for tap in taps]
    mode, scale = (MAXIMUM, 1.0) if op.scale is None else (SUM, op.scale)
    offsets_at = values.constant(offsets, np.int32)
    columns = op.window.stride[1] // geometry.phases[1]
    values.program.add(
        *(Opcode.POOL, source, output, mode, offsets_at, len(offsets), columns, scale),
        *(op.low, op.high, op.activation),
    )


def _emit_mean(values: StoredValues, op: Mean | Norm) -> None:
    source, output, _ = values.views(op, None)
    values.program.add(Opcode.MEAN, source, output, EUCLIDEAN if isinstance(op, Norm) else AVERAGE)


def _emit_response(values: StoredValues, op: Response) -> None:
    source, output, _ = values.views(op, None)
    values.program.add(Opcode.RESPONSE, source, output, op.epsilon)


def _emit_channel_norm(values: StoredValues, op: ChannelNorm) -> None:
    source, output, _ = values.views(op, geometry_of(op))
    parts = (values.constant(op.scale), values.constant(op.shift))
    values.program.add(Opcode.CHANNEL_NORM, source, output, *parts, op.epsilon)


def _emit_upsampling(values: StoredValues, op: Upsampling) -> None:
    source, output, _ = values.views(op, None)
    factors = (op.output.height // op.source.height, op.output.width // op.source.width)
    values.program.add(Opcode.UPSAMPLE, source, output, *factors)


def _emit_linear(values: StoredValues, op: Layer) -> None:
    source, output, _ = values.views(op, plain(1, 1))
    packed = pack_linear(op.weight.reshape(len(op.weight), -1).astype(np.float32))
    bias, starts, indices = values.constant(op.bias), NONE, NONE
    if packed.starts is not None:
        starts = values.constant(packed.starts, np.int32)
        indices = values.constant(packed.indices, np.int32)
    weights = values.constant(packed.weights)
    values.program.add(
        *(Opcode.LINEAR, source, output, bias, starts, indices, weights),
        *(len(op.bias), op.low, op.high, op.activation),
    )


EMITTERS: Mapping[type[Op], Callable[[StoredValues, Any], None]] = {
    Convolution: _emit_convolution,
    Copy: _emit_copy,
    Flatten: StoredValues.alias,
    Linear: _emit_linear,
    ChannelNorm: _emit_channel_norm,
    Mean: _emit_mean,
    Norm: _emit_mean,
    Pooling: _emit_pooling,
    Response: _emit_response,
    Upsampling: _emit_upsampling,
}
