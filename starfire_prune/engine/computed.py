"""Whether pruned weights are zeros of what a layer computes, measured where it isn't evident."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import TorchFunctionMode

from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import copied_module, layer_weight
from starfire_prune.utils.text import first_line

__all__ = ["check_computed", "has_plain_forward", "kept_random_state", "zeros_problem"]

_PLAIN: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PRODUCTS: Final = frozenset(
    [
        *("conv1d", "conv2d", "conv3d", "convolution", "linear", "bilinear"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"),
    ]
)
_TOLERANCE: Final = 1e-4  # of the largest response; fast convolutions round what should be zero


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a layer computes its output by PyTorch's own forward, from the weight as it is."""
    kind = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    cls: Any = type(module)
    return (
        kind is not None
        and cls.forward is kind.forward
        and getattr(cls, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        and cls.__call__ is nn.Module.__call__
        and cls.__getattribute__ is object.__getattribute__
        and cls.__getattr__ is nn.Module.__getattr__
        and inspect.getattr_static(cls, "weight", None) is None
        and not vars(module).keys() & {"forward", "_conv_forward"}
        and not any(map(_may_compute, module._forward_pre_hooks.values()))
    )


def zeros_problem(module: nn.Module) -> str | None:
    """Why zeros of a layer's weight are not zeros of what the layer computes, or None.

    A layer with PyTorch's own forward needs no measurement. A copy of any other layer runs on
    impulses, with two weights whose zeros complement each other: wherever one responds, the other
    must not. The layer and the state of the random generators are not changed.

    Returns:
        The predicate of a sentence about the layer.

    Example:
        >>> class Centred(nn.Linear):
        ...     def forward(self, input):
        ...         return nn.functional.linear(input, self.weight - self.weight.mean())
        >>> zeros_problem(nn.Linear(8, 4)), zeros_problem(Centred(8, 4))
        (None, 'computes other values from its weight, so that pruned weights are not zero')
    """
    if has_plain_forward(module):
        return None
    try:
        with torch.no_grad(), kept_random_state(module):
            holds = _zeros_hold(_with_other_values(module))
    except Exception as error:  # of any type: it comes from the layer's own code
        return f"has a forward that can't be measured on its own ({first_line(error)})"
    if holds:
        return None
    return "computes other values from its weight, so that pruned weights are not zero"


def check_computed(modules: Mapping[str, nn.Module]) -> None:
    """Raise PruningError, with the layer, if it computes other values from its weight."""
    for name, module in modules.items():
        problem = zeros_problem(module)
        if problem is not None:
            raise PruningError(f"layer {name} ({type(module).__name__}) {problem}")


@contextmanager
def kept_random_state(module: nn.Module) -> Iterator[None]:
    """Restore the random generators of the CPU and of a module's devices at the end."""
    devices = {weight.device for weight in module.parameters()}
    kinds = {device.type for device in devices} - {"cpu", "meta"}
    if not kinds:
        with torch.random.fork_rng(devices=()):
            yield
        return
    (kind,) = kinds
    with torch.random.fork_rng(
        [device for device in devices if device.type == kind], device_type=kind
    ):
        yield


def _may_compute(hook: Callable[..., object]) -> bool:
    """Whether a hook before the forward pass may compute the weight."""
    return not isinstance(hook, BasePruningMethod) and not getattr(hook, "only_observes", False)


def _zeros_hold(layer: nn.Module) -> bool:
    """Whether complementary zeros of the weight give complementary responses to impulses."""
    weight = layer_weight(layer)
    values, kept = _test_values(weight)
    inputs = _impulses(layer).to(weight.device, weight.dtype)
    first = _response(layer, values * kept, inputs)
    second = _response(layer, values * ~kept, inputs)
    largest = max(float(first.max()), float(second.max()))
    tolerance = max(_TOLERANCE, 8 * torch.finfo(weight.dtype).eps) * largest
    if not largest > 0:
        return False  # the weight has no effect
    if not bool(((first > tolerance) & (second > tolerance)).any()):
        return True
    return all(_convolves_with(layer, values, mask, inputs) for mask in (kept, ~kept))


def _with_other_values(module: nn.Module) -> nn.Module:
    """A copy of a layer in eval mode whose other parameters are not at zero, where some begin."""
    layer = copied_module(module).eval()
    layer._forward_hooks.clear()  # what observes or changes the output
    if layer_weight(layer).is_meta:
        layer = layer.to_empty(device="cpu")
        for buffer in layer.buffers():
            buffer.fill_(1)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    mask = layer._buffers.get("weight_mask")
    if mask is not None:
        mask.fill_(1)
    return layer


def _test_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values for a weight, none near zero and their mean neither, and a mask of half of them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(weight.shape, generator=generator) + 0.5
    values[torch.rand(weight.shape, generator=generator) < 0.25] *= -1
    kept = torch.rand(weight.shape, generator=generator) < 0.5
    return values.to(weight.device, weight.dtype), kept.to(weight.device)


def _impulses(layer: nn.Module) -> Tensor:
    """A zero input, and inputs that are one at a single place, in some channels and places."""
    size: list[int] = []
    if isinstance(layer, _ConvNd):
        channels = layer.in_channels
        extents = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        size = [2 * dilation * (kernel - 1) + stride + 2 for kernel, stride, dilation in extents]
    else:
        channels = layer_weight(layer).shape[1]
    chosen = torch.linspace(0, channels - 1, min(channels, 4)).long().tolist()
    places = [[side // 2 + shift for side in size] for shift in (0, 1)[: 1 + bool(size)]]
    inputs = torch.zeros(1 + len(chosen) * len(places), channels, *size)
    for row, (channel, place) in enumerate(((c, p) for c in chosen for p in places), start=1):
        inputs[(row, channel, *place)] = 1.0
    return inputs


def _response(layer: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """The magnitudes by which the output differs from that of a zero input."""
    layer_weight(layer).copy_(weight)
    output: Tensor = layer(inputs)
    return (output[1:] - output[:1]).abs().double()


def _convolves_with(layer: nn.Module, values: Tensor, kept: Tensor, inputs: Tensor) -> bool:
    """Whether the layer's only product has the zeros of its weight, whatever follows it."""
    layer_weight(layer).copy_(values * kept)
    with _Products() as products:
        layer(inputs)
    if len(products.weights) != 1:
        return False
    used = products.weights[0]
    return (
        isinstance(used, Tensor)
        and used.shape == kept.shape
        and not bool(used[~kept].any())
        and bool(used[kept].any())
    )


class _Products(TorchFunctionMode):
    """Collects the second factors of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[object] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _PRODUCTS:
            self.weights.append(kwargs.get("weight", args[1] if len(args) > 1 else None))
        return func(*args, **kwargs)
