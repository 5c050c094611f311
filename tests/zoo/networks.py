"""Random small networks, whose layers use their weights in every way that models do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

__all__ = ["BLOCKS", "Case", "Network", "cases"]

WIDTH: Final = 6  # channels between the blocks
IMAGES: Final = (2, WIDTH, 5, 5)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT: every weight depends on all weights of its filter."""

    def forward(self, images: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return functional.conv2d(images, weight, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """A gain for each filter, which keeps zeros zero."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(1 + torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.weight * self.gain, self.bias, padding=self.padding)


class Mixed(nn.Linear):
    """A weight to which the identity is added."""

    def forward(self, features: Tensor) -> Tensor:
        weight = self.weight + torch.eye(*self.weight.shape)
        return functional.linear(features, weight, self.bias)


class Reading(nn.Module):
    """Reads a layer's weight without calling the layer, as attention with separate biases does."""

    def __init__(self, calls_too: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH)
        self.calls_too = calls_too

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.permute(0, 2, 3, 1)
        out = functional.linear(tokens, self.qkv.weight)
        if self.calls_too:
            out = out + self.qkv(tokens)
        return out.permute(0, 3, 1, 2)


class Sliced(nn.Module):
    """Reads parts of a convolution's weight, one for each half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images: Tensor) -> Tensor:
        half = WIDTH // 2
        one = functional.conv2d(images[:, :half], self.conv.weight[:, :half], self.conv.bias)
        return one + functional.conv2d(images[:, half:], self.conv.weight[:, half:])


class Tokens(nn.Module):
    """A layer on the last dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.layer(images.permute(0, 2, 3, 1))
        return tokens.permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        out: Tensor = mixed.transpose(1, 2).reshape(images.shape)
        return out


class Shared(nn.Module):
    """A layer that is used twice, under two names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.second = layer

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.second(functional.relu(self.first(images)))
        return out


class Tied(nn.Module):
    """Two layers of one parameter."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other
        self.other.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.other(functional.relu(self.one(images)))
        return out


class Unused(nn.Module):
    """A layer that no forward pass calls, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(WIDTH, WIDTH, 3)
        self.used = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.used(images)
        return out


class Caching(nn.Module):
    """Keeps what it has computed of its weight, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.cached: Tensor | None = None

    def train(self, mode: bool = True) -> Caching:
        self.cached = None
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return functional.conv2d(images, self.conv.weight * 2, padding=1)
        if self.cached is None:
            self.cached = self.conv.weight.detach() * 2
        return functional.conv2d(images, self.cached, padding=1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.lstm(images.flatten(2).transpose(1, 2))[0]
        return out.transpose(1, 2).reshape(images.shape)


class Experts(nn.Module):
    """Convolutions mixed for each image, whose weights are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = nn.Linear(WIDTH, 2)
        self.weight = nn.Parameter(torch.randn(2, WIDTH, WIDTH, 3, 3) / 8)

    def forward(self, images: Tensor) -> Tensor:
        shares = self.routing(images.mean((2, 3))).sigmoid().mean(0)
        weight = (shares[:, None, None, None, None] * self.weight).sum(0)
        return functional.conv2d(images, weight, padding=1)


def _conv(size: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, **options)


def _frozen() -> nn.Module:
    return nn.Sequential(_conv().requires_grad_(False), nn.ReLU(), _conv(1))


BLOCKS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "spatial": _conv,
    "pointwise": lambda: _conv(1),
    "strided": lambda: nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=2, dilation=2),
    "reflecting": lambda: _conv(padding_mode="reflect"),
    "grouped": lambda: _conv(groups=2),
    "depthwise": lambda: _conv(groups=WIDTH),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
    "linear": lambda: Tokens(nn.Linear(WIDTH, WIDTH)),
    "standardised": lambda: Standardised(WIDTH, WIDTH, 3, padding=1),
    "scaled": lambda: Scaled(WIDTH, WIDTH, 3, padding=1),
    "mixed": lambda: Tokens(Mixed(WIDTH, WIDTH)),
    "weight norm": lambda: parametrizations.weight_norm(_conv()),
    "old weight norm": lambda: weight_norm(_conv()),
    "spectral norm": lambda: nn.utils.spectral_norm(_conv()),
    "new spectral norm": lambda: parametrizations.spectral_norm(_conv()),
    "shared": lambda: Shared(_conv()),
    "tied": lambda: Tied(_conv(), _conv()),
    "tied linear": lambda: Tokens(Tied(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))),
    "frozen": _frozen,
    "lazy": lambda: nn.LazyConv2d(WIDTH, 3, padding=1),
    "attention": Attention,
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "reading": Reading,
    "reading and calling": lambda: Reading(calls_too=True),
    "sliced": Sliced,
    "caching": Caching,
    "unused": Unused,
    "recurrent": Recurrent,
    "experts": Experts,
    "no gradient": lambda: nn.Sequential(_conv(), nn.ReLU(inplace=True)),
    "checkpointed": lambda: Checkpointed(_conv()),
}


class Checkpointed(nn.Module):
    """Computes its layer again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        out: Tensor = checkpoint(self.layer, images, use_reentrant=False)
        return out


class Network(nn.Module):
    """Blocks one after another, and a classifier."""

    def __init__(self, blocks: tuple[str, ...], seed: int, residual: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([BLOCKS[name]() for name in blocks])
        self.head = nn.Linear(WIDTH, 3)
        self.residual = residual

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            out = functional.leaky_relu(block(images))
            images = images + out if self.residual and out.shape == images.shape else out
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the settings of its pruning, and how it is trained.

    Attributes:
        blocks: Names of its blocks.
        seed: Seed of its weights.
        residual: Whether blocks are added to their inputs.
        first_forward: Whether a forward pass comes before the pruner, as lazy modules require.
        pruning: The settings.
        updates_per_epoch: Updates of an epoch.
        optimizer: `sgd` or `adamw`.
        resumed_at: The update before which the state is loaded into a new model, if any.
        with_example: Whether the pruner gets an example input.
    """

    blocks: tuple[str, ...]
    seed: int
    residual: bool
    first_forward: bool
    pruning: Mapping[str, Any]
    updates_per_epoch: int
    optimizer: str
    resumed_at: int | None
    with_example: bool

    def network(self) -> Network:
        """The network, with the same weights each time."""
        network = Network(self.blocks, self.seed, self.residual)
        if self.first_forward:
            network.eval()(torch.ones(IMAGES))
        return network.train()

    def images(self, seed: int) -> Tensor:
        """A batch."""
        return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed))


_AMOUNTS = st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.8, 0.9])
_SIZES = st.sampled_from([[1, 1], [2, 1], [1, 2], [3, 2], [4, 4]])


@st.composite
def _method(draw: st.DrawFn) -> dict[str, Any]:
    """A method for convolutions with some of its options."""
    name = draw(st.sampled_from(["ck", "ck", "window", "intra", "inter", "magnitude", "random"]))
    options: dict[str, st.SearchStrategy[Any]] = {
        "ck": st.fixed_dictionaries(
            {}, optional={"block_size": _SIZES, "scope": st.sampled_from(["channel", "layer"])}
        ),
        "window": st.fixed_dictionaries(
            {},
            optional={
                "exact_layer_sparsity": st.booleans(),
                "pointwise": st.sampled_from(["ck", "none"]),
            },
        ),
        "intra": st.fixed_dictionaries({}, optional={"window_fraction": st.floats(0, 1)}),
        "inter": st.fixed_dictionaries({}, optional={"ck_fraction_of_era": st.floats(0.1, 0.9)}),
    }
    return {"method": name, **draw(options.get(name, st.just({})))}


_FC = st.one_of(
    st.just("none"),
    st.just({"method": "fine"}),
    st.builds(lambda amount: {"method": "fine", "amount": amount}, _AMOUNTS),
    st.builds(lambda size: {"method": "block", "block_size": size}, _SIZES),
    st.just({"method": "magnitude"}),
)


@st.composite
def cases(draw: st.DrawFn, names: Sequence[str] = tuple(BLOCKS)) -> Case:
    """A case of one to four blocks of these names."""
    blocks = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
    pruning: dict[str, Any] = {
        **draw(_method()),
        "amount": draw(_AMOUNTS),
        "era": draw(st.sampled_from([[0, 1], [1, 2], [1, 3]])),
        "schedule": draw(st.sampled_from(["linear", "cubic"])),
        "resolution": draw(st.sampled_from([0.0, 0.0025, 0.2])),
        "fc": draw(_FC),
    }
    if draw(st.booleans()):
        place = draw(st.integers(0, len(blocks) - 1))
        override = {"layers": f"blocks.{place}*", "amount": draw(_AMOUNTS)}
        pruning["overrides"] = [override | draw(st.sampled_from([{}, {"method": "magnitude"}]))]
    key = draw(st.sampled_from(["", "", "include", "exclude"]))
    if key:
        pruning[key] = ["blocks.*"] if key == "include" else ["head"]
    return Case(
        blocks=tuple(blocks),
        seed=draw(st.integers(0, 3)),
        residual=draw(st.booleans()),
        first_forward=draw(st.booleans()),
        pruning=pruning,
        updates_per_epoch=draw(st.integers(1, 3)),
        optimizer=draw(st.sampled_from(["sgd", "adamw"])),
        resumed_at=draw(st.one_of(st.none(), st.integers(1, 6))),
        with_example=draw(st.booleans()),
    )
