"""The pruning methods as `torch.nn.utils.prune` knows them: properties of each, and known traps.

A new method is one row of `METHODS`, and every property below is then tested of it too.
"""

import copy
import gc
import math
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise, product
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as untyped_prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from starfire_prune import masks, methods
from starfire_prune.methods.base import MaskMethod, find_hook, make_permanent
from starfire_prune.methods.baselines import (
    FilterStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
    filter_structured,
    magnitude_unstructured,
    random_unstructured,
)
from starfire_prune.methods.conv import (
    CKStructured,
    InterStructured,
    IntraStructured,
    WindowStructured,
    ck_structured,
    intra_structured,
    window_structured,
)
from starfire_prune.methods.linear import (
    FCBlock,
    FCFine,
    FCStructured,
    fc_block,
    fc_fine,
    fc_structured,
)

prune: Any = untyped_prune

conv = partial(nn.Conv2d, 4, 10, 3)  # 40 kernels, 360 weights
linear = partial(nn.Linear, 20, 16)  # 20 blocks of 4x4, 320 weights


@dataclass(frozen=True)
class Method:
    """A method, a module that it fits, and how many zeros two rising amounts give there."""

    function: Callable[..., Any]
    method: type[MaskMethod]
    module: Callable[..., Any]
    amount: float
    zeros: int
    more: float
    more_zeros: int
    takes_scores: bool = True

    def prune(self, module: nn.Module, **options: Any) -> Any:
        return self.function(module, **{"amount": self.amount, **options})

    def pruned(self, **options: Any) -> Any:
        return self.prune(self.module(), **options)


@wraps(fc_structured)
def fc_after_a_living_layer(module: Any, *args: Any, **options: Any) -> Any:
    return fc_structured(module, *args, **{"previous": nn.Linear(5, 5), **options})


METHODS = [
    Method(window_structured, WindowStructured, conv, 0.3, 120, 0.6, 200),
    Method(ck_structured, CKStructured, conv, 0.3, 108, 0.6, 216),
    Method(intra_structured, IntraStructured, conv, 0.3, 108, 0.6, 216),
    Method(fc_block, FCBlock, linear, 0.3, 96, 0.6, 192),
    Method(fc_fine, FCFine, linear, 0.3, 96, 0.6, 192),
    Method(fc_after_a_living_layer, FCStructured, linear, 0.3, 96, 0.6, 192),
    Method(magnitude_unstructured, MagnitudeUnstructured, conv, 0.3, 108, 0.6, 216),
    Method(random_unstructured, RandomUnstructured, conv, 0.3, 108, 0.6, 216, takes_scores=False),
    Method(filter_structured, FilterStructured, conv, 0.3, 108, 0.6, 216),
]
RANKING = [row for row in METHODS if row.takes_scores]
CONVOLUTIONAL = [row for row in METHODS if row.module is conv]
WINDOW, CK, INTRA, BLOCK, FINE, STRUCTURE, MAGNITUDE, RANDOM, FILTER = METHODS


def parametrize_methods(rows: list[Method]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.function.__name__ for row in rows])


every_method = parametrize_methods(METHODS)
every_ranking_method = parametrize_methods(RANKING)
every_convolutional_method = parametrize_methods(CONVOLUTIONAL)


def leave(row: Method, module: nn.Module) -> Any:
    return module


def prune_by_one(row: Method, module: nn.Module) -> Any:
    return row.prune(module)


def prune_by_another(row: Method, module: nn.Module) -> Any:
    return (MAGNITUDE if row is RANDOM else RANDOM).prune(module, amount=0.1)


def prune_by_two(row: Method, module: nn.Module) -> Any:
    return row.prune(prune_by_another(row, module))


def prune_below_built_in(row: Method, module: nn.Module) -> Any:
    return prune.l1_unstructured(row.prune(module), "weight", amount=0.1)


def prune_on_built_in(row: Method, module: nn.Module) -> Any:
    return row.prune(prune.l1_unstructured(module, "weight", amount=0.1))


