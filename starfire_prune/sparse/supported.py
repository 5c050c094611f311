"""Decides which nodes of an exported graph the native kernels support."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from starfire_prune.sparse.affine import affine_of
from starfire_prune.sparse.layout import Window, padded
from starfire_prune.sparse.nodes import SAME, Constants, argument_of, is_image, shape_of
from starfire_prune.sparse.program_format import Activation
from starfire_prune.sparse.quantized import is_dequantize, is_quantize
from starfire_prune.sparse.rewriting import channel_norm, global_response

__all__ = [
    "activation_of",
    "bounds",
    "convolution_window",
    "first_channel",
    "is_supported",
    "pooling_window",
]


aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
UPSAMPLINGS = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
ACTIVATIONS: dict[Any, Activation] = {
    aten.silu.default: Activation.SILU,
    aten.hardswish.default: Activation.HARD_SWISH,
    aten.hardsigmoid.default: Activation.HARD_SIGMOID,
    aten.sigmoid.default: Activation.SIGMOID,
    aten.gelu.default: Activation.GELU,
}
BOUNDS: dict[Any, tuple[float, float]] = {  # defaults of activations
    aten.relu.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: (-1.0, 1.0),
    **dict.fromkeys(
        (aten.clamp.default, aten.clip.default, aten.clamp_min.default, aten.clamp_max.default),
        (-math.inf, math.inf),
    ),
}
MAX_STRIDE = 4
MAX_IMAGE_FLOATS = 2**29  # bytes of padded images are counted in 32 bits, one of which is a sign
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _pair(value: Any) -> tuple[int, int]:
    """A number or a list of one or two numbers as a pair."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (numbers[0], numbers[-1])


