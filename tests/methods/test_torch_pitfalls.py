"""Pitfalls of `torch.nn.utils.prune` that the methods avoid: copies, memory formats, stale weights,
the order of parameters, compiled models."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from starfire_prune.methods.base import MaskMethod, make_permanent
from starfire_prune.methods.baselines import (
    magnitude_unstructured,
)
from starfire_prune.methods.conv import (
    WindowStructured,
    window_structured,
)
from starfire_prune.methods.linear import (
    fc_fine,
)
from tests.support.methods import (
    CK,
    MAGNITUDE,
    RANDOM,
    WINDOW,
    Method,
    State,
    contents,
    conv,
    dense_output,
    every_container,
    every_convolutional_method,
    every_method,
    every_ranking_method,
    every_stack,
    hook_of,
    inputs_for,
    masked_weight,
    methods_of,
    prune,
    redraw,
    train,
    zeros,
)


@every_container
@every_method
def test_methods_are_handed_the_whole_weight(row, stack, monkeypatch):
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
def test_each_application_gives_the_mask_of_the_whole_weight(row):
    module = row.module()
    parameter, mask = module.weight, None
    for amount in (row.amount, row.more, 0.8):
        mask = row.method(amount).compute_mask(parameter, mask)
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, mask)


@every_stack
@every_ranking_method
def test_what_is_ranked_is_the_parameter(row, stack):
    module = stack(row, row.module())
    redraw(module)
    rank = row.method(row.more).compute_mask
    expected = rank(module.weight_orig, module.weight_mask)
    assert not torch.equal(rank(module.weight.detach(), module.weight_mask), expected)
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight_mask.bool(), expected)


@every_stack
@every_method
def test_hooks_keep_no_tensors(row, stack):
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
def test_deepcopy_works_at_any_time(stack, moment):
    module = moment(stack(WINDOW, conv()))
    assert_copy_is_independent(module, copy.deepcopy(module), WINDOW)


@every_method
def test_deepcopy_works_for_every_method(row):
    module = row.pruned()
    assert_copy_is_independent(module, copy.deepcopy(module), row)
    run_backward(module)
    copied = copy.deepcopy(module)
    assert hook_of(copied).amount == row.amount
    assert_copy_is_independent(module, copied, row)


@every_stack
def test_deepcopy_of_a_copy_after_its_own_forward(stack):
    module = run_backward(stack(WINDOW, conv()))
    first = run_backward(copy.deepcopy(module))
    del module
    second = run_backward(copy.deepcopy(first))
    assert torch.equal(second(inputs_for(second)), first(inputs_for(first)))
    assert_copy_is_independent(second, copy.deepcopy(second), WINDOW)


def test_deepcopy_leaves_the_module_as_it_was():
    module = run_backward(WINDOW.pruned())
    before = State(module)
    copy.deepcopy(module)
    before.assert_same(State(module))
    assert module.weight.grad_fn is not None


def test_deepcopy_of_a_method_alone():
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


def test_deepcopy_of_a_model():
    model = small_model()
    model(IMAGES).sum().backward()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IMAGES), model(IMAGES))
    window_structured(copied[0], amount=0.8)
    assert zeros(copied[0]) > zeros(model[0])
    assert not torch.equal(copied(IMAGES), model(IMAGES))


def test_deepcopy_of_a_layer_that_is_used_twice():
    layer = WINDOW.prune(nn.Conv2d(4, 4, 3, padding=1))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    inputs = torch.randn(2, 4, 5, 5)
    model(inputs).sum().backward()
    copied = copy.deepcopy(model)
    assert copied[0] is copied[2]
    assert torch.equal(copied(inputs), model(inputs))


def test_averaged_models_of_pruned_models():
    model = small_model()
    model(IMAGES).sum().backward()
    averaged = AveragedModel(model)
    expected = model(IMAGES)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(IMAGES), expected)


def test_the_mask_follows_the_weights_strides():
    module = WINDOW.prune(conv().to(memory_format=torch.channels_last))
    assert module.weight_mask.stride() == module.weight_orig.stride()
    assert module.weight.stride() == module.weight_orig.stride()
    buffer = module.weight_mask
    WINDOW.prune(module, amount=WINDOW.more)
    assert module.weight_mask is buffer
    assert buffer.stride() == module.weight_orig.stride()


@every_convolutional_method
def test_channels_last_weights_get_the_same_masks(row):
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
def test_transposed_and_strided_weights_get_the_same_masks(row):
    plain, module = row.module(), row.module()
    weight = plain.weight.detach()
    strided = weight.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    module.weight = nn.Parameter(strided)
    for amount in (row.amount, row.more):
        row.prune(module, amount=amount)
        assert torch.equal(module.weight_mask, row.prune(plain, amount=amount).weight_mask)


@every_method
def test_masks_do_not_change_between_forward_and_backward(row):
    module = row.pruned()
    loss = module(inputs_for(module)).sum()
    row.prune(module, amount=row.more)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_holds_in_a_container_of_ours(row):
    module = row.pruned()
    other = MAGNITUDE if row is RANDOM else RANDOM
    other.prune(module, amount=0.8)
    loss = module(inputs_for(module)).sum()
    other.prune(module, amount=0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_removing_a_container_of_ours_keeps_the_order(row):
    module = row.pruned()
    (MAGNITUDE if row is RANDOM else RANDOM).prune(module, amount=0.8)
    prune.remove(module, "weight")
    assert list(module._parameters) == ["weight", "bias"]


@every_stack
@every_method
def test_masks_may_change_after_the_step(row, stack):
    module = stack(row, row.module())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for step in range(4):
        module(inputs_for(module)).sum().backward()
        optimizer.step()
        row.prune(module, amount=row.amount + step / 10)
        optimizer.zero_grad()
        assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_the_weight_is_stale_until_the_next_forward(row):
    module = row.pruned()
    train(module)
    assert not torch.equal(module.weight, masked_weight(module))
    module(inputs_for(module))
    assert torch.equal(module.weight, masked_weight(module))


@every_stack
@every_method
def test_a_call_refreshes_the_weight(row, stack):
    module = stack(row, row.module())
    train(module)
    row.prune(module, amount=row.more)
    assert torch.equal(module.weight, masked_weight(module))


@every_method
def test_the_order_of_parameters_stays(row):
    module = row.module()
    assert list(module._parameters) == ["weight", "bias"]
    for amount in (row.amount, row.more):
        row.prune(module, amount=amount)
        assert list(module._parameters) == ["weight_orig", "bias"]
        assert list(module.state_dict()) == ["weight_orig", "bias", "weight_mask"]
    prune.remove(module, "weight")
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module.state_dict()) == ["weight", "bias"]


def test_the_order_of_parameters_stays_in_the_middle():
    module = nn.LSTM(6, 5, num_layers=2)
    names = list(module._parameters)
    wanted = [f"{name}_orig" if name == "weight_hh_l0" else name for name in names]
    magnitude_unstructured(module, "weight_hh_l0", 0.5)
    assert list(module._parameters) == wanted
    prune.remove(module, "weight_hh_l0")
    assert list(module._parameters) == names


def test_an_optimizers_state_fits_before_and_after():
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
def test_mask_changes_do_not_recompile(stack, compile_counter):
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


def test_training_a_compiled_model(compile_counter):
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


def test_deepcopy_of_a_compiled_model(compile_counter):
    model = small_model()
    compiled: Any = torch.compile(model, backend=compile_counter)
    compiled(IMAGES).sum().backward()
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(copied(IMAGES), model(IMAGES))
    window_structured(copied._orig_mod[0], amount=0.8)
    assert zeros(copied._orig_mod[0]) > zeros(model[0])
