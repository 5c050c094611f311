"""Random convolutions, for tests of the native kernels."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from starfire_prune.sparse.ir import Convolution, Value
from starfire_prune.sparse.layout import Window

BLOCK_SIZES = {"ck": (1, 1), "4x1": (4, 1), "1x4": (1, 4), "4x4": (4, 4)}
seeds = st.integers(0, 2**16)


def value_of(tensor: Tensor) -> Value:
    return Value(*tensor.shape[1:])


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution and its input."""

    images: Tensor
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def expected(self) -> Tensor:
        images, weight, bias = (t.double() for t in (self.images, self.weight, self.bias))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return functional.conv2d(images, weight, bias, *settings).float()

    def window(self, output: Tensor) -> Window:
        size, (height, width) = self.weight.shape, self.images.shape[2:]
        below = self._end(0, output.shape[2]) - height
        right = self._end(1, output.shape[3]) - width
        after = (max(below, 0), max(right, 0))
        return Window((size[2], size[3]), self.stride, self.dilation, self.padding, after)

    def _end(self, axis: int, outputs: int) -> int:
        """Where the last window ends, in pixels of the image."""
        reach = (self.weight.shape[2 + axis] - 1) * self.dilation[axis]
        return (outputs - 1) * self.stride[axis] + reach + 1 - self.padding[axis]

    def op(self, source: Value, output: Value, window: Window, **options: Any) -> Convolution:
        return Convolution(
            source,
            output,
            weight=self.weight.double().numpy(),
            bias=self.bias.double().numpy(),
            groups=self.groups,
            window=window,
            **options,
        )


def masked(weight: Tensor, kind: str, density: float, generator: torch.Generator) -> Tensor:
    """A weight with the zeros of a pruning method: "ck", blocks such as "4x1", or "single" ones."""
    if kind == "single":
        return weight * (torch.rand(weight.shape, generator=generator) < density)
    outputs, inputs = BLOCK_SIZES[kind]
    shape = (-(-weight.shape[0] // outputs), -(-weight.shape[1] // inputs))
    mask = torch.rand(shape, generator=generator) < density
    mask = mask.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
    mask = mask[: weight.shape[0], : weight.shape[1]]
    return weight * mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Convolutions of any shape whose window fits the image."""
    size, stride, dilation = (draw(pairs) for _ in range(3))
    size = draw(st.sampled_from([size, (3, 3), (1, 1), (5, 5), (7, 7)]))
    padding = (draw(st.integers(0, size[0])), draw(st.integers(0, size[1])))
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    image = [draw(st.integers(low, low + 35)) for low in least]
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(outputs, inputs // groups, *size, generator=generator)
    kind = draw(st.sampled_from([*BLOCK_SIZES, "single"]))
    density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
    return Case(
        images=torch.randn(draw(st.integers(1, 3)), inputs, *image, generator=generator),
        weight=masked(weight, kind, density, generator),
        bias=torch.randn(outputs, generator=generator),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
