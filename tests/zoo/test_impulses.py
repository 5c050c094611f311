"""The instrument itself: it sees what layers compute, and who reads their weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import ck_structured
from tests.zoo.impulses import UnmeasurableError, foreign_readers, response
from tests.zoo.networks import Attention, Caching, Reading, Sliced, Standardised

LAYERS: dict[str, Callable[[], Any]] = {
    "3x3": lambda: nn.Conv2d(4, 6, 3),
    "padded": lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2)),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "strided, dilated": lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=3, padding=3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "1-d": lambda: nn.Conv1d(4, 6, 3),
    "3-d": lambda: nn.Conv3d(2, 3, (1, 3, 2)),
    "linear": lambda: nn.Linear(7, 5),
}


class Rectified(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


@pytest.mark.parametrize("name", LAYERS)
def test_the_weights_that_act_are_those_that_are_not_zero(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    kept = torch.rand(layer.weight.shape) < 0.5
    with torch.no_grad():
        layer.weight.mul_(kept)
    answer = response(layer)
    assert torch.equal(answer.acts, kept)
    assert answer.acting(~kept) == 0
    assert answer.zeros == int((~kept).sum())


def test_some_channels_can_be_measured():
    layer = nn.Conv2d(16, 3, 3)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    answer = response(layer, most_channels=5)
    assert answer.acts.shape == (3, 5, 3, 3)
    assert torch.equal(answer.acts, layer.weight[:, answer.channels] != 0)


def test_within_the_era_the_hook_masks():
    layer = ck_structured(nn.Conv2d(8, 8, 3), amount=0.5)
    assert torch.equal(response(layer).acts, layer.get_buffer("weight_mask"))


def test_a_relu_within_the_layer_hides_nothing():
    layer = Rectified(4, 6, 3, bias=False)
    assert response(layer).acts.all()


def test_pruned_weights_of_a_layer_that_standardises_act():
    layer = ck_structured(Standardised(8, 8, 3), amount=0.5)
    assert response(layer).acting(~layer.get_buffer("weight_mask")) == 8 * 4 * 9


def test_another_kind_of_layer_is_not_measured():
    with pytest.raises(UnmeasurableError, match="transposed"):
        response(nn.ConvTranspose2d(4, 4, 3))


READERS = {
    "Reading": (Reading, "0.qkv"),
    "Reading too": (lambda: Reading(calls_too=True), "0.qkv"),
    "Sliced": (Sliced, "0.conv"),
    "Caching": (Caching, "0.conv"),
    "Attention": (Attention, "0.attention.out_proj"),
}


@pytest.mark.parametrize(("build", "name"), READERS.values(), ids=READERS)
def test_a_weight_that_is_read_without_a_call_is_found(build, name):
    model = nn.Sequential(build(), nn.Conv2d(6, 6, 3))
    assert foreign_readers(model, (torch.randn(2, 6, 5, 5),), [name, "1"]) == [name]


def test_calls_are_no_foreign_readers():
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert foreign_readers(model, (torch.randn(2, 6, 5, 5),), ["0", "2"]) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