# How a weight came to have a mask of the method
CONTAINERS = {
    "two of ours": prune_by_two,
    "built-in on top": prune_below_built_in,
    "built-in below": prune_on_built_in,
}
STACKS = {"alone": prune_by_one, **CONTAINERS}
# What a method may find
STATES = {
    "fresh": leave,
    "the method's hook": prune_by_one,
    "another hook": prune_by_another,
    "a container": prune_below_built_in,
}
every_container = pytest.mark.parametrize("stack", CONTAINERS.values(), ids=CONTAINERS)
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)

BUILT_IN = {
    "l1": partial(prune.l1_unstructured, amount=0.2),
    "ln": partial(prune.ln_structured, amount=0.2, n=2, dim=0),
    "random": partial(prune.random_unstructured, amount=0.2),
    "custom": lambda module, name: prune.custom_from_mask(module, name, checkered(module.weight)),
}
every_built_in = pytest.mark.parametrize("built_in", BUILT_IN.values(), ids=BUILT_IN)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are too small for several threads to be anything but slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


def checkered(weight: Tensor) -> Tensor:
    return torch.arange(weight.numel()).view(weight.shape) % 3 > 0


def inputs_for(module: Any) -> Tensor:
    weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
    assert weight is not None
    generator = torch.Generator().manual_seed(1)
    channels = getattr(module, "groups", 1) * weight.shape[1]
    shape = (2, channels, *[5] * (weight.ndim - 2))
    return torch.randn(shape, generator=generator).to(weight.dtype)


def dense_output(module: Any, inputs: Tensor, weight: Tensor) -> Any:
    """What a module like this one gives with `weight` in its weight's place."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(inputs, weight, module.bias)
    return module._conv_forward(inputs, weight, module.bias)


def masked_weight(module: Any) -> Any:
    """The weight as `weight_orig` and `weight_mask` have it now."""
    return module.weight_orig.detach() * module.weight_mask.to(module.weight_orig.dtype)


def zeros(module: Any, name: str = "weight") -> int:
    return int((getattr(module, f"{name}_mask") == 0).sum())


def hook_of(module: Any, name: str = "weight") -> Any:
    """The pruning hook of the parameter, which must be the only one of that name."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook._tensor_name == name]
    assert len(hooks) == 1
    return hooks[0]


def methods_of(module: Any) -> list[Any]:
    """The methods in the module's single pruning hook, whether it is a container or not."""
    hook = hook_of(module)
    return list(hook) if isinstance(hook, prune.PruningContainer) else [hook]


def train(module: Any, learning_rate: float = 0.1, momentum: float = 0.0) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=momentum)
    optimizer.zero_grad()
    module(inputs_for(module)).square().sum().backward()
    optimizer.step()


def redraw(module: Any) -> None:
    """New values for the parameter behind the pruned weight."""
    with torch.no_grad():
        module.weight_orig.uniform_(0.1, 1.0)


