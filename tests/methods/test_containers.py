"""Several methods on one parameter share a container."""

from itertools import product

import torch

from starfire_prune.methods.base import find_hook
from starfire_prune.methods.baselines import (
    MagnitudeUnstructured,
)
from starfire_prune.methods.conv import (
    CKStructured,
    WindowStructured,
)
from tests.support.methods import (
    CK,
    MAGNITUDE,
    RANDOM,
    WINDOW,
    checkered,
    conv,
    dense_output,
    every_built_in,
    every_container,
    every_method,
    hook_of,
    inputs_for,
    masked_weight,
    methods_of,
    prune,
    zeros,
)


@every_method
def test_another_method_of_ours_shares_a_container(row):
    module = row.pruned()
    key, first = find_hook(module, "weight")
    buffer, before = module.weight_mask, module.weight_mask.clone()
    other = MAGNITUDE if row is RANDOM else RANDOM
    other.prune(module, amount=0.8)
    container = hook_of(module)
    assert isinstance(container, prune.PruningContainer)
    assert list(module._forward_pre_hooks) == [key]
    assert [type(method) for method in container] == [row.method, other.method]
    assert container[0] is first
    assert module.weight_mask is buffer
    assert buffer.dtype == torch.bool
    assert not (buffer & ~before).any()
    assert zeros(module) == round(0.8 * buffer.numel())
    assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_alternating_calls_do_not_grow_the_container(row):
    module = row.module()
    other = MAGNITUDE if row is RANDOM else RANDOM
    row.prune(module)
    buffer = module.weight_mask
    other.prune(module)
    container, hooks = hook_of(module), list(module._forward_pre_hooks)
    for step in range(10):
        row.prune(module, amount=row.amount + step / 100)
        other.prune(module, amount=other.amount + step / 100)
    assert hook_of(module) is container
    assert list(module._forward_pre_hooks) == hooks
    assert [type(method) for method in container] == [row.method, other.method]
    assert [method.amount for method in container] == [row.amount + 0.09, other.amount + 0.09]
    assert module.weight_mask is buffer
    assert buffer.dtype == torch.bool


def test_a_container_holds_each_of_three_methods_once():
    module = conv()
    for row, _ in product([WINDOW, CK, MAGNITUDE], range(2)):
        row.prune(module)
    for row in (CK, WINDOW):
        row.prune(module, amount=row.more)
    assert {type(method) for method in methods_of(module)} == {
        *[WindowStructured, CKStructured, MagnitudeUnstructured]
    }
    assert len(methods_of(module)) == 3


@every_built_in
@every_method
def test_a_built_in_on_top_takes_both_masks(row, built_in):
    module = row.pruned()
    ours = module.weight_mask.clone()
    built_in(module, "weight")
    theirs = module.weight_mask.clone()
    container = hook_of(module)
    assert isinstance(container, prune.PruningContainer)
    assert len(container) == 2
    assert not theirs[~ours].any()
    assert (theirs == 0).sum() > (~ours).sum()
    buffer = module.weight_mask
    row.prune(module, amount=row.more)
    assert hook_of(module) is container
    assert len(container) == 2
    assert module.weight_mask is buffer
    assert not module.weight_mask[theirs == 0].any()
    inputs = inputs_for(module)
    assert torch.equal(module(inputs), dense_output(module, inputs, masked_weight(module)))


def test_a_built_in_mask_on_top_is_the_intersection():
    module = MAGNITUDE.pruned()
    ours, theirs = module.weight_mask.clone(), checkered(module.weight)
    prune.custom_from_mask(module, "weight", theirs)
    assert torch.equal(module.weight_mask.bool(), ours & theirs)


@every_built_in
@every_method
def test_ours_on_a_built_in_keeps_its_buffer(row, built_in):
    module = row.module()
    built_in(module, "weight")
    key, first = find_hook(module, "weight")
    buffer, theirs = module.weight_mask, module.weight_mask.clone()
    dtype = buffer.dtype
    row.prune(module, amount=row.more)
    assert module.weight_mask is buffer
    assert buffer.dtype == dtype
    assert find_hook(module, "weight")[0] == key
    assert [type(method) for method in methods_of(module)] == [type(first), row.method]
    assert methods_of(module)[0] is first
    assert not buffer[theirs == 0].any()
    assert zeros(module) > (theirs == 0).sum()
    assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_ours_on_a_built_in_counts_what_is_gone(row):
    module = row.module()
    expected = row.method(row.more).compute_mask(module.weight, checkered(module.weight))
    prune.custom_from_mask(module, "weight", checkered(module.weight))
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight_mask.bool(), expected)


@every_container
@every_method
def test_our_calls_do_not_grow_a_container(row, stack):
    module = stack(row, row.module())
    container, buffer, length = hook_of(module), module.weight_mask, len(methods_of(module))
    before = zeros(module)
    for step in range(20):
        row.prune(module, amount=row.amount + (row.more - row.amount) * step / 19)
    assert hook_of(module) is container
    assert len(container) == length == 2
    assert len(module._forward_pre_hooks) == 1
    assert module.weight_mask is buffer
    assert zeros(module) > before


@every_container
@every_method
def test_remove_works_on_a_container(row, stack):
    module = stack(row, row.module())
    parameter, expected = module.weight_orig, masked_weight(module)
    prune.remove(module, "weight")
    assert module.weight is parameter
    assert torch.equal(module.weight, expected)
    assert not prune.is_pruned(module)
    assert not list(module.buffers())
    assert "weight_orig" not in dict(module.named_parameters())
