"""After the era pruned weights stay zero, and training is as if they did not exist."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import prune

from starfire_prune import Pruner
from tests.support.networks import (
    LAYERS,
    SmallNet,
    backward,
    batch,
    equal_states,
    one_epoch,
    snapshot,
    train_step,
)

ERA, STEPS_AFTER = 6, 15
Build = Callable[[nn.Module], torch.optim.Optimizer]


def of_torch(kind: Any, **options: Any) -> Build:
    return lambda model: kind(model.parameters(), **options)


def of_timm(name: str, **options: Any) -> Build:
    return lambda model: create_optimizer_v2(model, opt=name, **options)


SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAM: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
OPTIMIZERS: dict[str, Build] = {
    "sgd": of_torch(torch.optim.SGD, **SGD, foreach=False),
    "sgd-foreach": of_torch(torch.optim.SGD, **SGD, foreach=True),
    "nesterov": of_torch(torch.optim.SGD, **SGD, nesterov=True, foreach=False),
    "nesterov-foreach": of_torch(torch.optim.SGD, **SGD, nesterov=True, foreach=True),
    "adam": of_torch(torch.optim.Adam, **ADAM, foreach=False),
    "adam-foreach": of_torch(torch.optim.Adam, **ADAM, foreach=True),
    "amsgrad": of_torch(torch.optim.Adam, **ADAM, amsgrad=True),
    "adamw": of_torch(torch.optim.AdamW, **ADAM, foreach=False),
    "adamw-foreach": of_torch(torch.optim.AdamW, **ADAM, foreach=True),
    "lamb": of_timm("lamb", lr=0.02, weight_decay=0.05, foreach=False),
    "lamb-foreach": of_timm("lamb", lr=0.02, weight_decay=0.05, foreach=True),
}
MUON = {"muon": of_timm("muon", lr=0.02, weight_decay=0.05)}
CLIPPED = pytest.mark.parametrize("max_norm", [None, 0.5], ids=["unclipped", "clipped"])


def by_name(optimizers: dict[str, Build]) -> Any:
    return pytest.mark.parametrize("build", optimizers.values(), ids=optimizers)


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float | None
) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def loss_of(outputs: Tensor, index: int) -> Tensor:
    return functional.cross_entropy(outputs, batch(index)[1])


def watch_zeros(model: nn.Module, masks: dict[str, Tensor]) -> list[str]:
    """Notes every forward pass of a layer, and whether its pruned weights were zero in it."""
    seen: list[str] = []

    def note(name: str) -> Any:
        def hook(module: Any, _: object) -> None:
            alive = int((module.weight[~masks[f"{name}.weight"]] != 0).sum())
            seen.append(f"{alive} in {name}" if alive else "zero")

        return hook

    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    return seen


class MaskedReference:
    """A model that multiplies its weights by given masks in every forward pass, and no more.

    It starts from the weights and the optimizer's state of the era's last update, both masked.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        optimizer_state: dict[str, Any],
        masks: dict[str, Tensor],
        build: Build,
    ) -> None:
        self.model, self.masks = SmallNet(), masks
        self.model.load_state_dict(
            {name: value * masks[name] if name in masks else value for name, value in state.items()}
        )
        self.optimizer = build(self.model)
        self.optimizer.load_state_dict(optimizer_state)
        for name, parameter in self.model.named_parameters():
            for value in self.optimizer.state[parameter].values():
                if name in masks and value.shape == parameter.shape:
                    value *= masks[name]

    def step(self, index: int, max_norm: float | None) -> None:
        weights = {
            name: parameter * self.masks[name]
            for name, parameter in self.model.named_parameters()
            if name in self.masks
        }
        outputs = functional_call(self.model, weights, (batch(index)[0],))
        update(self.model, self.optimizer, loss_of(outputs, index), max_norm)


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removesuffix("_orig"): value
        for name, value in state.items()
        if not name.endswith("_mask")
    }


def parameters_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@CLIPPED
@by_name(OPTIMIZERS)
def test_trap_07_training_goes_on_as_if_pruned_weights_did_not_exist(build, max_norm):
    model = SmallNet()
    optimizer = build(model)
    pruner = Pruner(
        model,
        {"method": "window", "exact_layer_sparsity": True, "amount": 0.6, "era": [0, 1]},
        updates_per_epoch=ERA,
        optimizer=optimizer,
    )
    for index in range(ERA):
        update(model, optimizer, loss_of(model(batch(index)[0]), index), max_norm)
        state = plain_names(snapshot(model))
        optimizer_state = copy.deepcopy(optimizer.state_dict())
        pruner.step()
    assert pruner.phase == "fixed"
    assert optimizer_state["state"]
    reference = MaskedReference(state, optimizer_state, pruner.masks(), build)
    for index in range(ERA, ERA + STEPS_AFTER):
        update(model, optimizer, loss_of(model(batch(index)[0]), index), max_norm)
        pruner.step()
        reference.step(index, max_norm)
        assert equal_states(model.state_dict(), reference.model.state_dict()), index
    pruner.check()