def contents(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All that a module's dictionary leads to, in order, submodules left out."""
    yield path, value
    if isinstance(value, prune.BasePruningMethod):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from contents(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from contents(item, f"{path}/{index}")


class State:
    """What a module holds: which objects, under which keys, in which order, and their values."""

    def __init__(self, module: Any) -> None:
        self.objects = list(contents(vars(module)))
        self.values = [
            value.detach().clone() for _, value in self.objects if isinstance(value, Tensor)
        ]

    def assert_same(self, other: "State") -> None:
        assert [path for path, _ in self.objects] == [path for path, _ in other.objects]
        for (path, ours), (_, theirs) in zip(self.objects, other.objects, strict=True):
            assert ours is theirs, f"{path} is another object"
        for before, after in zip(self.values, other.values, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def assert_refused(
    module: nn.Module, call: Callable[[nn.Module], object], error: type[Exception], match: str
) -> None:
    """The call raises, and the module is afterwards as it was."""
    before = State(module)
    with pytest.raises(error, match=match):
        call(module)
    before.assert_same(State(module))


# ---------------------------------------------------------------------------------------------
# The table is whole
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# What a call changes
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Removal
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Method objects and importance scores
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Repeated calls tighten in place
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Several methods on one parameter
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# A call that is refused changes nothing
# ---------------------------------------------------------------------------------------------


BAD_AMOUNTS = [
    *[(-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), (-1, ValueError)],
    *[(10**6, ValueError), ("0.5", TypeError), (True, TypeError), (None, TypeError)],
]


@every_state
@every_method
def test_bad_amounts_are_refused(row, state):
    module = state(row, row.module())
    for amount, error in BAD_AMOUNTS:
        if row is INTRA and isinstance(amount, int):
            error = TypeError  # it takes shares alone
        match = rf"^{type(module).__name__}\.weight: `amount` \(={re.escape(repr(amount))}\)"
        assert_refused(module, partial(row.prune, amount=amount), error, match)


@every_method
def test_an_amount_must_be_given(row):
    assert_refused(row.module(), row.function, TypeError, r"`amount` \(=None\) must be a float")


@every_state
@every_method
def test_what_fails_inside_of_a_method_changes_nothing(row, state, monkeypatch):
    module = state(row, row.module())
    call = partial(row.prune, amount=row.more)
    monkeypatch.setattr(row.method, "compute_mask", Mock(side_effect=RuntimeError("no mask today")))
    assert_refused(module, call, RuntimeError, "no mask today")
    monkeypatch.setattr(row.method, "compute_mask", Mock(return_value=torch.ones(2, 7).bool()))
    assert_refused(module, call, RuntimeError, r"size of tensor|shape")


@every_state
@every_method
def test_unknown_options_are_refused(row, state):
    module = state(row, row.module())
    apply = partial(row.method.apply, name="weight", amount=row.more, colour="blue")
    assert_refused(module, apply, TypeError, "colour")


@every_state
@every_ranking_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(row, state, value):
    module = state(row, row.module())
    weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
    assert weight is not None
    first_kept = module.weight.detach().flatten().nonzero()[0]
    with torch.no_grad():
        weight.view(-1)[first_kept] = value
    assert_refused(
        module, partial(row.prune, amount=row.more), ValueError, r"\.weight: .*not finite"
    )


@every_state
@every_ranking_method
def test_scores_that_are_not_finite_are_refused(row, state):
    module = state(row, row.module())
    scores = torch.full_like(module.weight.detach(), math.nan)
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, ValueError, r"\.weight: .*not finite")


@every_state
@every_ranking_method
def test_scores_of_another_shape_are_refused(row, state):
    module = state(row, row.module())
    scores = module.weight.detach()[:1]
    shapes = [re.escape(str(tuple(tensor.shape))) for tensor in (scores, module.weight)]
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, ValueError, f"`importance_scores` of shape {'.*'.join(shapes)}")


@every_state
@every_ranking_method
def test_scores_that_are_no_tensor_are_refused(row, state):
    module = state(row, row.module())
    scores = module.weight.detach().numpy()
    call = partial(row.prune, amount=row.more, importance_scores=scores)
    assert_refused(module, call, TypeError, "`importance_scores` must be a tensor.*ndarray")


@every_state
@every_method
def test_names_that_the_module_does_not_have_are_refused(row, state):
    module = state(row, row.module())
    names = "(weight, bias|bias, weight)$"  # built-in methods change the order
    match = rf"{type(module).__name__} has no parameter `wieght`; it has: {names}"
    assert_refused(module, partial(row.prune, name="wieght"), AttributeError, match)


@every_state
@every_method
def test_an_amount_in_the_names_place_is_refused(row, state):
    module = state(row, row.module())
    match = r"`name` \(=0\.6\) must be a str; the amount goes into amount="
    assert_refused(module, lambda module: row.function(module, 0.6), TypeError, match)


@pytest.mark.parametrize("state", [leave, prune_by_another])
@pytest.mark.parametrize(
    ("row", "factory", "match"),
    [
        (WINDOW, partial(nn.Conv2d, 4, 10, 1), r"Conv2d\.weight: window pruning .*1x1.*by ck"),
        (WINDOW, linear, r"Linear\.weight: .*\(K, C, \*kernel\)"),
        (
            CK,
            partial(nn.Conv2d, 4, 4, 3, groups=4),
            r"Conv2d\.weight: .*depthwise.*scope=\"layer\"",
        ),
        (CK, linear, r"Linear\.weight: .*\(K, C, \*kernel\)"),
        (INTRA, partial(nn.Conv2d, 4, 4, 3, groups=4), r"depthwise.*scope=\"layer\""),
        (INTRA, linear, r"Linear\.weight: .*\(K, C, \*kernel\)"),
        (BLOCK, conv, r"Conv2d\.weight: .*fc methods are for linear layers"),
        (FINE, conv, r"Conv2d\.weight: .*fc methods are for linear layers"),
    ],
    ids=lambda value: value.function.__name__ if isinstance(value, Method) else "",
)
def test_modules_that_do_not_fit_are_refused(row, factory, match, state):
    assert_refused(state(row, factory()), row.prune, ValueError, match)


TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@every_method
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_convolutions_are_refused(row, kind):
    module = kind(4, 6, 3)
    match = f"{kind.__name__} is a transposed convolution"
    assert_refused(module, row.prune, TypeError, match)
    prune.l1_unstructured(module, "weight", amount=0.1)
    assert_refused(module, row.prune, TypeError, match)


@every_method
def test_reparametrised_weights_are_refused(row):
    module = weight_norm(row.module())
    assert_refused(module, row.prune, AttributeError, "has no parameter `weight`; it has: bias")


@every_method
def test_spectral_norm_by_hook_is_refused(row):
    module = nn.utils.spectral_norm(row.module())
    assert_refused(module, row.prune, ValueError, "has a `weight_orig` already")


@pytest.mark.parametrize("taken", ["weight_orig", "weight_mask"])
@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(3)), nn.Buffer(torch.ones(3)), 3])
def test_names_that_are_taken_are_refused(taken, value):
    module = conv()
    setattr(module, taken, value)
    match = f"the module has a `{taken}` already, which pruning `weight` adds"
    assert_refused(module, MAGNITUDE.prune, ValueError, match)


