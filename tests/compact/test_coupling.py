"""Which operations let the channels of the layer before be cut out, and which need them all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune.compact.coupling import required_outputs
from starfire_prune.structure.analysis import ChannelAnalysis
from tests.support.sparse_networks import images

NUMBERS = [1.0, 2.0, 3.0]


class Between(nn.Module):
    """An operation between a convolution of three channels and a reader."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 3, 1)
        self.operation = operation
        features = operation(torch.zeros(2, 3, 8, 8)).shape
        linear = len(features) == 2
        self.reader = nn.Linear(features[1], 4) if linear else nn.Conv2d(features[1], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.operation(self.source(x)))
        return output


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": functional.relu,
    "batch norm": nn.BatchNorm2d(3),
    "padding": lambda x: functional.pad(x, (1, 1, 1, 1)),
    "pooling": lambda x: functional.avg_pool2d(x, 2),
    "flattening": lambda x: x.flatten(1),
    "pooling and flattening": lambda x: functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean over the image": lambda x: x.mean((2, 3)),
    "addition": lambda x: x + functional.relu(x),
    "a number": lambda x: 2 * x + 1,
    "a gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "concatenation": lambda x: torch.cat([x, x.relu()], 1),
    "permuting forth and back": lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
}
NEEDED: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: functional.layer_norm(x, x.shape[1:]),
    "group norm": lambda x: functional.group_norm(x, 1),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "mean over all": lambda x: x * x.mean(),
    "shuffling": lambda x: x.view(2, 1, 3, 8, 8).transpose(1, 2).flatten(1, 2),
    "splitting": lambda x: torch.split(x, [1, 2], 1)[1],
    "padding by channels": lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1)),
    "slicing": lambda x: x[:, 1:],
    "numbers of its own for each channel": lambda x: x * torch.arange(3.0).view(1, 3, 1, 1),
    "a constant of its own for each channel": lambda x: x * torch.tensor(NUMBERS).view(3, 1, 1),
    "joining a constant": lambda x: torch.cat([x, torch.ones(2, 1, 8, 8)], 1),
    "statistics without a batch norm": lambda x: functional.batch_norm(
        x, torch.zeros(3), torch.ones(3)
    ),
    "a gate of one channel": lambda x: x * x.amax(1, keepdim=True),
    "transposing": lambda x: x.transpose(1, 2),
    "an unknown operation": lambda x: torch.cumsum(x, 1),
    "a weight without a layer": lambda x: functional.conv2d(x, torch.ones(3, 3, 1, 1)),
}


def required(model: nn.Module) -> dict[str, str]:
    return required_outputs(ChannelAnalysis(model, images(size=8)).graph)


@pytest.mark.parametrize("operation", FREE.values(), ids=FREE)
def test_operations_on_each_channel_pin_nothing(operation):
    assert set(required(Between(operation))) == {"reader"}


@pytest.mark.parametrize("operation", NEEDED.values(), ids=NEEDED)
def test_operations_that_need_all_channels_pin_the_layer_before(operation):
    assert "all its channels are needed" in required(Between(operation))["source"]


def test_outputs_of_the_model_must_be_kept():
    assert required(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())) == {
        "0": "its channels are the model's output"
    }


class Network(nn.Module):
    """Two layers, put together by a function of both and the model's input."""

    def __init__(self, function: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.source, self.reader = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.source, self.reader, x)


INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiplied": lambda y, x: y * x,
    "multiplied after an operation": lambda y, x: y * torch.sigmoid(x),
    "added": lambda y, x: x + y,
    "joined, then reduced": lambda y, x: torch.cat([x, y], 1).view(2, 2, 3, 8, 8).sum(1),
}


@pytest.mark.parametrize("partner", INPUTS.values(), ids=INPUTS)
def test_the_models_input_as_a_partner_makes_all_channels_required(partner):
    model = Network(lambda source, reader, x: reader(partner(source(x).relu(), x)))
    assert "all its channels are needed" in required(model)["source"]


def test_the_joined_input_as_a_partner_makes_all_channels_required():
    def forward(source: nn.Module, reader: nn.Module, x: Tensor) -> Tensor:
        return reader(source(x) * torch.cat([x[:, :1], source(x)[:, 1:]], 1))  # type: ignore[no-any-return]

    assert "aten.mul" in required(Network(forward))["source"]


def test_a_layer_whose_weight_is_read_elsewhere_needs_all_channels():
    def forward(source: nn.Module, reader: nn.Module, x: Tensor) -> Tensor:
        return reader(source(x)) * reader.get_parameter("weight").sum()  # type: ignore[no-any-return]

    assert required(Network(forward)) == {
        "source": "all its channels are needed by aten.conv2d.default in reader",
        "reader": "its weight is also read elsewhere",
    }
