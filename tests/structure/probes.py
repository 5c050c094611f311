"""Small networks around one operation, and what the analysis finds in them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.channels import ConstantChannels
from tests.support.sparse_networks import NARROW, images, named

NAN = math.nan


class Probe(nn.Module):
    """An operation between a layer with two dead channels, constantly 2 and 0, and a reader."""

    def __init__(self, operation: Callable[[Tensor], Tensor], size: int = 8) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 3, 1)
        self.operation = operation
        features = operation(torch.zeros(2, 3, size, size)).shape
        self.reader = (
            nn.Linear(features[-1], 4) if len(features) == 2 else nn.Conv2d(features[1], 4, 1)
        )
        with torch.no_grad():
            self.source.weight[:2] = 0
            self.source.bias.copy_(torch.tensor([2.0, 0.0, 1.0]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.operation(self.source(x)))
        return output


def analyse(model: nn.Module, size: int = 8) -> ConstantChannels:
    return ChannelAnalysis(model, images(size=size)).run()


def assert_constants(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, nan_ok=True)


NETWORKS = {
    **NARROW,
    "efficientnet": named("efficientnet_lite0"),
    "se-resnet": named("seresnet50", channels=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
    "convnext": named("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}


def some(*names: str, slow: Iterable[str]) -> list[Any]:
    """Names of networks, those among `slow` that are not given before only as slow tests."""
    others = [name for name in slow if name not in names]
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def dead_then_norm(beta: float, running_mean: float = 0.0) -> nn.Sequential:
    """A dead channel, constantly 1, through a batch norm and a ReLU into a convolution."""
    conv, norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.bias.fill_(1.0)  # type: ignore[union-attr]
        norm.bias.fill_(beta)
        norm.running_mean.fill_(running_mean)  # type: ignore[union-attr]
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(2, 4, 1))


class Between(nn.Module):
    """An expression of a dead channel of zeros and a varying one, a parameter and a buffer."""

    def __init__(self, expression: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 2, 1, bias=False)
        self.reader = nn.Conv2d(2, 4, 1)
        self.expression = expression
        self.alpha = nn.Parameter(torch.full((2, 1, 1), 0.5))
        self.register_buffer("n", torch.full((2, 1, 1), 0.5))
        with torch.no_grad():
            self.source.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.expression(self, self.source(x)))
        return output


def zeros_of(model: nn.Module, layer: str = "reader", size: int = 8) -> list[bool]:
    zeros: list[bool] = ChannelAnalysis(model, images(size=size)).zero_inputs()[layer].tolist()
    return zeros
