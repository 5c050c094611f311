"""Random graphs, in which values are joined, divided, added and read in several layouts at once."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import sparse

pytestmark = pytest.mark.usefixtures("native_kernels")
STEPS = 9
ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    functional.relu,
    functional.silu,
    functional.hardswish,
]
Step = Callable[[list[Tensor]], Tensor]


class RandomGraph(nn.Module):
    """Each step computes a value of one or two earlier ones; the last three are joined.

    Attributes:
        channels: Channels of each value.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self.convolutions = nn.ModuleList()
        self.channels = [16]
        self._steps = [self._step() for _ in range(STEPS)]
        self.last = nn.Conv2d(sum(self.channels[-3:]), 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self._steps:
            values.append(step(values))
        result: Tensor = self.last(torch.cat(values[-3:], 1))
        return result

    def _step(self) -> Step:
        first, other = (self._random.randrange(len(self.channels)) for _ in range(2))
        channels = self.channels[first]
        equal = self._random.choice(
            [index for index, number in enumerate(self.channels) if number == channels]
        )
        kind = self._random.choice(
            ["convolve", "add", "join", "divide", "activate", "convolve-add"]
        )
        if kind == "convolve":
            return self._convolution(first, self._random.choice([8, 16, 24]))
        if kind == "convolve-add":
            convolve = self._convolution(first, self.channels[other])
            return lambda values: functional.relu(convolve(values) + values[other])
        self.channels.append(
            {"join": channels + self.channels[other], "divide": channels // 2}.get(kind, channels)
        )
        half, activation = self._random.randrange(2), self._random.choice(ACTIVATIONS)
        steps: dict[str, Step] = {
            "add": lambda values: values[first] + values[equal],
            "join": lambda values: torch.cat([values[first], values[other]], 1),
            "divide": lambda values: values[first].chunk(2, 1)[half],
            "activate": lambda values: activation(values[first]),
        }
        return steps[kind]

    def _convolution(self, first: int, outputs: int) -> Step:
        size = self._random.choice([1, 1, 3])
        convolution = nn.Conv2d(self.channels[first], outputs, size, padding=size // 2)
        self.convolutions.append(convolution)
        self.channels.append(outputs)
        return lambda values: convolution(values[first])


@pytest.mark.parametrize(
    "seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.slow)], ids=["few", "many"]
)
@torch.no_grad()
def test_random_graphs_have_torchs_outputs(seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        model, size = RandomGraph(seed).eval(), [5, 12, 13, 20][seed % 4]
        images = torch.randn(2, 16, size, size)
        expected, outputs = model(images), sparse.compile(model, images)(images)
        error = float((outputs - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, f"seed {seed}"
