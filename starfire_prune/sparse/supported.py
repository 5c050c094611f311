"""Which nodes of an exported graph can run natively."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from starfire_prune.sparse.layout import Window

__all__ = [
    "argument_of",
    "bounds",
    "convolution_window",
    "is_readable",
    "pooling_window",
    "shape_of",
]


aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
RENAMES = (operator.getitem, aten.view.default, aten.clone.default)  # same value, another name
BOUNDS: dict[Any, tuple[float, float]] = {  # of activations that aren't given any
    aten.relu.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: (-1.0, 1.0),
    **dict.fromkeys(
        (aten.clamp.default, aten.clip.default, aten.clamp_min.default, aten.clamp_max.default),
        (-math.inf, math.inf),
    ),
}
MOST_PHASES = 4  # of a window's stride
MOST_FLOATS = 2**29  # of an image: padded, they are counted in 32 bits
LARGEST = float(np.finfo(np.float32).max)
Constants = Mapping[fx.Node, Tensor]


def shape_of(node: Any) -> tuple[int, ...]:
    """Of a node's tensor; empty where it isn't one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def argument_of(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _pair(value: Any) -> tuple[int, int]:
    """One number or a list of one or two as a pair."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (numbers[0], numbers[-1])


def bounds(node: fx.Node) -> tuple[float, float]:
    """What an activation clamps to."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    low, high = BOUNDS[target]
    low = given.get("min", given.get("min_val", low))
    high = given.get("max", given.get("max_val", high))
    return _single(-math.inf if low is None else low), _single(math.inf if high is None else high)


def _single(bound: float) -> float:
    """A bound as float32 has it: infinite where it is beyond."""
    return math.copysign(math.inf, bound) if abs(bound) > LARGEST else float(bound)


def _window(
    node: fx.Node, size: Any, stride: Any, padding: Any, dilation: Any, output: tuple[int, ...]
) -> Window:
    size, stride, dilation = _pair(size), _pair(stride), _pair(dilation)
    reach = [(s - 1) * d for s, d in zip(size, dilation, strict=True)]
    before = [r // 2 if padding == "same" else 0 for r in reach]
    if not isinstance(padding, str):
        before = list(_pair(padding))
    image = shape_of(node.args[0])[2:]
    ends = [(o - 1) * s + r + 1 for o, s, r in zip(output[2:], stride, reach, strict=True)]
    after = [max(e - b - i, 0) for e, b, i in zip(ends, before, image, strict=True)]
    return Window(size, stride, dilation, _pair(before), _pair(after))


def convolution_window(node: fx.Node) -> Window:
    stride, padding = argument_of(node, 3, "stride", 1), argument_of(node, 4, "padding", 0)
    size = shape_of(node.args[1])[2:]
    return _window(node, size, stride, padding, argument_of(node, 5, "dilation", 1), shape_of(node))


def pooling_window(node: fx.Node) -> Window:
    size: Any = node.args[1]
    if node.target is aten.adaptive_avg_pool2d.default:
        image, parts = shape_of(node.args[0])[2:], shape_of(node)[2:]
        size = [pixels // number for pixels, number in zip(image, parts, strict=True)]
        return _window(node, size, size, 0, 1, shape_of(node))
    stride = argument_of(node, 2, "stride", None) or size
    dilation = argument_of(node, 4, "dilation", 1) if node.target is aten.max_pool2d.default else 1
    padding = argument_of(node, 3, "padding", 0)
    return _window(node, size, stride, padding, dilation, shape_of(node))


# ---------------------------------------------------------------------------------------------
# Which operations can be read
# ---------------------------------------------------------------------------------------------


def _is_image(node: Any) -> bool:
    """Whether it is a batch of images or of vectors, in single precision on the CPU."""
    shape = shape_of(node)
    if len(shape) not in (2, 4) or 0 in shape:
        return False
    value: Tensor = node.meta["val"]
    return value.dtype == torch.float32 and value.device.type == "cpu"


def _all_constant(node: fx.Node, constants: Constants, *indices: int) -> bool:
    arguments = [node.args[i] for i in indices if i < len(node.args)]
    return all(argument is None or argument in constants for argument in arguments)


def _reads_convolution(node: fx.Node, constants: Constants) -> bool:
    if not _all_constant(node, constants, 1, 2) or len(shape_of(node)) != 4:
        return False
    if math.prod(shape_of(node.args[0])[1:]) > MOST_FLOATS:
        return False
    return all(step <= MOST_PHASES for step in _pair(argument_of(node, 3, "stride", 1)))


def _reads_linear(node: fx.Node, constants: Constants) -> bool:
    return _all_constant(node, constants, 1, 2) and len(shape_of(node)) == 2


def _reads_norm(node: fx.Node, constants: Constants) -> bool:
    return _all_constant(node, constants, 1, 2, 3, 4) and _is_image(node.args[0])


def _reads_part(node: fx.Node, constants: Constants) -> bool:
    source: Any = node.args[0]
    first = bool(source.target is BATCH_NORM and node.args[1] == 0)
    return first and is_readable(source, constants)


def _reads_sum(node: fx.Node, constants: Constants) -> bool:
    one, other = node.args[:2]
    if node.kwargs or one in constants or other in constants:
        return False
    alike = shape_of(one) == shape_of(other) == shape_of(node)
    return alike and _is_image(one) and _is_image(other)


def _reads_join(node: fx.Node, constants: Constants) -> bool:
    parts: Any = node.args[0]
    images = all(_is_image(part) and part not in constants for part in parts)
    return images and len(shape_of(node)) == 4 and argument_of(node, 1, "dim", 0) == 1


def _reads_pooling(node: fx.Node, constants: Constants) -> bool:
    if len(shape_of(node)) != 4:
        return False
    window = pooling_window(node)
    if max(window.stride) > MOST_PHASES:
        return False
    average = node.target is aten.avg_pool2d.default
    return not average or not any((*window.before, *window.after, len(node.args) > 6))


def _reads_mean(node: fx.Node, constants: Constants) -> bool:
    source: Any = node.args[0]
    if len(shape_of(source)) != 4 or node.kwargs.get("dtype") is not None:
        return False
    dims: Any = node.args[1] or ()
    return {dim % 4 for dim in dims} == {2, 3}


def _reads_adaptive(node: fx.Node, constants: Constants) -> bool:
    """Whether it is one mean, or means of windows that are all alike."""
    image, parts = shape_of(node.args[0])[2:], shape_of(node)[2:]
    if len(image) != 2 or any(i % n for i, n in zip(image, parts, strict=True)):
        return False
    return parts == (1, 1) or max(pooling_window(node).stride) <= MOST_PHASES


def _reads_flattening(node: fx.Node, constants: Constants) -> bool:
    source: Any = node.args[0]
    shape, result = shape_of(source), shape_of(node)
    return len(shape) == 4 and len(result) == 2 and shape[0] == result[0]


def _reads_any(node: fx.Node, constants: Constants) -> bool:
    return _is_image(node.args[0])


READABLE: dict[Any, Callable[[fx.Node, Constants], bool]] = {
    **dict.fromkeys(CONVOLUTIONS, _reads_convolution),
    aten.linear.default: _reads_linear,
    BATCH_NORM: _reads_norm,
    operator.getitem: _reads_part,
    aten.add.Tensor: _reads_sum,
    aten.cat.default: _reads_join,
    aten.max_pool2d.default: _reads_pooling,
    aten.avg_pool2d.default: _reads_pooling,
    aten.adaptive_avg_pool2d.default: _reads_adaptive,
    aten.mean.dim: _reads_mean,
    aten.view.default: _reads_flattening,
    **dict.fromkeys(BOUNDS, _reads_any),
    aten.clone.default: _reads_any,
}


def is_readable(node: fx.Node, constants: Constants) -> bool:
    """Whether an operation can be a step, or part of one.

    Args:
        node: of an exported graph.
        constants: the tensors that other nodes stand for.
    """
    rule = READABLE.get(node.target)
    if node.op != "call_function" or rule is None:
        return False
    sources = [node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
    if any(source in constants for source in sources):  # type: ignore[union-attr]
        return False
    if node.target not in (operator.getitem, BATCH_NORM) and not _is_image(node):
        return False
    if node.target is not operator.getitem and not all(_is_image(s) for s in sources):  # type: ignore[union-attr]
        return False
    return rule(node, constants)