def bounds(node: fx.Node) -> tuple[float, float]:
    """The lower and upper bound of an activation."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    low, high = BOUNDS[target]
    low = given.get("min", given.get("min_val", low))
    high = given.get("max", given.get("max_val", high))
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    return _to_float32(low), _to_float32(high)


def activation_of(node: fx.Node) -> Activation:
    """The activation that a node computes; one of `ACTIVATIONS`."""
    if argument_of(node, 1, "approximate", "none") == "tanh":
        return Activation.GELU_TANH
    return ACTIVATIONS[node.target]


def _to_float32(bound: float) -> float:
    """A bound, or infinity if it exceeds the range of float32."""
    return math.copysign(math.inf, bound) if abs(bound) > MAX_FLOAT32 else float(bound)


def _window(
    node: fx.Node, size: Any, stride: Any, padding: Any, dilation: Any, output: tuple[int, ...]
) -> Window:
    size, stride, dilation = _pair(size), _pair(stride), _pair(dilation)
    extent = [(s - 1) * d for s, d in zip(size, dilation, strict=True)]
    before = [e // 2 if padding == "same" else 0 for e in extent]
    if not isinstance(padding, str):
        before = list(_pair(padding))
    image = shape_of(node.args[0])[2:]
    ends = [(o - 1) * s + e + 1 for o, s, e in zip(output[2:], stride, extent, strict=True)]
    after = [max(e - b - i, 0) for e, b, i in zip(ends, before, image, strict=True)]
    return Window(size, stride, dilation, _pair(before), _pair(after))


def convolution_window(node: fx.Node) -> Window:
    """The window of a convolution."""
    stride, padding = argument_of(node, 3, "stride", 1), argument_of(node, 4, "padding", 0)
    size = shape_of(node.args[1])[2:]
    return _window(node, size, stride, padding, argument_of(node, 5, "dilation", 1), shape_of(node))


def pooling_window(node: fx.Node) -> Window:
    """The window of a pooling; adaptive pooling must have equal windows."""
    size: Any = node.args[1]
    if node.target is aten.adaptive_avg_pool2d.default:
        image, outputs = shape_of(node.args[0])[2:], shape_of(node)[2:]
        size = [pixels // number for pixels, number in zip(image, outputs, strict=True)]
        return _window(node, size, size, 0, 1, shape_of(node))
    stride = argument_of(node, 2, "stride", None) or size
    dilation = argument_of(node, 4, "dilation", 1) if node.target is aten.max_pool2d.default else 1
    padding = argument_of(node, 3, "padding", 0)
    return _window(node, size, stride, padding, dilation, shape_of(node))


# ---------------------------------------------------------------------------------------------
# A rule for each operation
# ---------------------------------------------------------------------------------------------


def _all_constant(node: fx.Node, constants: Constants, *indices: int) -> bool:
    arguments = [node.args[i] for i in indices if i < len(node.args)]
    return all(argument is None or argument in constants for argument in arguments)


def _supports_convolution(node: fx.Node, constants: Constants) -> bool:
    if not _all_constant(node, constants, 1, 2) or len(shape_of(node)) != 4:
        return False
    if max(_pair(argument_of(node, 3, "stride", 1))) > MAX_STRIDE:
        return False
    channels, height, width = shape_of(node.args[0])[1:]
    return channels * padded(height, width, convolution_window(node)).channel <= MAX_IMAGE_FLOATS


def _supports_linear(node: fx.Node, constants: Constants) -> bool:
    return _all_constant(node, constants, 1, 2) and len(shape_of(node)) == 2


def _supports_batch_norm(node: fx.Node, constants: Constants) -> bool:
    return _all_constant(node, constants, 1, 2, 3, 4) and is_image(node.args[0])


def _supports_getitem(node: fx.Node, constants: Constants) -> bool:
    source: Any = node.args[0]
    if source.target in SPLITS:
        return is_image(node) and is_supported(source, constants)
    is_output = bool(source.target is BATCH_NORM and node.args[1] == 0)
    return is_output and is_supported(source, constants)


def _supports_split(node: fx.Node, constants: Constants) -> bool:
    """Whether it splits the channels of images."""
    return len(shape_of(node.args[0])) == 4 and argument_of(node, 2, "dim", 0) % 4 == 1


def _supports_slice(node: fx.Node, constants: Constants) -> bool:
    """Whether it is a range of channels, without steps."""
    axis, step = argument_of(node, 1, "dim", 0), argument_of(node, 4, "step", 1)
    return len(shape_of(node)) == 4 and axis % 4 == 1 and step == 1


def first_channel(node: fx.Node) -> int:
    """The first channel that an output of a split, or a slice, has of its source."""
    if node.target is aten.slice.Tensor:
        start, channels = argument_of(node, 2, "start", None) or 0, shape_of(node.args[0])[1]
        return min(max(start + channels if start < 0 else start, 0), channels)
    split, index = node.args
    parts: Any = split.meta["val"]  # type: ignore[union-attr]
    return sum(part.shape[1] for part in parts[:index])


def _supports_upsampling(node: fx.Node, constants: Constants) -> bool:
    """Whether each pixel is repeated, as often as the others."""
    (height, width), (rows, columns) = shape_of(node.args[0])[2:], shape_of(node)[2:]
    scales = _pair(node.args[2] if node.target is aten.upsample_nearest2d.vec else None)
    given = [scale for scale in scales if scale is not None]
    whole = rows % height == 0 and columns % width == 0
    return whole and all(scale == int(scale) for scale in given)


def _supports_sum(node: fx.Node, constants: Constants) -> bool:
    if affine_of(node, constants) is not None:
        return True
    if node.target is not aten.add.Tensor or not _joins_images(node, constants):
        return False
    return shape_of(node.args[0]) == shape_of(node.args[1])


def _supports_product(node: fx.Node, constants: Constants) -> bool:
    """Whether it is a product of images of one shape, or of an image by a number per channel."""
    if affine_of(node, constants) is not None:
        return True
    if node.target is not aten.mul.Tensor or not _joins_images(node, constants):
        return False
    shapes = [shape_of(operand) for operand in node.args[:2]]
    return all(shape in (shape_of(node), (*shape_of(node)[:2], 1, 1)) for shape in shapes)


def _supports_addcmul(node: fx.Node, constants: Constants) -> bool:
    return affine_of(node, constants) is not None


def _joins_images(node: fx.Node, constants: Constants) -> bool:
    """Whether it joins two values that aren't constant, to an image of the shape of one of them."""
    operands = node.args[:2]
    if node.kwargs or any(operand in constants for operand in operands):
        return False
    images = all(is_image(operand) for operand in operands)
    return images and shape_of(node) in [shape_of(operand) for operand in operands]


def _supports_concatenation(node: fx.Node, constants: Constants) -> bool:
    sources: Any = node.args[0]
    images = all(is_image(source) and source not in constants for source in sources)
    return images and len(shape_of(node)) == 4 and argument_of(node, 1, "dim", 0) == 1


