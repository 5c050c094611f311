"""Errors of weights that are not finite name the layer, the update and its gradients."""

import pytest
import torch

from starfire_prune import Pruner
from tests.support.networks import LAYERS, SmallNet, backward, sgd


@pytest.mark.parametrize("layer", ["stem", "body", "point"])
def test_a_layer_with_wrong_gradients_is_named_with_its_update(layer):
    model = SmallNet()
    optimizer = sgd(model)
    pruner = Pruner(model, {"method": "ck", "amount": 0.6, "era": [0, 1]}, updates_per_epoch=3)
    for index in range(3):
        optimizer.zero_grad()
        backward(model, index)
        if index == 2:
            grad = next(p.grad for n, p in model.named_parameters() if n.startswith(f"{layer}.w"))
            assert grad is not None
            grad.fill_(torch.nan)
        optimizer.step()
        if index < 2:
            pruner.step()
    gradients = len(list(model.parameters()))
    message = (
        rf"^layer {layer}: .* values are not finite \(NaN or infinity\), after update 3; 1 of "
        rf"{gradients} gradients are not finite: {layer}.weight$"
    )
    with pytest.raises(ValueError, match=message):
        pruner.step()


def test_wrong_weights_with_finite_gradients_say_so():
    model = SmallNet()
    pruner = Pruner(model, {"method": "ck", "amount": 0.6, "era": [0, 1]}, updates_per_epoch=2)
    backward(model, 0)
    with torch.no_grad():
        model.body.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r", after update 1; 0 of \d+ gradients are not finite$"):
        pruner.step()


def test_without_gradients_only_the_update_is_named():
    model = SmallNet()
    pruner = Pruner(model, {"method": "ck", "amount": 0.6, "era": [0, 1]}, updates_per_epoch=2)
    with torch.no_grad():
        model.get_parameter(f"{LAYERS[1]}.weight")[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite \(NaN or infinity\), after update 1$"):
        pruner.step()
