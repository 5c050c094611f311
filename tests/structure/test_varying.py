"""What must count as varying: random numbers, changed buffers and trained vectors."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from starfire_prune.structure.analysis import ChannelAnalysis
from tests.structure.probes import Between, analyse, dead_then_norm, zeros_of
from tests.support.sparse_networks import images

RANDOM: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout of a parameter": lambda m, x: 0 * x + functional.dropout(m.alpha, 0.5, m.training),
    "like a parameter": lambda m, x: 0 * x + torch.rand_like(m.alpha),
    "drawn by a buffer": lambda m, x: 0 * x + torch.bernoulli(m.n),
}


@pytest.mark.parametrize("expression", RANDOM.values(), ids=RANDOM)
def test_random_numbers_vary_and_are_not_drawn(expression):
    model = Between(expression).train()
    analysis = ChannelAnalysis(model, images(size=8))
    before = torch.get_rng_state()
    zeros = analysis.zero_inputs()["reader"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not zeros.any()


def count(module: Any, x: Tensor) -> Tensor:
    module.n.add_(1)
    output: Tensor = 0 * x + module.n
    return output


def test_buffers_that_the_forward_pass_changes_vary():
    assert analyse(Between(lambda m, x: 0 * x + m.n))["reader"].inputs.tolist() == [0.5, 0.5]
    assert analyse(Between(count))["reader"].inputs.isnan().all()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_running_means_that_more_than_a_norm_reads_vary_while_training(elsewhere):
    def normalized(module: Any, x: Tensor) -> Tensor:
        output: Tensor = 0 * module.norm(x)
        return output + module.norm.running_mean.view(1, -1, 1, 1) if elsewhere else output

    model = Between(normalized)
    model.norm = nn.BatchNorm2d(2)
    assert zeros_of(model) == [not elsewhere] * 2


TRAINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scale": lambda m, x: x * m.alpha,
    "scale, reshaped": lambda m, x: x * m.alpha.view(1, -1, 1, 1),
    "shift": lambda m, x: functional.gelu(0 * x + m.alpha),
    "weight of a norm": lambda m, x: functional.batch_norm(
        x, None, None, m.alpha.view(-1), training=True
    ),
    "bias of a norm": lambda m, x: functional.batch_norm(
        0 * x, None, None, None, m.alpha.view(-1), training=True
    ),
}


@pytest.mark.parametrize("expression", TRAINED.values(), ids=TRAINED)
def test_zeros_of_trained_vectors_do_not_count(expression):
    model = Between(expression)
    with torch.no_grad():
        model.alpha.fill_(0.0)
    assert not zeros_of(model)[1]
    assert analyse(model)["reader"].zero_inputs.all()
    model.alpha.requires_grad_(False)
    assert zeros_of(model) == [True, True]


def test_the_zero_bias_of_a_trained_convolution_does_not_count():
    model = Between(lambda m, x: x)
    model.source.bias = nn.Parameter(torch.zeros(2))
    assert zeros_of(model) == [False, False]
    model.source.bias.requires_grad_(False)
    assert zeros_of(model) == [True, False]


def test_a_norm_subtracts_the_zero_bias_of_a_dead_channel():
    model = dead_then_norm(beta=-1.0)
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    assert zeros_of(model, "3") == [True, False]


def test_zeros_under_masks_are_zeros():
    model = Between(lambda m, x: x * m.alpha)
    mask = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    prune.custom_from_mask(model, "alpha", mask)  # type: ignore[no-untyped-call]
    assert zeros_of(model) == [True, True]


def test_weights_from_the_input_vary():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.mean(1).flatten(1)
            output: Tensor = self.reader(functional.linear(0 * rows, rows[:1].expand(4, -1)))
            return output

    assert analyse(Computed())["reader"].inputs.isnan().all()


@pytest.mark.slow
def test_conditional_convolutions_vary():
    model = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10)
    assert analyse(model, 32)["classifier"].inputs.isnan().all()