@every_method
def test_parameters_that_are_none_are_refused(row):
    module = row.module(bias=False)
    match = "has no parameter `bias`; it has: weight$"
    assert_refused(module, partial(row.prune, name="bias"), AttributeError, match)


def test_a_module_without_parameters_is_refused():
    match = "ReLU has no parameter `weight`; it has: none of its own"
    assert_refused(nn.ReLU(), MAGNITUDE.prune, AttributeError, match)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_without_values_are_refused():
    module = nn.LazyConv2d(10, 3)
    with pytest.raises(ValueError, match="`weight` of LazyConv2d has no values yet: run a forward"):
        CK.prune(module)
    module(torch.randn(2, 4, 5, 5))
    assert zeros(CK.prune(module)) == CK.zeros


def test_a_refused_call_leaves_recurrent_weights_in_place():
    module = nn.LSTM(6, 5)
    call = partial(magnitude_unstructured, name="weight_ih_l0", amount=1.5)
    for _ in range(2):
        assert_refused(module, call, ValueError, r"LSTM\.weight_ih_l0: `amount` \(=1.5\)")
        magnitude_unstructured(module, "weight_ih_l0", 0.5)


# ---------------------------------------------------------------------------------------------
# Other parameters, modules, dtypes and memory formats
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Known traps
# ---------------------------------------------------------------------------------------------


@every_container
@every_method
def test_trap_01_methods_are_handed_the_whole_weight(row, stack, monkeypatch):
    module, shapes = row.module(), []
    compute_mask = row.method.compute_mask

    def spy(self: MaskMethod, t: Tensor, default_mask: Tensor | None) -> Any:
        shapes.append(t.shape)
        shapes.append(t.shape if default_mask is None else default_mask.shape)
        return compute_mask(self, t, default_mask)

    monkeypatch.setattr(row.method, "compute_mask", spy)
    stack(row, module)
    row.prune(module, amount=row.more)
    row.prune(module, amount=0.7)
    assert len(shapes) == 6
    assert set(shapes) == {module.weight.shape}


@every_method
def test_trap_01_each_application_gives_the_mask_of_the_whole_weight(row):
    module = row.module()
    parameter, mask = module.weight, None
    for amount in (row.amount, row.more, 0.8):
        mask = row.method(amount).compute_mask(parameter, mask)
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, mask)