@CLIPPED
@by_name(OPTIMIZERS | MUON)
def test_trap_07_pruned_weights_are_zero_in_every_forward_pass(build, max_norm):
    model = SmallNet()
    optimizer = build(model)
    pruner = one_epoch(model, ERA, method="ck")  # without the optimizer's state
    for index in range(ERA):
        update(model, optimizer, loss_of(model(batch(index)[0]), index), max_norm)
        pruner.step()
    before = snapshot(model)
    seen = watch_zeros(model, pruner.masks())
    for index in range(ERA, ERA + STEPS_AFTER):
        update(model, optimizer, loss_of(model(batch(index)[0]), index), max_norm)
        pruner.step()
    assert seen == ["zero"] * (STEPS_AFTER * len(LAYERS))
    assert not equal_states(before, snapshot(model))
    pruner.check()


def test_trap_07_without_the_package_one_update_revives_pruned_weights():
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    prune.l1_unstructured(model.body, "weight", 0.6)  # type: ignore[no-untyped-call]
    train_step(model, optimizer, 0)
    gone = model.body.get_buffer("weight_mask") == 0
    prune.remove(model.body, "weight")  # type: ignore[no-untyped-call]
    assert not model.body.weight[gone].any()
    train_step(model, optimizer, 1)
    assert model.body.weight[gone].count_nonzero() > 0.9 * gone.sum()


def test_gradients_are_masked_where_they_arise():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    pruner.step()
    backward(model, 0)
    for name, mask in pruner.masks().items():
        gradient: Any = model.get_parameter(name).grad
        assert not gradient[~mask].any()
        assert gradient[mask].any()


def test_accumulated_gradients_are_masked_too():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    pruner.step()
    for index in range(3):
        backward(model, index)
        pruner.step(updated=False)
    for name, mask in pruner.masks().items():
        gradient: Any = model.get_parameter(name).grad
        assert not gradient[~mask].any()


def test_gradients_that_were_accumulated_in_the_era_are_masked_at_its_end():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    backward(model, 0)
    pruner.step()
    assert pruner.phase == "fixed"
    backward(model, 1)
    for name, mask in pruner.masks().items():
        gradient: Any = model.get_parameter(name).grad
        assert not gradient[~mask].any()


def test_a_layer_that_is_frozen_at_the_end_of_the_era_trains_on_sparse_later():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    model.body.weight.requires_grad_(False)
    pruner.step()
    model.body.weight.requires_grad_(True)
    backward(model, 0)
    gradient: Any = model.body.weight.grad
    assert not gradient[~pruner.masks()["body.weight"]].any()


@by_name(OPTIMIZERS)
def test_optimizer_state_of_pruned_weights_is_zeroed_at_the_end_of_the_era(build):
    model = SmallNet()
    optimizer = build(model)
    pruner = Pruner(
        model,
        {"method": "ck", "amount": 0.6, "era": [0, 1]},
        updates_per_epoch=2,
        optimizer=optimizer,
    )
    train_step(model, optimizer, 0)
    pruner.step()
    train_step(model, optimizer, 1)
    before = {id(value): value.clone() for value in state_tensors(optimizer, model.body)}
    pruner.step()
    mask = pruner.masks()["body.weight"]
    after = list(state_tensors(optimizer, model.body))
    assert len(before) == len(after) > 0
    for value in after:
        assert torch.equal(value, before[id(value)] * mask)


def state_tensors(optimizer: torch.optim.Optimizer, conv: nn.Conv2d) -> Iterable[Tensor]:
    parameter = conv._parameters.get("weight_orig", conv._parameters.get("weight"))
    assert parameter is not None
    for value in optimizer.state[parameter].values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value


def test_an_optimizer_without_state_yet_is_fine():
    model = SmallNet()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(
        model,
        {"method": "ck", "amount": 0.6, "era": [0, 1]},
        updates_per_epoch=1,
        optimizer=optimizer,
    )
    pruner.step()
    assert len(optimizer.state) == 0
    train_step(model, optimizer, 0)
    pruner.step()
    pruner.check()


def test_frozen_layers_that_are_named_are_pruned_and_stay_frozen():
    model = SmallNet()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = one_epoch(model, 2, method="ck", include=["*", "stem"])
    for index in range(4):
        train_step(model, optimizer, index)
        pruner.step()
    assert not model.stem.weight.requires_grad
    assert torch.equal(model.stem.weight, before * pruner.masks()["stem.weight"])


def test_trap_09_parameters_keep_their_identity_and_order_through_all_phases():
    model = SmallNet()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    pruner = one_epoch(model, 3, method="inter")
    for _ in range(3):
        pruner.step()
        own = list(model.parameters())
        assert all(now is then for now, then in zip(own, parameters, strict=True))
        assert list(plain_names(model.state_dict())) == keys
    assert list(model.state_dict()) == keys
    assert pruner.phase == "fixed"


def test_trap_09_an_optimizer_of_the_dense_model_trains_all_phases():
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    names = parameters_order(model, optimizer)
    pruner = one_epoch(model, 2, method="ck")
    pruner.step()
    now = [name.removesuffix("_orig") for name in parameters_order(model, optimizer)]
    assert now == names
    pruner.step()
    assert parameters_order(model, optimizer) == names


def test_a_plain_state_dict_of_the_fixed_phase_loads_into_a_fresh_model():
    model, fresh = SmallNet(), SmallNet(seed=1)
    pruner = one_epoch(model, 1, method="ck")
    pruner.step()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert equal_states(fresh.state_dict(), model.state_dict())
