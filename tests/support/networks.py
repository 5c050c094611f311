"""A small network, its data and its training step, for the tests of the engine."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import Pruner

LAYERS = ("stem", "body", "point", "head")


class SmallNet(nn.Module):
    """Three convolutions (3x3, 3x3, 1x1) with batch norms, and a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(8)
            self.body = nn.Conv2d(8, 12, 3, padding=1, stride=2)
            self.bn2 = nn.BatchNorm2d(12)
            self.point = nn.Conv2d(12, 8, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.bn1(self.stem(images)))
        features = functional.relu(self.bn2(self.body(features)))
        features = functional.relu(self.bn3(self.point(features)))
        output: Tensor = self.head(features.mean((2, 3)))
        return output


class Detector(nn.Module):
    """A backbone, and a head whose operations depend on how many of its scores are high."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Conv2d(8, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.backbone(images)).flatten()
        found: Tensor = scores[scores > 0]
        return found.sort().values if found.numel() > 2 else found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def one_epoch(model: nn.Module, updates: int, **settings: object) -> Pruner:
    """A pruner whose era is the first epoch, of so many updates."""
    return Pruner(model, {"amount": 0.6, "era": [0, 1], **settings}, updates_per_epoch=updates)


def batch(index: int) -> tuple[Tensor, Tensor]:
    """The same images and labels for the same index, at every call."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (8,), generator=generator)


def backward(model: nn.Module, index: int) -> None:
    images, labels = batch(index)
    functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    """An update of the optimizer, with the batch of that index."""
    optimizer.zero_grad()
    backward(model, index)
    optimizer.step()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner,
    indices: Iterator[int] | range,
) -> None:
    """Updates with the batches of these indices, each followed by the pruner's step."""
    for index in indices:
        train_step(model, optimizer, index)
        pruner.step()


def raw_weight(module: nn.Module) -> Tensor:
    """The parameter itself, without the mask."""
    weight: Any = getattr(module, "weight_orig", module.weight)
    return weight.detach().clone()  # type: ignore[no-any-return]


def raw_weights(model: nn.Module, names: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    return {name: raw_weight(model.get_submodule(name)) for name in names}


@torch.no_grad()
def drift(model: nn.Module, seed: int) -> None:
    """Move all parameters at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the keys, their order and the tensors are the same, bit for bit."""
    return list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))
