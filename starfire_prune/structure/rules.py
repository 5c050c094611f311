"""The rules by which constant channels pass through each operation of an exported graph.

A rule is a function of a node and the node's arguments, in which tensors are replaced by abstract
values (`abstract_values.py`). It returns the abstract value of the output. The output of an
operation without a rule in `RULES` counts as varying.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from starfire_prune.structure.abstract_values import (
    VARYING,
    abstract,
    channel_values,
    merged_places,
    shape_of,
    varying,
    without_repeats,
)
from starfire_prune.structure.ops import (
    BATCH_NORMS,
    BINARY,
    CENTERING_NORMS,
    CONVOLUTIONS,
    ITEM,
    KEEPING,
    LINEAR,
    PERMUTING,
    POINTWISE,
    POOLING,
    REDUCTIONS,
    RESHAPING,
    SPLITTING,
    aten,
)

__all__ = ["MIXING", "RULES", "bias_of", "is_padded", "is_pure", "is_statistic"]


Rule = Callable[..., Any]


def is_padded(node: fx.Node) -> bool:
    """Whether a convolution's node pads its input by zeros."""
    padding = _argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        weight = shape_of(node.args[1])
        return padding == "same" and math.prod(weight[2:]) > 1
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


def bias_of(node: fx.Node) -> Any:
    """The bias argument of a convolution or linear node."""
    return _argument(node, 2, "bias", None)


def is_pure(node: fx.Node) -> bool:
    """Whether an operation always has the same output for the same tensors, and changes none."""
    operation: Any = node.target
    if not isinstance(operation, torch._ops.OpOverload):
        return operation is ITEM  # other operations contain graphs
    random = torch.Tag.nondeterministic_seeded in operation.tags
    return not random and not operation._schema.is_mutable


def is_statistic(node: fx.Node, source: fx.Node) -> bool:
    """Whether a batch norm's node uses a buffer only as its running mean or variance."""
    if node.target not in (*BATCH_NORMS, *CENTERING_NORMS):
        return False
    return source in node.args[3:5] and source not in node.args[:3]


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


# ---------------------------------------------------------------------------------------------
# Pointwise operations
# ---------------------------------------------------------------------------------------------


