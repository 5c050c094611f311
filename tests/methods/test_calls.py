"""What a call on a module changes and returns, for every method of the table."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import masks, methods
from starfire_prune.methods.base import find_hook
from starfire_prune.methods.baselines import (
    random_unstructured,
)
from starfire_prune.methods.conv import (
    InterStructured,
    ck_structured,
    intra_structured,
    window_structured,
)
from starfire_prune.methods.linear import (
    fc_block,
)
from tests.support.methods import (
    BLOCK,
    CK,
    FILTER,
    FINE,
    MAGNITUDE,
    METHODS,
    RANDOM,
    WINDOW,
    Method,
    conv,
    every_method,
    every_ranking_method,
    fc_after_a_living_layer,
    hook_of,
    inputs_for,
    linear,
    masked_weight,
    prune,
    redraw,
    zeros,
)

# The table is whole


def test_every_method_of_the_package_is_in_the_table():
    others = {"apply_masks", "register_method", "register_schedule"}
    functions = {name for name in methods.__all__ if name.islower()} - others
    assert {row.function.__name__ for row in METHODS} == functions
    assert {row.method for row in METHODS} == {*methods.METHODS.values()} - {InterStructured}
    assert all(method.__name__ in methods.__all__ for method in methods.METHODS.values())


@every_method
def test_function_and_class_share_a_name(row):
    assert row.function.__name__.replace("_", "") == row.method.__name__.lower()


@every_method
def test_class_applies_as_its_function_does(row):
    module = row.module()
    twin = copy.deepcopy(module)
    row.prune(module)
    assert row.method.apply(twin, "weight", row.amount) is hook_of(twin)
    assert type(hook_of(module)) is type(hook_of(twin)) is row.method
    assert torch.equal(twin.weight_mask, module.weight_mask)


@every_method
def test_function_returns_its_module(row):
    module = row.module()
    assert row.prune(module) is module
    assert row.prune(module, amount=row.more) is module


OPTIONS: list[tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], dict[str, Any]]] = [
    (window_structured, masks.window_mask, conv, {"max_nonzero": 2}),
    (window_structured, masks.window_mask, conv, {"exact_layer_sparsity": True, "amount": 0.37}),
    (ck_structured, masks.ck_mask, conv, {"block_size": (2, 1)}),
    (ck_structured, masks.ck_mask, conv, {"scope": "layer"}),
    (ck_structured, masks.ck_mask, conv, {"max_nonzero": 3}),
    (intra_structured, masks.intra_mask, conv, {"window_fraction": 0.9}),
    (intra_structured, masks.intra_mask, conv, {"scope": "layer"}),
    (fc_block, masks.fc_block_mask, linear, {"block_size": (2, 2)}),
    (fc_after_a_living_layer, masks.fc_structure_mask, linear, {"then": "block"}),
    (random_unstructured, masks.random_mask, conv, {"seed": 7}),
]


@pytest.mark.parametrize(("function", "mask_function", "factory", "options"), OPTIONS)
def test_functions_hand_their_options_on(function, mask_function, factory, options):
    module = factory()
    options = {"amount": 0.5, **options}
    expected = mask_function(module.weight, **options)
    plain = mask_function(module.weight, options["amount"])
    assert torch.equal(function(module, **options).weight_mask, expected)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    ("function", "mask_function"),
    [(ck_structured, masks.ck_mask), (intra_structured, masks.intra_mask)],
)
def test_functions_take_the_groups_from_the_convolution(function, mask_function):
    module = nn.Conv2d(4, 12, 3, groups=2)
    expected = mask_function(module.weight, 0.5, groups=2)
    assert not torch.equal(expected, mask_function(module.weight, 0.5))
    assert torch.equal(function(module, amount=0.5).weight_mask, expected)


# What a call changes


@every_method
def test_parameters_stay_the_same_objects(row):
    module = row.module()
    before = list(module.parameters())
    row.prune(module)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    row.prune(module, amount=row.more)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    prune.remove(module, "weight")
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert module.weight is before[0]


@every_method
def test_parameters_stay_in_their_memory(row):
    module = row.module()
    before = module.weight.data_ptr()
    row.prune(module)
    assert module.weight_orig.data_ptr() == before
    prune.remove(module, "weight")
    assert module.weight.data_ptr() == before


@every_method
def test_an_optimizer_made_before_pruning_trains_on(row):
    module = row.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    row.prune(module)
    before = module.weight_orig.detach().clone()
    module(inputs_for(module)).sum().backward()
    optimizer.step()
    moved = module.weight_orig.detach() != before
    assert moved.any()
    assert not moved[~module.weight_mask].any()
    prune.remove(module, "weight")
    before = module.weight.detach().clone()
    optimizer.zero_grad()
    module(inputs_for(module)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)


@every_method
def test_names_of_parameters_and_buffers(row):
    module = row.pruned()
    assert sorted(dict(module.named_parameters())) == ["bias", "weight_orig"]
    assert list(dict(module.named_buffers())) == ["weight_mask"]
    assert "weight" in vars(module)
    assert not isinstance(module.weight, nn.Parameter)


@every_method
def test_mask_is_a_bool_buffer_of_the_weights_shape(row):
    module = row.module()
    shape = module.weight.shape
    row.prune(module)
    assert module.weight_mask.dtype == torch.bool
    assert module.weight_mask.shape == module.weight.shape == module.weight_orig.shape == shape
    assert not module.weight_mask.requires_grad
    assert "weight_mask" in module.state_dict()


@every_method
def test_original_values_are_kept(row):
    module = row.module()
    before = module.weight.detach().clone()
    row.prune(module)
    assert torch.equal(module.weight_orig, before)


@every_method
def test_weight_is_the_original_times_the_mask(row):
    module = row.pruned()
    assert torch.equal(module.weight, masked_weight(module))
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_one_hook_of_the_method_is_added(row):
    module = row.pruned()
    assert len(module._forward_pre_hooks) == 1
    hook = hook_of(module)
    assert type(hook) is row.method
    assert isinstance(hook, prune.BasePruningMethod)
    assert hook.PRUNING_TYPE == "global"
    assert hook.amount == row.amount


@every_method
def test_is_pruned(row):
    module = row.module()
    model = nn.Sequential(nn.ReLU(), module)
    assert not prune.is_pruned(model)
    row.prune(module)
    assert prune.is_pruned(module)
    assert prune.is_pruned(model)
    prune.remove(module, "weight")
    assert not prune.is_pruned(model)


@every_method
def test_find_hook_gives_the_hook_and_its_key(row):
    module = row.module()
    assert find_hook(module, "weight") == (-1, None)
    row.prune(module)
    key, hook = find_hook(module, "weight")
    assert module._forward_pre_hooks[key] is hook
    assert find_hook(module, "bias") == (-1, None)


@every_method
def test_amounts_are_what_is_zero_afterwards(row):
    assert zeros(row.pruned()) == row.zeros
    assert zeros(row.pruned(amount=row.more)) == row.more_zeros


@pytest.mark.parametrize(
    ("row", "amount", "expected"),
    [
        *[(WINDOW, 2, 80), (CK, 3, 108), (BLOCK, 5, 80), (FINE, 7, 7)],
        *[(MAGNITUDE, 11, 11), (RANDOM, 11, 11), (FILTER, 4, 144)],
    ],
    ids=lambda value: value.function.__name__ if isinstance(value, Method) else str(value),
)
def test_ints_count_units(row, amount, expected):
    assert zeros(row.pruned(amount=amount)) == expected


@every_method
def test_masks_change_only_where_a_count_rises(row):
    module = row.module()
    shape, found = module.weight.shape, dict[Any, Tensor]()
    for step in range(51):
        method = row.method(step / 50)
        mask = method.compute_mask(module.weight, None)
        assert torch.equal(found.setdefault(method.counts(shape), mask), mask)
    assert len(found) > 2
    assert list(found) == sorted(found)


@every_method
def test_a_pruned_module_is_freed_with_its_last_reference(row):
    module = row.pruned()
    module(inputs_for(module)).sum().backward()
    reference = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert reference() is None
    finally:
        gc.enable()


# Method objects and importance scores


@every_method
def test_method_object_prunes_a_tensor(row):
    module = row.module()
    weight = module.weight.detach()
    expected = row.prune(module).weight
    assert torch.equal(row.method(row.amount).prune(weight), expected)


@every_method
def test_method_object_respects_a_default_mask(row):
    weight = row.module().weight.detach()
    default_mask = torch.ones_like(weight)
    default_mask[0] = 0.0
    pruned = row.method(row.more).prune(weight, default_mask)
    assert not pruned[0].any()
    assert (pruned == 0).sum() > row.more_zeros - weight[0].numel()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    untouched = row.method(0.0).prune(weight, default_mask)
    assert torch.equal(untouched, weight * default_mask)


@every_ranking_method
def test_method_object_ranks_importance_scores(row):
    weight = row.module().weight.detach()
    scores = torch.randn_like(weight)
    method = row.method(row.amount)
    expected = weight * (method.prune(scores) != 0)
    assert torch.equal(method.prune(weight, importance_scores=scores), expected)
    assert not torch.equal(method.prune(weight), expected)
    assert torch.equal(method.prune(weight, importance_scores=weight), method.prune(weight))


@every_ranking_method
def test_importance_scores_rank_in_the_weights_place(row):
    module, twin = row.module(), row.module()
    weight, scores = module.weight.detach().clone(), twin.weight.detach()
    row.prune(module, importance_scores=scores)
    row.prune(twin)
    assert torch.equal(module.weight_mask, twin.weight_mask)
    assert torch.equal(module.weight_orig, weight)
    other, other_scores = row.module(), row.module().weight.detach()
    with torch.no_grad():
        twin.weight_orig.copy_(other_scores)
    row.prune(module, amount=row.more, importance_scores=other_scores)
    row.prune(twin, amount=row.more)
    assert torch.equal(module.weight_mask, twin.weight_mask)
    assert not torch.equal(row.prune(other).weight_mask, module.weight_mask)


@every_ranking_method
def test_importance_scores_rank_by_magnitude(row):
    module = row.module()
    twin = copy.deepcopy(module)
    scores = torch.randn_like(module.weight)
    row.prune(module, importance_scores=scores)
    row.prune(twin, importance_scores=-scores.abs())
    assert torch.equal(module.weight_mask, twin.weight_mask)


# Repeated calls tighten in place


@every_method
def test_amounts_are_absolute(row):
    module = row.pruned()
    row.prune(module, amount=row.more)
    assert zeros(module) == row.more_zeros
    assert hook_of(module).amount == row.more


@every_method
def test_a_second_call_only_tightens(row):
    module = row.pruned()
    before = module.weight_mask.clone()
    row.prune(module, amount=row.more)
    assert not (module.weight_mask & ~before).any()
    assert (module.weight_mask != before).any()


@every_method
def test_a_second_call_keeps_buffer_and_hook(row):
    module = row.pruned()
    buffer, address = module.weight_mask, module.weight_mask.data_ptr()
    hooks = dict(module._forward_pre_hooks)
    row.prune(module, amount=row.more)
    assert module.weight_mask is buffer
    assert buffer.data_ptr() == address
    assert list(module._forward_pre_hooks) == list(hooks)
    assert hook_of(module) is next(iter(hooks.values()))
    assert type(hook_of(module)) is row.method


@every_method
def test_a_hundred_calls_leave_one_hook(row):
    module = row.module()
    for step in range(101):
        row.prune(module, amount=row.more * step / 100)
    assert len(module._forward_pre_hooks) == 1
    assert type(hook_of(module)) is row.method
    assert list(dict(module.named_buffers())) == ["weight_mask"]
    assert zeros(module) == row.more_zeros


@every_method
def test_an_amount_that_is_reached_changes_no_mask(row):
    module = row.pruned(amount=row.more)
    before = module.weight_mask.clone()
    for amount in (row.amount, 0.0, row.more):
        redraw(module)
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, before)


def test_a_second_call_updates_the_options():
    module = window_structured(conv(), amount=0.3)
    window_structured(module, amount=0.3, max_nonzero=2)
    assert zeros(module) == 40 * 7
    assert hook_of(module).max_nonzero == 2


@every_method
def test_tighten_leaves_the_stale_weight_alone(row):
    module = row.pruned()
    stale = module.weight
    hook = row.method(row.more).tighten(module, "weight")
    assert hook is hook_of(module)
    assert module.weight is stale
    assert zeros(module) == row.more_zeros
    module(inputs_for(module))
    assert torch.equal(module.weight, masked_weight(module))