@every_stack
@every_ranking_method
def test_trap_02_what_is_ranked_is_the_parameter(row, stack):
    module = stack(row, row.module())
    redraw(module)
    rank = row.method(row.more).compute_mask
    expected = rank(module.weight_orig, module.weight_mask)
    assert not torch.equal(rank(module.weight.detach(), module.weight_mask), expected)
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight_mask.bool(), expected)


@every_stack
@every_method
def test_trap_03_hooks_keep_no_tensors(row, stack):
    module = stack(row, row.module())
    scores = torch.rand_like(module.weight)
    for amount in (row.amount, row.more):
        row.method.apply(module, "weight", amount, importance_scores=scores)
    ours = [method for method in methods_of(module) if isinstance(method, MaskMethod)]
    assert ours
    for method in ours:
        assert not [path for path, value in contents(method) if isinstance(value, Tensor)]


def do_nothing(module: Any) -> Any:
    return module


def run_forward(module: Any) -> Any:
    module(inputs_for(module))
    return module


def run_forward_without_gradients(module: Any) -> Any:
    with torch.no_grad():
        module(inputs_for(module))
    return module


def run_backward(module: Any) -> Any:
    module(inputs_for(module)).square().sum().backward()
    return module


def run_step(module: Any) -> Any:
    train(module, momentum=0.9)
    return module


def run_into_an_exception(module: Any) -> Any:
    with suppress(RuntimeError):
        module(inputs_for(module)[:, 1:])
        raise AssertionError("inputs of the wrong size were taken")
    return module


def run_checkpointed(module: Any) -> Any:
    inputs = inputs_for(module).requires_grad_()
    checkpoint(module, inputs, use_reentrant=False).sum().backward()
    return module


def run_reentrant_checkpointed(module: Any) -> Any:
    inputs = inputs_for(module).requires_grad_()
    checkpoint(module, inputs, use_reentrant=True).sum().backward()
    return module


def run_within_inference_mode(module: Any) -> Any:
    with torch.inference_mode():
        module(inputs_for(module))
    return module


def run_after_pickling(module: Any) -> Any:
    return run_forward(pickle.loads(pickle.dumps(module)))


def run_after_loading(module: Any) -> Any:
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    return run_forward(module)


def tighten_after_forward(module: Any) -> Any:
    return WINDOW.prune(run_forward(module), amount=0.5)


def copy_after_forward(module: Any) -> Any:
    return run_forward(copy.deepcopy(run_forward(module)))


def remove_after_forward(module: Any) -> Any:
    make_permanent(run_forward(module), "weight")
    return module


MOMENTS = [
    *[do_nothing, run_forward, run_forward_without_gradients, run_backward, run_step],
    *[run_into_an_exception, run_checkpointed, run_reentrant_checkpointed],
    *[run_within_inference_mode, run_after_pickling, run_after_loading],
    *[tighten_after_forward, copy_after_forward, remove_after_forward],
]


