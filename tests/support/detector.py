"""A small detector of the parts that YOLO networks have, as a feature pyramid of two sizes."""

import torch
from torch import Tensor, nn


class Unit(nn.Sequential):
    """A convolution, a batch norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    """Two 3x3 convolutions whose result is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = Unit(width, width // 2, 3), Unit(width // 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(self.narrow(x))
        return x + y


class Split(nn.Module):
    """Halves of channels, one of which passes through bottlenecks; all results are joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = Unit(inputs, 2 * half), Unit((2 + depth) * half, outputs)
        self.blocks = nn.ModuleList([Bottleneck(half) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class PoolingChain(nn.Module):
    """Maxima of growing windows, one computed of the other, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = Unit(inputs, inputs // 2), Unit(2 * inputs, outputs)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class SmallDetector(nn.Module):
    """Features of images at a half and a quarter of their size, `(N, 8, ...)` and `(N, 32, ...)`.

    Height and width must be multiples of 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Unit(3, 16, 3, 2), Split(16, 16))
        self.deep = nn.Sequential(Unit(16, 32, 3, 2), PoolingChain(32, 32))
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Sequential(Split(48, 16, 2), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.deep(x)
        return self.head(torch.cat([self.enlarge(y), x], 1)), y