def _supports_pooling(node: fx.Node, constants: Constants) -> bool:
    if len(shape_of(node)) != 4:
        return False
    window = pooling_window(node)
    if max(window.stride) > MAX_STRIDE:
        return False
    average = node.target is aten.avg_pool2d.default
    return not average or not any((*window.before, *window.after, len(node.args) > 6))


def _supports_mean(node: fx.Node, constants: Constants) -> bool:
    source: Any = node.args[0]
    if len(shape_of(source)) != 4 or node.kwargs.get("dtype") is not None:
        return False
    dims: Any = node.args[1] or ()
    return {dim % 4 for dim in dims} == {2, 3}


def _supports_norm(node: fx.Node, constants: Constants) -> bool:
    """Whether it is the Euclidean norm of complete images, as images of one pixel."""
    dims: Any = argument_of(node, 2, "dim", None) or ()
    pixels = len(shape_of(node)) == 4 and {dim % 4 for dim in dims} == {2, 3}
    return pixels and argument_of(node, 1, "ord", 2) == 2 and node.kwargs.get("dtype") is None


def _supports_channel_norm(node: fx.Node, constants: Constants) -> bool:
    return _all_constant(node, constants, 1, 2) and len(shape_of(node)) == 4


def _supports_adaptive_pooling(node: fx.Node, constants: Constants) -> bool:
    """Whether it is the mean of the image, or the means of equal windows."""
    image, outputs = shape_of(node.args[0])[2:], shape_of(node)[2:]
    if len(image) != 2 or any(i % n for i, n in zip(image, outputs, strict=True)):
        return False
    return outputs == (1, 1) or max(pooling_window(node).stride) <= MAX_STRIDE


def _supports_view(node: fx.Node, constants: Constants) -> bool:
    """Whether it flattens images to vectors, or makes images of one pixel of vectors."""
    shape, result = shape_of(node.args[0]), shape_of(node)
    flattens = len(shape) == 4 and len(result) == 2 and shape[0] == result[0]
    return flattens or result == shape or result == (*shape, 1, 1)


def _supports_any_image(node: fx.Node, constants: Constants) -> bool:
    return is_image(node.args[0])


RULES: dict[Any, Callable[[fx.Node, Constants], bool]] = {
    **dict.fromkeys(CONVOLUTIONS, _supports_convolution),
    aten.linear.default: _supports_linear,
    BATCH_NORM: _supports_batch_norm,
    operator.getitem: _supports_getitem,
    **dict.fromkeys(SPLITS, _supports_split),
    aten.slice.Tensor: _supports_slice,
    **dict.fromkeys(UPSAMPLINGS, _supports_upsampling),
    **dict.fromkeys(SUMS, _supports_sum),
    **dict.fromkeys(PRODUCTS, _supports_product),
    aten.addcmul.default: _supports_addcmul,
    aten.cat.default: _supports_concatenation,
    aten.max_pool2d.default: _supports_pooling,
    aten.avg_pool2d.default: _supports_pooling,
    aten.adaptive_avg_pool2d.default: _supports_adaptive_pooling,
    aten.mean.dim: _supports_mean,
    aten.linalg_vector_norm.default: _supports_norm,
    channel_norm: _supports_channel_norm,
    global_response: _supports_any_image,
    aten.view.default: _supports_view,
    **dict.fromkeys((*BOUNDS, *ACTIVATIONS, *SAME), _supports_any_image),
}


def is_supported(node: fx.Node, constants: Constants) -> bool:
    """Whether an operation can become an IR op, or part of one.

    Args:
        node: A node of an exported graph.
        constants: The tensors of the nodes that are constant.
    """
    if is_quantize(node):
        return is_image(node, torch.uint8) and is_image(node.args[0])
    if is_dequantize(node):
        return is_image(node) and is_image(node.args[0], torch.uint8)
    rule = RULES.get(node.target)
    if node.op != "call_function" or rule is None:
        return False
    if node.target in (*SUMS, *PRODUCTS, aten.addcmul.default):
        return is_image(node) and rule(node, constants)
    sources = [node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
    if any(source in constants for source in sources):  # type: ignore[union-attr]
        return False
    if node.target not in (operator.getitem, BATCH_NORM, *SPLITS) and not is_image(node):
        return False
    if node.target is not operator.getitem and not all(is_image(s) for s in sources):  # type: ignore[union-attr]
        return False
    return rule(node, constants)