def assert_copy_is_independent(module: Any, copied: Any, row: Method) -> None:
    """The copy gives the same, shares no memory, and neither is changed by the other."""
    inputs = inputs_for(module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert torch.equal(copied.weight, module.weight)
    assert copied.weight.data_ptr() != module.weight.data_ptr()
    assert torch.equal(copied(inputs), module(inputs))
    addresses = {value.data_ptr() for value in module.state_dict().values()}
    assert not addresses & {value.data_ptr() for value in copied.state_dict().values()}
    assert list(copied.state_dict()) == list(state)
    train(copied)
    if prune.is_pruned(module):
        assert hook_of(copied) is not hook_of(module)
        assert all(a is not b for a, b in zip(methods_of(copied), methods_of(module), strict=True))
        row.prune(copied, amount=0.8)
        assert zeros(copied) > zeros(module)
        assert torch.equal(copied(inputs), dense_output(copied, inputs, masked_weight(copied)))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    before = copied(inputs)
    train(module)
    assert torch.equal(copied(inputs), before)


@every_stack
@pytest.mark.parametrize("moment", MOMENTS)
def test_trap_04_deepcopy_works_at_any_time(stack, moment):
    module = moment(stack(WINDOW, conv()))
    assert_copy_is_independent(module, copy.deepcopy(module), WINDOW)


@every_method
def test_trap_04_deepcopy_works_for_every_method(row):
    module = row.pruned()
    assert_copy_is_independent(module, copy.deepcopy(module), row)
    run_backward(module)
    copied = copy.deepcopy(module)
    assert hook_of(copied).amount == row.amount
    assert_copy_is_independent(module, copied, row)


@every_stack
def test_trap_04_deepcopy_of_a_copy_after_its_own_forward(stack):
    module = run_backward(stack(WINDOW, conv()))
    first = run_backward(copy.deepcopy(module))
    del module
    second = run_backward(copy.deepcopy(first))
    assert torch.equal(second(inputs_for(second)), first(inputs_for(first)))
    assert_copy_is_independent(second, copy.deepcopy(second), WINDOW)


def test_trap_04_deepcopy_leaves_the_module_as_it_was():
    module = run_backward(WINDOW.pruned())
    before = State(module)
    copy.deepcopy(module)
    before.assert_same(State(module))
    assert module.weight.grad_fn is not None


def test_trap_04_deepcopy_of_a_method_alone():
    module = WINDOW.pruned()
    hook = hook_of(module)
    for method in (hook, WindowStructured(0.5)):
        copied = copy.deepcopy(method)
        assert type(copied) is WindowStructured
        assert copied.amount == method.amount


def small_model() -> nn.Sequential:
    """A network whose layers are pruned by different methods."""
    first, last = nn.Conv2d(3, 4, 3), nn.Linear(16, 5)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), last)
    window_structured(first, amount=0.5)
    fc_fine(last, amount=0.5)
    return model


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def test_trap_04_deepcopy_of_a_model():
    model = small_model()
    model(IMAGES).sum().backward()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IMAGES), model(IMAGES))
    window_structured(copied[0], amount=0.8)
    assert zeros(copied[0]) > zeros(model[0])
    assert not torch.equal(copied(IMAGES), model(IMAGES))


def test_trap_04_deepcopy_of_a_layer_that_is_used_twice():
    layer = WINDOW.prune(nn.Conv2d(4, 4, 3, padding=1))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    inputs = torch.randn(2, 4, 5, 5)
    model(inputs).sum().backward()
    copied = copy.deepcopy(model)
    assert copied[0] is copied[2]
    assert torch.equal(copied(inputs), model(inputs))


def test_trap_04_averaged_models_of_pruned_models():
    model = small_model()
    model(IMAGES).sum().backward()
    averaged = AveragedModel(model)
    expected = model(IMAGES)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(IMAGES), expected)


def test_trap_05_the_mask_follows_the_weights_strides():
    module = WINDOW.prune(conv().to(memory_format=torch.channels_last))
    assert module.weight_mask.stride() == module.weight_orig.stride()
    assert module.weight.stride() == module.weight_orig.stride()
    buffer = module.weight_mask
    WINDOW.prune(module, amount=WINDOW.more)
    assert module.weight_mask is buffer
    assert buffer.stride() == module.weight_orig.stride()


@every_convolutional_method
def test_trap_05_channels_last_weights_get_the_same_masks(row):
    plain = row.module()
    module = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for amount in (row.amount, row.more):
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, row.prune(plain, amount=amount).weight_mask)
    inputs = inputs_for(module)
    torch.testing.assert_close(module(inputs), plain(inputs))
    assert_copy_is_independent(module, copy.deepcopy(module), row)
    before = module(inputs)
    prune.remove(module, "weight")
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(inputs), before)


@every_method
def test_trap_05_transposed_and_strided_weights_get_the_same_masks(row):
    plain, module = row.module(), row.module()
    weight = plain.weight.detach()
    strided = weight.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    module.weight = nn.Parameter(strided)
    for amount in (row.amount, row.more):
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, row.prune(plain, amount=amount).weight_mask)


