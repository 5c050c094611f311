"""The rules of constant channels: golden constants after each operation."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune.structure import rules
from tests.structure.probes import (
    NAN,
    Probe,
    analyse,
    assert_constants,
)


def weight_of(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# What the reader finds in place of the constants 2, 0 and a varying channel
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "relu": (functional.relu, [2, 0, NAN]),
    "negative relu": (lambda x: functional.relu(-x), [0, 0, NAN]),
    "relu6": (lambda x: functional.relu6(5 * x), [6, 0, NAN]),
    "silu": (functional.silu, [2 / (1 + math.exp(-2)), 0, NAN]),
    "gelu": (functional.gelu, [1.9544997, 0, NAN]),
    "hardswish": (functional.hardswish, [5 / 3, 0, NAN]),
    "sigmoid": (torch.sigmoid, [1 / (1 + math.exp(-2)), 0.5, NAN]),
    "in place": (lambda x: (x + 1).relu_().mul_(2), [6, 2, NAN]),
    "shifted and scaled": (lambda x: 3 * x - 1, [5, -1, NAN]),
    "added constants": (lambda x: x + x.flip(1)[:, [1, 1, 1]] * 0 + x, [4, 0, NAN]),
    "added to a varying one": (lambda x: x + x[:, 2:], [NAN, NAN, NAN]),
    "zero times a varying one": (lambda x: x * x[:, 2:], [NAN, 0, NAN]),
    "a gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), [1.7615942, 0, NAN]),
    "max pool, padded": (lambda x: functional.max_pool2d(x, 3, 2, 1), [2, 0, NAN]),
    "average pool": (lambda x: functional.avg_pool2d(x, 2), [2, 0, NAN]),
    "average pool, padded": (lambda x: functional.avg_pool2d(x, 3, 2, 1), [NAN, 0, NAN]),
    "average pool, padding not counted": (
        lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        [2, 0, NAN],
    ),
    "average pool, ceil mode": (
        lambda x: functional.avg_pool2d(x, 3, 2, ceil_mode=True),
        [2, 0, NAN],
    ),
    "average pool, another divisor": (
        lambda x: functional.avg_pool2d(x, 2, divisor_override=3),
        [NAN, 0, NAN],
    ),
    "adaptive average pool": (lambda x: functional.adaptive_avg_pool2d(x, 3), [2, 0, NAN]),
    "padded by zeros": (lambda x: functional.pad(x, (1, 1, 1, 1)), [NAN, 0, NAN]),
    "padded by two": (lambda x: functional.pad(x, (1, 1, 1, 1), value=2.0), [2, NAN, NAN]),
    "padded by reflection": (lambda x: functional.pad(x, (1, 1, 1, 1), "reflect"), [2, 0, NAN]),
    "upsampled": (lambda x: functional.interpolate(x, scale_factor=2), [2, 0, NAN]),
    "flattened": (lambda x: functional.max_pool2d(x, 4).flatten(1), [2] * 4 + [0] * 4 + [NAN] * 4),
    "mean over the image": (lambda x: x.mean((2, 3)), [2, 0, NAN]),
    "sum over the image": (lambda x: x.sum((2, 3)), [NAN, 0, NAN]),
    "sum over the batch": (lambda x: x.sum(0, keepdim=True), [NAN, 0, NAN]),
    "sum over constant channels": (lambda x: x[:, :2].sum(1, keepdim=True), [2]),
    "mean over channels": (lambda x: x.mean(1, keepdim=True), [NAN]),
    "mean over constant channels": (lambda x: x[:, :2].mean(1, keepdim=True), [1]),
    "concatenated": (lambda x: torch.cat([x, 1 - x], 1), [2, 0, NAN, -1, 1, NAN]),
    "permuted": (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), [2, 0, NAN]),
    "split": (lambda x: torch.split(x, [1, 2], 1)[1], [0, NAN]),
    "chunks": (lambda x: x.chunk(3, 1)[0], [2]),
    "shuffled by reshaping": (
        lambda x: torch.cat([x, 3 + x], 1).view(-1, 2, 3, 8, 8).transpose(1, 2).flatten(1, 2),
        [2, 5, 0, 3, NAN, NAN],
    ),
    "dropout": (lambda x: functional.dropout(x, 0.5, training=False), [2, 0, NAN]),
    "layer norm": (lambda x: functional.layer_norm(x, x.shape[1:]), [NAN, NAN, NAN]),
    "group norm": (lambda x: functional.group_norm(x, 1), [NAN, NAN, NAN]),
    "batch norm": (
        lambda x: functional.batch_norm(
            x, torch.ones(3), torch.full((3,), 4.0), torch.ones(3), torch.full((3,), 3.0), eps=0.0
        ),
        [3.5, 2.5, NAN],
    ),
    "batch norm of weight zero": (
        lambda x: functional.batch_norm(
            x, torch.zeros(3), torch.ones(3), torch.zeros(3), torch.arange(3.0)
        ),
        [0, 1, 2],
    ),
    "convolution": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(1, 1, 0)),
        [18],
    ),
    "padded convolution": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(1, 1, 0), padding=1),
        [NAN],
    ),
    "padded convolution of zeros": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(0, 1, 0), padding=1),
        [0],
    ),
    "convolution, same padding": (
        lambda x: functional.conv2d(x, torch.ones(3, 1, 3, 3), padding="same", groups=3),
        [NAN, 0, NAN],
    ),
    "depthwise convolution": (
        lambda x: functional.conv2d(x, torch.ones(3, 1, 2, 2), torch.ones(3), groups=3),
        [9, 1, NAN],
    ),
    "known weights": (lambda x: x * torch.arange(3.0).view(1, 3, 1, 1).exp(), [2, 0, NAN]),
    "not finite": (lambda x: 1 / x, [0.5, NAN, NAN]),
    "times infinity": (lambda x: x * torch.tensor(math.inf), [NAN, NAN, NAN]),
    "times no number": (lambda x: x * torch.tensor(NAN), [NAN, NAN, NAN]),
    "a convolution by infinity": (
        lambda x: functional.conv2d(x, torch.full((1, 3, 1, 1), math.inf) * weight_of(1, 1, 1)),
        [NAN],
    ),
    "to half": (lambda x: (x + 1e-5).half().float(), [2, 2**-24 * 168, NAN]),
    "to integers": (lambda x: (x * 0.2).int().float(), [NAN, NAN, NAN]),
    "to booleans": (lambda x: x.bool().float(), [NAN, NAN, NAN]),
    "indices of maxima": (
        lambda x: functional.max_pool2d(x, 2, return_indices=True)[1].float(),
        [NAN, NAN, NAN],
    ),
    "a random factor": (lambda x: x * torch.rand_like(torch.ones(3, 1, 1)), [NAN, 0, NAN]),
    "a weight that is computed": (
        lambda x: functional.conv2d(x, x.mean((2, 3))[:, :, None, None] * torch.ones(2, 3, 1, 1)),
        [NAN, NAN],
    ),
}


class Probes(nn.ModuleList):
    """Probes side by side: they are exported together, which takes less time."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [probe(x) for probe in self]


@pytest.fixture(scope="module")
def operations() -> dict[str, list[float]]:
    """What the reader finds after each of the operations."""
    channels = analyse(Probes([Probe(operation) for operation, _ in OPERATIONS.values()]))
    return {
        name: channels[f"{index}.reader"].inputs.tolist() for index, name in enumerate(OPERATIONS)
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_carry_constants(name, operations):
    assert_constants(operations[name], OPERATIONS[name][1])


def test_the_analysis_is_of_the_rules_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(rules.RULES, torch.ops.aten.relu.default)
    channels = analyse(Probe(functional.relu))
    assert channels.unknown == ("aten.relu.default in the model",)
    assert copy.copy(channels["reader"]).inputs.isnan().all()