def _keep(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _cast(node: fx.Node, x: Tensor, *, dtype: Any = None, **_: Any) -> Tensor:
    """Constants are converted to another precision; integers and booleans count as varying."""
    if dtype is None:
        return x
    if not dtype.is_floating_point:
        return torch.full_like(x, VARYING)
    return x.to(dtype).to(torch.float64)


def _pointwise(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = node.target(x, *args, **kwargs)  # type: ignore[operator]
    return torch.where(x.isnan(), x, result)


def _binary(node: fx.Node, one: Any, other: Any, **kwargs: Any) -> Any:
    """Two constants give a constant; NaN, for varying, propagates by itself."""
    return node.target(abstract(one), abstract(other), **kwargs)  # type: ignore[operator]


def _multiply(node: fx.Node, one: Any, other: Any) -> Any:
    """Zero times anything is zero, as in a gate, except for an infinite parameter."""
    one, other = (torch.as_tensor(abstract(x), dtype=torch.float64) for x in (one, other))
    infinite = one.isinf() | other.isinf()
    return (one * other).masked_fill(((one == 0) | (other == 0)) & ~infinite, 0.0)


def _dropout(node: fx.Node, x: Tensor, p: float, train: bool = True) -> Tensor:
    """In training only zeros are still constant."""
    x = abstract(x)
    return x.masked_fill(x != 0, VARYING) if train else x


def _native_dropout(node: fx.Node, x: Tensor, p: float, train: bool | None) -> tuple[Any, ...]:
    return _dropout(node, x, p, train is not False), None


def _random(node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
    return varying(len(shape_of(node)))


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def _affine(x: Tensor, weight: Tensor, bias: Any, groups: int, padded: bool) -> Tensor:
    """The constants `(K,)` of outputs, given `(C,)` inputs and the `(K, C / groups, n)` weight.

    An output channel is constant if none of its non-zero kernels reads a varying channel, or, with
    padding by zeros, a constant other than zero, since its border would differ. It varies if a
    weight varies or is not finite.
    """
    rows = x.view(groups, -1)
    folded = rows.isfinite() & (rows != 0)
    blocked = rows.isnan() | (folded & padded)
    kernels = weight.view(groups, -1, *weight.shape[1:])  # (groups, K / groups, C / groups, n)
    reads = (kernels[..., 0] != 0 if weight.shape[2] == 1 else kernels.any(-1)).cpu()
    value = torch.zeros(reads.shape[:2], dtype=torch.float64)
    if folded.any():
        columns = folded.any(0)
        sums = abstract(kernels[:, :, columns]).sum(-1)
        value = (sums @ rows.nan_to_num(nan=0.0)[:, columns, None])[..., 0]
    varies = (reads & blocked[:, None]).any(2).flatten()
    varies |= ~weight.flatten(1).sum(1).isfinite().cpu()
    value = value.flatten() if bias is None else value.flatten() + abstract(bias)
    return value.masked_fill(varies, VARYING)


def _is_complete(node: fx.Node, weight: Tensor) -> bool:
    """Whether a weight is known, not an abstract value that depends on the model's input."""
    return weight.shape == shape_of(node.args[1])


def _convolution(node: fx.Node, x: Tensor, weight: Tensor, bias: Any = None, *_: Any) -> Tensor:
    groups = _argument(node, 6, "groups", 1)
    spatial = weight.ndim - 2
    dim = x.ndim - spatial - 1
    if not _is_complete(node, weight):
        return varying(x.ndim)
    channels = channel_values(x, dim, groups * weight.shape[1])
    value = _affine(channels, weight.flatten(2), bias, groups, is_padded(node))
    return value.view(*[1] * dim, -1, *[1] * spatial)


def _linear(node: fx.Node, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    if not _is_complete(node, weight):
        return varying(x.ndim)
    channels = channel_values(x, -1, weight.shape[1])
    value = _affine(channels, weight[..., None], bias, 1, padded=False)
    return value.view(*[1] * (x.ndim - 1), -1)


def _scaled(x: Tensor, weight: Any, bias: Any) -> Tensor:
    if weight is not None:
        weight = abstract(weight).view(-1, *[1] * (x.ndim - 2))
        x = (x * weight).masked_fill(weight == 0, 0.0)
    return x if bias is None else x + abstract(bias).view(-1, *[1] * (x.ndim - 2))


def _batch_norm(
    node: fx.Node,
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Any, ...]:
    """With running statistics it is a pointwise operation; a weight of zero gives the bias."""
    mean, variance = (abstract(t).view(-1, *[1] * (x.ndim - 2)) for t in (mean, variance))
    return _scaled((x - mean) / (variance + eps).sqrt(), weight, bias), None, None


def _batch_norm_on_batch(node: fx.Node, x: Tensor, weight: Any, bias: Any, *_: Any) -> Any:
    """With the batch's statistics a constant channel gives the bias, and so does a weight of zero.

    A zero weight that training can change is passed as varying.
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    channels = channel_values(x, 1, shape_of(node.args[0])[1])
    centered = channels.masked_fill(~channels.isnan(), 0.0)
    if weight is not None:
        weight = abstract(weight)
        centered = centered.masked_fill(weight == 0, 0.0).masked_fill(weight.isinf(), VARYING)
    centered = centered.view(shape)
    if bias is not None:
        centered = centered + abstract(bias).view(shape)
    return centered, *[None] * 4


def _normalized(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A norm over channels: all channels vary if one does."""
    return varying(x.ndim), None, None


def _normalized_single(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return varying(x.ndim)


# ---------------------------------------------------------------------------------------------
# Pooling, padding and reductions
# ---------------------------------------------------------------------------------------------


def _pooling(spatial: int) -> Rule:
    """Pooling without padding by zeros: max pools pad by minus infinity."""
    return lambda node, x, *args, **kwargs: merged_places(x, spatial)


def _pooling_with_indices(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return merged_places(x, 2), None


def _average_pooling(spatial: int) -> Rule:
    def rule(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        padding = _argument(node, 3, "padding", 0)
        padded = any(padding) if isinstance(padding, Sequence) else bool(padding)
        counted = padded and _argument(node, 5, "count_include_pad", True)
        divided = _argument(node, 6, "divisor_override", None) is not None
        x = merged_places(x, spatial)
        return x.masked_fill(x != 0, VARYING) if counted or divided else x

    return rule


def _padded(
    node: fx.Node, x: Tensor, pad: Sequence[int], mode: Any = "constant", value: Any = None
) -> Any:
    if not any(pad):
        return x
    if len(pad) // 2 > x.ndim - 2:
        return NotImplemented
    x = merged_places(x, len(pad) // 2)
    return x.masked_fill(x != float(value or 0.0), VARYING) if mode == "constant" else x


def _constant_padded(node: fx.Node, x: Tensor, pad: Sequence[int], value: float = 0.0) -> Any:
    return _padded(node, x, pad, "constant", value)


def _reduction(node: fx.Node, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    """A mean, sum or maximum over dimensions, along which the abstract value is expanded.

    A sum over places or the batch, along which an abstract value has size 1, depends on their
    number, so it varies unless it is zero.
    """
    shape = shape_of(node.args[0])
    dims = range(x.ndim) if dims is None or dims == [] else [dim % x.ndim for dim in dims]
    full = [size if dim in dims else -1 for dim, size in enumerate(shape)]
    if node.target is aten.sum.dim_IntList and any(x.shape[dim] == 1 for dim in dims):
        x = x.masked_fill(x != 0, VARYING)
    return node.target(x.expand(full), list(dims), keepdim)  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------


def _reshaped(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return without_repeats(x.expand(shape_of(node.args[0])).reshape(shape_of(node)))


def _permuted(node: fx.Node, x: Tensor, *args: Any) -> Tensor:
    result: Tensor = node.target(x, *args)  # type: ignore[operator]
    return result


def _expanded(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.view(*[1] * (len(shape_of(node)) - x.ndim), *x.shape)


def _selected(node: fx.Node, x: Tensor, dim: int, index: int) -> Tensor:
    return x.select(dim, 0 if x.shape[dim] == 1 else index)


def _sliced(node: fx.Node, x: Tensor, dim: int = 0, *args: Any) -> Tensor:
    result: Tensor = x if x.shape[dim] == 1 else node.target(x, dim, *args)  # type: ignore[operator]
    return result


def _split(node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    dim = _argument(node, 2, "dim", 0)
    if x.shape[dim] == 1:
        return [x] * len(node.meta["val"])
    return node.target(x, *args, **kwargs)  # type: ignore[operator]


def _concatenated(node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    sizes = [shape_of(tensor)[dim] for tensor in node.args[0]]  # type: ignore[union-attr]
    dim %= len(shape_of(node))
    values = [abstract(tensor) for tensor in tensors]
    common = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    return torch.cat(
        [
            value.expand(*common[:dim], size, *common[dim + 1 :])
            for value, size in zip(values, sizes, strict=True)
        ],
        dim,
    )


def _item(node: fx.Node, values: Any, index: int) -> Any:
    return values[index] if isinstance(values, Sequence) else varying(len(shape_of(node)))


MIXING = {
    aten.layer_norm.default: _normalized_single,
    aten.group_norm.default: _normalized_single,
    aten.native_layer_norm.default: _normalized,
    aten.native_group_norm.default: _normalized,
}
"""Norms over channels, which mix them."""
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(KEEPING, _keep),
    aten._to_copy.default: _cast,
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiply),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    LINEAR: _linear,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    **dict.fromkeys(CENTERING_NORMS, _batch_norm_on_batch),
    **MIXING,
    **{op: _pooling(spatial) for spatial, ops in POOLING.items() for op in ops},
    aten.max_pool2d_with_indices.default: _pooling_with_indices,
    aten.avg_pool1d.default: _average_pooling(1),
    aten.avg_pool2d.default: _average_pooling(2),
    aten.avg_pool3d.default: _average_pooling(3),
    aten.pad.default: _padded,
    aten.constant_pad_nd.default: _constant_padded,
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RESHAPING, _reshaped),
    **dict.fromkeys(PERMUTING, _permuted),
    aten.expand.default: _expanded,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    **dict.fromkeys(SPLITTING, _split),
    aten.cat.default: _concatenated,
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _native_dropout,
    **dict.fromkeys((aten.bernoulli.p, aten.new_empty.default, aten.rand.default), _random),
    ITEM: _item,
}
"""The rule of each operation."""
