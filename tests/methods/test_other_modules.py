"""Other parameters, modules, dtypes and memory formats."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune.methods.baselines import (
    magnitude_unstructured,
)
from tests.support.methods import (
    CK,
    INTRA,
    MAGNITUDE,
    RANDOM,
    Method,
    dense_output,
    every_convolutional_method,
    every_method,
    hook_of,
    inputs_for,
    masked_weight,
    parametrize_methods,
    prune,
    zeros,
)


class TwoWeights(nn.Module):
    """Two parameters of one shape, the name of one being the start of the other's."""

    def __init__(self, row: Method) -> None:
        super().__init__()
        shape = row.module().weight.shape
        self.weight = nn.Parameter(torch.randn(shape))
        self.weight_late = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return (self.weight - self.weight_late).sum()


@every_method
def test_two_parameters_of_a_module_are_independent(row):
    module: Any = TwoWeights(row)
    row.prune(module)
    row.prune(module, name="weight_late", amount=row.more)
    first, late = hook_of(module), hook_of(module, "weight_late")
    assert first is not late
    assert [type(hook) for hook in (first, late)] == [row.method] * 2
    assert (zeros(module), zeros(module, "weight_late")) == (row.zeros, row.more_zeros)
    mask = module.weight_mask.clone()
    row.prune(module, name="weight_late", amount=0.7)
    assert torch.equal(module.weight_mask, mask)
    assert len(module._forward_pre_hooks) == 2
    module().backward()
    assert torch.equal(module.weight_orig.grad, module.weight_mask.float())
    assert torch.equal(module.weight_late_orig.grad, -module.weight_late_mask.float())
    copied = copy.deepcopy(module)
    assert torch.equal(copied(), module())
    prune.remove(module, "weight")
    assert hook_of(module, "weight_late") is late
    assert list(module._parameters) == ["weight", "weight_late_orig"]
    prune.remove(module, "weight_late")
    assert list(module._parameters) == ["weight", "weight_late"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale_orig = nn.Parameter(torch.randn(4, 6))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self) -> Tensor:
        return (self.scale_orig + self.shift).sum()


def test_a_parameter_whose_own_name_ends_like_an_original():
    module: Any = magnitude_unstructured(Scaled(), "scale_orig", 0.5)
    assert list(module._parameters) == ["scale_orig_orig", "shift"]
    magnitude_unstructured(module, "scale_orig", 0.75)
    assert zeros(module, "scale_orig") == 18
    module().backward()
    copy.deepcopy(module)
    prune.remove(module, "scale_orig")
    assert list(module._parameters) == ["scale_orig", "shift"]
    assert (module.scale_orig == 0).sum() == 18


@parametrize_methods([MAGNITUDE, RANDOM])
def test_biases_can_be_pruned_unstructured(row):
    module = row.pruned(name="bias", amount=0.5)
    assert zeros(module, "bias") == 5
    assert (module.bias == 0).sum() == 5
    assert list(module._parameters) == ["weight", "bias_orig"]
    copy.deepcopy(module)
    prune.remove(module, "bias")
    assert list(module._parameters) == ["weight", "bias"]
    assert (module.bias == 0).sum() == 5


def test_recurrent_weights_can_be_pruned():
    module: Any = nn.LSTM(6, 5)
    names, inputs = list(module._parameters), torch.randn(3, 2, 6)
    magnitude_unstructured(module, "weight_ih_l0", 0.5)
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 3
    assert list(module._parameters) == ["weight_ih_l0_orig", *names[1:]]
    before = module(inputs)[0]
    before.sum().backward()
    mask = module.weight_ih_l0_mask
    assert not module.weight_ih_l0_orig.grad[~mask].any()
    assert module._flat_weights[0] is module.weight_ih_l0
    copied = copy.deepcopy(module)
    assert copied._flat_weights[0] is copied.weight_ih_l0
    assert torch.equal(copied(inputs)[0], before)
    prune.remove(module, "weight_ih_l0")
    assert list(module._parameters) == names
    assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)
    assert module._flat_weights[0] is module.weight_ih_l0
    assert not module.weight_ih_l0[~mask].any()
    assert torch.equal(module(inputs)[0], before)


MODULES = {
    "1-d": partial(nn.Conv1d, 4, 10, 3),
    "3-d": partial(nn.Conv3d, 4, 10, (2, 1, 3)),
    "grouped": partial(nn.Conv2d, 4, 12, 3, groups=2),
    "uneven": partial(nn.Conv2d, 3, 7, (1, 5), padding="same", padding_mode="circular"),
    "without bias": partial(nn.Conv2d, 4, 10, 3, bias=False),
}


@pytest.mark.parametrize("factory", MODULES.values(), ids=MODULES)
@every_convolutional_method
def test_convolutions_of_all_shapes(row, factory):
    module = factory()
    names = list(module._parameters)
    row.prune(module)
    assert 0 < zeros(module) < module.weight.numel()
    row.prune(module, amount=row.more)
    inputs = inputs_for(module)
    output = module(inputs)
    assert torch.equal(output, dense_output(module, inputs, masked_weight(module)))
    output.sum().backward()
    copied = copy.deepcopy(module)
    prune.remove(module, "weight")
    assert torch.equal(module(inputs), output)
    assert torch.equal(copied(inputs), output)
    assert list(module._parameters) == names


@pytest.mark.parametrize("row", [CK, INTRA], ids=["ck", "intra"])
def test_depthwise_convolutions_compete_over_the_layer(row):
    module = row.prune(nn.Conv2d(8, 8, 3, groups=8), amount=0.5, scope="layer")
    assert zeros(module) == 36


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(row, dtype):
    module = row.module().to(dtype)
    expected = row.method(row.amount).compute_mask(module.weight.detach(), None)
    row.prune(module)
    assert module.weight_mask.dtype == torch.bool
    assert torch.equal(module.weight_mask, expected)
    assert module.weight.dtype == module.weight_orig.dtype == dtype
    row.prune(module, amount=row.more)
    output = module(inputs_for(module))
    assert output.dtype == dtype
    output.sum().backward()
    assert module.weight_orig.grad.dtype == dtype
    prune.remove(module, "weight")
    assert module.weight.dtype == dtype
    assert (module.weight == 0).sum() >= row.more_zeros


@every_method
def test_changing_the_dtype_after_pruning_keeps_the_mask(row):
    module = row.pruned()
    module(inputs_for(module))
    mask = module.weight_mask.clone()
    module.to(torch.float64)
    assert module.weight_mask.dtype == torch.bool
    assert module(inputs_for(module)).dtype == torch.float64
    assert torch.equal(module.weight != 0, mask)
    assert zeros(row.prune(module, amount=row.more)) == row.more_zeros


@every_convolutional_method
def test_changing_the_memory_format_after_pruning(row):
    module = row.pruned()
    inputs = inputs_for(module)
    mask, before = module.weight_mask.clone(), module(inputs)
    module.to(memory_format=torch.channels_last)
    assert module.weight_orig.is_contiguous(memory_format=torch.channels_last)
    assert module.weight_mask.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.weight_mask, mask)
    torch.testing.assert_close(module(inputs), before)
    twin = row.pruned()
    twin.load_state_dict(module.state_dict())
    row.prune(module, amount=row.more)
    row.prune(twin, amount=row.more)
    assert torch.equal(module.weight_mask, twin.weight_mask)
    assert torch.equal(copy.deepcopy(module)(inputs), module(inputs))
