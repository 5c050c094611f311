"""Pruned modules in forward and backward passes, removal, saving and loading."""

import copy
import pickle
from functools import partial
from typing import Any

import torch
from torch import nn

from starfire_prune.methods.base import make_permanent
from starfire_prune.methods.linear import (
    FCFine,
    fc_fine,
)
from tests.support.methods import (
    assert_refused,
    dense_output,
    every_method,
    every_stack,
    inputs_for,
    masked_weight,
    methods_of,
    prune,
    train,
    zeros,
)

# Forward and backward


@every_method
def test_amount_zero_changes_neither_forward_nor_backward(row):
    module = row.module()
    inputs = inputs_for(module)
    output = module(inputs)
    output.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    row.prune(module, amount=0.0)
    assert module.weight_mask.all()
    assert torch.equal(module(inputs), output)
    again = module(inputs)
    assert torch.equal(again, output)
    again.square().sum().backward()
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@every_method
def test_forward_uses_the_masked_weights(row):
    module = row.pruned()
    inputs = inputs_for(module)
    output = module(inputs)
    assert torch.equal(output, dense_output(module, inputs, masked_weight(module)))
    assert not torch.equal(output, dense_output(module, inputs, module.weight_orig))
    assert torch.equal(module(inputs), output)


def test_forward_with_a_mask_by_hand(monkeypatch):
    mask = torch.tensor([[False, False, True], [True, False, False]])
    monkeypatch.setattr(FCFine, "compute_mask", lambda *args, **options: mask)
    module: Any = fc_fine(nn.Linear(3, 2), amount=0.5)
    output = module(torch.tensor([[2.0, 3.0, 5.0]]))
    weight, bias = module.weight_orig, module.bias
    expected = torch.stack([5 * weight[0, 2] + bias[0], 2 * weight[1, 0] + bias[1]])
    torch.testing.assert_close(output[0], expected)


@every_method
def test_backward_gives_masked_weights_no_gradient(row):
    module = row.pruned()
    inputs = inputs_for(module)
    module(inputs).square().sum().backward()
    weight = masked_weight(module).requires_grad_()
    dense_output(module, inputs, weight).square().sum().backward()
    assert weight.grad is not None
    assert (weight.grad[~module.weight_mask] != 0).any()
    assert torch.equal(module.weight_orig.grad, weight.grad * module.weight_mask)


@every_stack
@every_method
def test_the_weight_can_be_differentiated_before_any_forward(row, stack):
    module = stack(row, row.module())
    module.weight.sum().backward()
    assert torch.equal(module.weight_orig.grad, module.weight_mask.float())


@every_method
def test_frozen_parameters_can_be_pruned(row):
    module = row.module().requires_grad_(False)
    row.prune(module)
    row.prune(module, amount=row.more)
    assert not module(inputs_for(module)).requires_grad
    assert zeros(module) == row.more_zeros


# Removal


@every_method
def test_remove_restores_the_names(row):
    module = row.module()
    attributes = set(vars(module))
    row.prune(module)
    assert prune.remove(module, "weight") is module
    assert list(dict(module.named_parameters())) == ["weight", "bias"]
    assert not list(module.buffers())
    assert not module._forward_pre_hooks
    assert isinstance(module.weight, nn.Parameter)
    assert set(vars(module)) == attributes


@every_method
def test_remove_makes_the_pruning_permanent(row):
    module = row.pruned()
    expected, mask = masked_weight(module), module.weight_mask
    prune.remove(module, "weight")
    assert torch.equal(module.weight, expected)
    assert not module.weight[~mask].signbit().any()
    assert module.weight.is_leaf
    assert module.weight.requires_grad


@every_stack
@every_method
def test_remove_leaves_forward_as_it_was(row, stack):
    module = stack(row, row.module())
    train(module)
    inputs = inputs_for(module)
    before = module(inputs)
    prune.remove(module, "weight")
    assert torch.equal(module(inputs), before)


@every_method
def test_remove_between_forward_and_backward_keeps_the_gradient(row):
    module = row.pruned()
    module(inputs_for(module)).square().sum().backward()
    expected = module.weight_orig.grad.clone()
    module.zero_grad()
    output = module(inputs_for(module))
    prune.remove(module, "weight")
    output.square().sum().backward()
    assert torch.equal(module.weight.grad, expected)


@every_method
def test_remove_before_the_next_forward_uses_the_trained_weights(row):
    module = row.pruned()
    train(module)
    expected = masked_weight(module)
    prune.remove(module, "weight")
    assert torch.equal(module.weight, expected)


@every_method
def test_remove_of_what_is_not_pruned_is_refused(row):
    module = row.module()
    for name in ("weight", "bias"):
        assert_refused(module, partial(prune.remove, name=name), ValueError, "has to be pruned")
    row.prune(module)
    prune.remove(module, "weight")
    assert_refused(module, partial(prune.remove, name="weight"), ValueError, "has to be pruned")


@every_method
def test_a_removed_module_can_be_pruned_again(row):
    module = row.pruned()
    prune.remove(module, "weight")
    row.prune(module, amount=row.more)
    assert zeros(module) == row.more_zeros
    assert (module.weight == 0).sum() == row.more_zeros


@every_stack
@every_method
def test_make_permanent_removes_any_stack_in_order(row, stack):
    module = stack(row, row.module())
    expected, names = masked_weight(module), list(module._parameters)
    make_permanent(module, "weight")
    assert torch.equal(module.weight, expected)
    assert list(module._parameters) == [name.removesuffix("_orig") for name in names]
    assert not prune.is_pruned(module)
    assert not list(module.buffers())


# Saving and loading


@every_stack
@every_method
def test_pickling(row, stack):
    module = stack(row, row.module())
    train(module)
    loaded = pickle.loads(pickle.dumps(module))
    inputs = inputs_for(module)
    assert torch.equal(loaded(inputs), module(inputs))
    assert [type(method) for method in methods_of(loaded)] == [
        type(method) for method in methods_of(module)
    ]
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied(inputs), module(inputs))
    row.prune(copied, amount=row.more)
    assert zeros(copied) > zeros(loaded)
    assert torch.equal(copied(inputs), dense_output(copied, inputs, masked_weight(copied)))
    assert torch.equal(loaded(inputs), module(inputs))


@every_method
def test_saving_a_whole_module(row, tmp_path):
    module = row.pruned()
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    inputs = inputs_for(module)
    assert torch.equal(loaded(inputs), module(inputs))
    assert zeros(row.prune(loaded, amount=row.more)) == row.more_zeros


@every_method
def test_state_dicts_pass_between_pruned_modules(row, tmp_path):
    module = row.pruned(amount=row.more)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = row.pruned()
    assert not torch.equal(other.weight_mask, module.weight_mask)
    other.load_state_dict(state)
    inputs = inputs_for(module)
    assert torch.equal(other.weight_mask, module.weight_mask)
    assert other.weight_mask.dtype == torch.bool
    assert torch.equal(other(inputs), module(inputs))
    assert torch.equal(copy.deepcopy(other)(inputs), module(inputs))


@every_method
def test_state_dicts_are_plain_after_removal(row, tmp_path):
    module = row.module()
    keys = list(module.state_dict())
    row.prune(module)
    prune.remove(module, "weight")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    dense = row.module()
    dense.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(module.state_dict()) == keys
    assert (dense.weight == 0).sum() == row.zeros
    assert torch.equal(dense.weight, module.weight)
