"""Parameters that are replaced keep masked gradients, or the next step() raises an error."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import Pruner
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight
from tests.support.networks import LAYERS, SmallNet, backward, equal_states, sgd, train, train_step

Parts = tuple[nn.Module, torch.optim.Optimizer, Pruner]
SETTINGS: dict[str, object] = {"method": "ck", "amount": 0.6, "era": [1, 2]}


def trained(epochs: int) -> Parts:
    model = SmallNet()
    optimizer = sgd(model)
    pruner = Pruner(model, SETTINGS, updates_per_epoch=4, optimizer=optimizer)
    return go_on(model, optimizer, pruner, range(epochs))


def go_on(model: nn.Module, optimizer: Any, pruner: Pruner, epochs: range) -> Parts:
    for epoch in epochs:
        train(model, optimizer, pruner, range(epoch * 4, epoch * 4 + 4))
        pruner.end_epoch(epoch)
    return model, optimizer, pruner


def gradients_of_pruned(model: nn.Module, pruner: Pruner) -> int:
    model.zero_grad()
    masks = pruner.masks()
    inputs = torch.zeros(1, dtype=next(model.parameters()).dtype)
    if inputs.dtype == torch.float32:
        backward(model, 0)
    else:
        model(torch.randn(8, 3, 8, 8, dtype=inputs.dtype)).sum().backward()
    gradients: dict[str, Any] = {name: value.grad for name, value in model.named_parameters()}
    return sum(int(gradients[name][~mask].count_nonzero()) for name, mask in masks.items())


def test_gradients_are_masked_after_load_state_dict_assigns():
    model, _, pruner = trained(2)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert gradients_of_pruned(model, pruner) == 0
    train_step(model, sgd(model), 0)
    pruner.step()
    pruner.check()


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_of_model_optimizer_and_pruner_trains_as_the_original(epochs, copied):
    whole = trained(epochs)
    parts: Parts = copied(whole)
    assert parts[0] is not whole[0]
    go_on(*whole, range(epochs, 4))
    go_on(*parts, range(epochs, 4))
    assert equal_states(parts[0].state_dict(), whole[0].state_dict())
    assert parts[2].mask_hash() == whole[2].mask_hash()
    assert gradients_of_pruned(parts[0], parts[2]) == 0


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_training_a_copy_without_its_pruner_is_an_error(epochs):
    model, optimizer, pruner = trained(epochs)
    model, optimizer = copy.deepcopy((model, optimizer))
    with pytest.raises(PruningError, match=r"copied.*copy its pruner"):
        go_on(model, optimizer, pruner, range(epochs, 4))


def double(model: nn.Module) -> None:
    model.double()


def by_hand(model: nn.Module) -> None:
    for name in LAYERS:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(layer_weight(module).detach().clone())


@pytest.mark.parametrize(
    ("replace", "mode"),
    [
        (double, torch.__future__.set_overwrite_module_params_on_conversion),
        (double, torch.__future__.set_swap_module_params_on_conversion),
        (by_hand, None),
    ],
    ids=["overwritten", "swapped", "by hand"],
)
def test_a_replaced_parameter_is_an_error_until_the_masks_are_loaded_again(
    replace: Callable[[nn.Module], None], mode: Callable[[bool], None] | None
):
    model, _, pruner = trained(2)
    if mode is not None:
        mode(True)
    try:
        replace(model)
    finally:
        if mode is not None:
            mode(False)
    assert gradients_of_pruned(model, pruner) > 0
    with pytest.raises(PruningError, match=r"the parameter of layer stem was replaced"):
        pruner.step()
    pruner.load_state_dict(pruner.state_dict())
    assert gradients_of_pruned(model, pruner) == 0
    sgd(model).step()
    pruner.step()
    pruner.check()


def test_a_conversion_in_place_needs_nothing():
    model, _, pruner = trained(2)
    model.double()
    assert gradients_of_pruned(model, pruner) == 0
    pruner.step()
    pruner.check()


def test_a_step_without_any_update_is_an_error_in_the_fixed_phase():
    _, _, pruner = trained(2)
    pruner.step(updated=False)
    with pytest.raises(PruningError, match=r"step\(updated=False\)"):
        pruner.step()


def test_an_optimizer_that_writes_to_data_is_noticed_by_its_gradients():
    model, _, pruner = trained(2)
    for _ in range(2):
        backward(model, 0)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data.sub_(0.1 * parameter.grad)  # does not raise torch's version
        model.zero_grad()
        pruner.step()
    pruner.check()


def test_a_pickled_model_with_frozen_masks_loads_weights_without_the_package():
    model, _, _ = trained(2)
    pickled = pickle.dumps(model.get_submodule("body"))
    assert b"starfire_prune." not in pickled
    unpickled = pickle.loads(pickled)
    for _ in range(2):
        unpickled.load_state_dict(SmallNet(seed=3).body.state_dict())
    assert torch.equal(unpickled.weight, SmallNet(seed=3).body.weight)