@every_method
def test_trap_06_masks_do_not_change_between_forward_and_backward(row):
    module = row.pruned()
    loss = module(inputs_for(module)).sum()
    row.prune(module, amount=row.more)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_trap_06_holds_in_a_container_of_ours(row):
    module = row.pruned()
    other = MAGNITUDE if row is RANDOM else RANDOM
    other.prune(module, amount=0.8)
    loss = module(inputs_for(module)).sum()
    other.prune(module, amount=0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_trap_09_removing_a_container_of_ours_keeps_the_order(row):
    module = row.pruned()
    (MAGNITUDE if row is RANDOM else RANDOM).prune(module, amount=0.8)
    prune.remove(module, "weight")
    assert list(module._parameters) == ["weight", "bias"]


@every_stack
@every_method
def test_trap_06_masks_may_change_after_the_step(row, stack):
    module = stack(row, row.module())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for step in range(4):
        module(inputs_for(module)).sum().backward()
        optimizer.step()
        row.prune(module, amount=row.amount + step / 10)
        optimizer.zero_grad()
        assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_trap_08_the_weight_is_stale_until_the_next_forward(row):
    module = row.pruned()
    train(module)
    assert not torch.equal(module.weight, masked_weight(module))
    module(inputs_for(module))
    assert torch.equal(module.weight, masked_weight(module))


@every_stack
@every_method
def test_trap_08_a_call_refreshes_the_weight(row, stack):
    module = stack(row, row.module())
    train(module)
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_trap_09_the_order_of_parameters_stays(row):
    module = row.module()
    assert list(module._parameters) == ["weight", "bias"]
    for amount in (row.amount, row.more):
        row.prune(module, amount=amount)
        assert list(module._parameters) == ["weight_orig", "bias"]
        assert list(module.state_dict()) == ["weight_orig", "bias", "weight_mask"]
    prune.remove(module, "weight")
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module.state_dict()) == ["weight", "bias"]


def test_trap_09_the_order_of_parameters_stays_in_the_middle():
    module = nn.LSTM(6, 5, num_layers=2)
    names = list(module._parameters)
    wanted = [f"{name}_orig" if name == "weight_hh_l0" else name for name in names]
    magnitude_unstructured(module, "weight_hh_l0", 0.5)
    assert list(module._parameters) == wanted
    prune.remove(module, "weight_hh_l0")
    assert list(module._parameters) == names


def test_trap_09_an_optimizers_state_fits_before_and_after():
    module = conv()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    shapes = [parameter.shape for parameter in module.parameters()]
    CK.prune(module)
    module(inputs_for(module)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    prune.remove(module, "weight")
    later = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    later.load_state_dict(state)
    assert [parameter.shape for parameter in module.parameters()] == shapes
    for parameter in module.parameters():
        assert later.state[parameter]["momentum_buffer"].shape == parameter.shape


@pytest.fixture
def compile_counter() -> Iterator[Any]:
    """A backend for `torch.compile` that runs the graph as it is and counts compilations."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@every_stack
def test_trap_11_mask_changes_do_not_recompile(stack, compile_counter):
    module = stack(CK, conv())
    compiled: Any = torch.compile(module, backend=compile_counter, fullgraph=True)
    inputs = inputs_for(module)
    outputs = []
    for amount in (0.3, 0.4, 0.6, 0.8):
        CK.prune(module, amount=amount)
        outputs.append(compiled(inputs))
        expected = dense_output(module, inputs, masked_weight(module))
        torch.testing.assert_close(outputs[-1], expected)
        outputs[-1].sum().backward()
    assert compile_counter.frame_count == 1
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


def test_trap_11_training_a_compiled_model(compile_counter):
    model = small_model()
    compiled: Any = torch.compile(model, backend=compile_counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for amount in (0.5, 0.7, 0.8):
        compiled(IMAGES).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        WindowStructured(amount).tighten(model[0], "weight")
        fc_fine(model[4], amount=amount)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert compile_counter.frame_count == 1


def test_trap_11_deepcopy_of_a_compiled_model(compile_counter):
    model = small_model()
    compiled: Any = torch.compile(model, backend=compile_counter)
    compiled(IMAGES).sum().backward()
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(copied(IMAGES), model(IMAGES))
    window_structured(copied._orig_mod[0], amount=0.8)
    assert zeros(copied._orig_mod[0]) > zeros(model[0])
