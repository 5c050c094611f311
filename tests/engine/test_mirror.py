"""Copies of the model, such as weight averages, that follow through all phases."""

import copy
import re
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from starfire_prune import Pruner
from tests.support.networks import SmallNet, equal_states, one_epoch, sgd, snapshot, train_step

DECAY = 0.9
ERA, LAST = 8, 14
METHODS = ["ck", "window", "intra", "inter"]


def lerped(average: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of the exponential average, written out, over the parameters' plain names."""
    return {
        name: DECAY * average[name] + (1 - DECAY) * value
        for name, value in plain(state).items()
        if value.is_floating_point()
    }


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removesuffix("_orig"): value
        for name, value in state.items()
        if not name.endswith("_mask")
    }


def assert_exactly_sparse(pruner: Pruner, average: nn.Module) -> None:
    for name, mask in pruner.masks().items():
        weight = average.get_parameter(name)
        assert not weight[~mask].any()
        assert (weight[mask] != 0).all()


@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_trap_09_an_average_made_before_the_era_follows_through_all_phases(
    method, foreach, exclude_buffers
):
    model = SmallNet()
    optimizer = sgd(model)
    pruner = Pruner(
        model, {"method": method, "amount": 0.6, "era": [1, 2]}, updates_per_epoch=ERA // 2
    )
    ema = ModelEmaV3(model, decay=DECAY, foreach=foreach, exclude_buffers=exclude_buffers)
    assert pruner.mirror(ema.module) is ema.module
    expected = plain(snapshot(model))
    for index in range(LAST):
        train_step(model, optimizer, index)
        pruner.step()
        if pruner.epoch < 2 and index % (ERA // 2) == ERA // 2 - 1:
            pruner.end_epoch(pruner.epoch)
        ema.update(model)
        expected = lerped(expected, snapshot(model))
        assert list(ema.module.state_dict()) == list(model.state_dict())
        for name, mask in pruner.masks().items():
            if pruner.phase == "fixed":
                expected[name] *= mask
            else:
                assert torch.equal(ema.module.get_buffer(f"{name}_mask"), mask)
    own = {name: value for name, value in snapshot(ema.module).items() if name in expected}
    if exclude_buffers:
        expected = {name: value for name, value in expected.items() if "running" not in name}
        own = {name: value for name, value in own.items() if "running" not in name}
    assert len(own) >= 13
    torch.testing.assert_close(own, expected)
    assert_exactly_sparse(pruner, ema.module)
    pruner.check()


@pytest.mark.parametrize("copied_at", [0, 4, 10])
@pytest.mark.parametrize("mirrored_at", [0, 4, 8, 10])
@pytest.mark.parametrize("method", ["ck", "inter"])
def test_a_copy_of_any_phase_can_be_mirrored_in_the_same_phase_or_later(
    method, mirrored_at, copied_at
):
    if copied_at > mirrored_at:
        copied_at = mirrored_at
    model = SmallNet()
    optimizer = sgd(model)
    pruner = one_epoch(model, ERA, method=method)
    for index in range(LAST):
        if index == copied_at:
            ema = ModelEmaV3(model, decay=DECAY)
        if index == mirrored_at:
            pruner.mirror(ema.module)
        train_step(model, optimizer, index)
        pruner.step()
        if index >= mirrored_at:
            ema.update(model)
            assert list(ema.module.state_dict()) == list(model.state_dict())
            pruner.check()
    assert_exactly_sparse(pruner, ema.module)


def test_a_mirror_has_one_hook_a_layer_in_the_era_and_computes_with_its_own_weights():
    model = SmallNet()
    optimizer = sgd(model)
    pruner = one_epoch(model, ERA, method="ck")
    average = copy.deepcopy(model)
    before = plain(snapshot(average))
    pruner.mirror(average)
    for index in range(4):
        train_step(model, optimizer, index)
        pruner.step()
    assert len(average.body._forward_pre_hooks) == 1
    average.eval()(torch.zeros(1, 3, 8, 8))
    weight: Any = average.body.weight
    assert torch.equal(weight, before["body.weight"] * pruner.masks()["body.weight"])


def test_several_mirrors_follow():
    model = SmallNet()
    pruner = one_epoch(model, 3, method="ck")
    mirrors = [pruner.mirror(copy.deepcopy(model)) for _ in range(2)]
    for _ in range(3):
        pruner.step()
    for mirror in mirrors:
        assert equal_states(snapshot(mirror), snapshot(model))


def test_a_mirror_of_another_dtype_follows():
    model = SmallNet()
    pruner = one_epoch(model, 2, method="ck")
    mirror = pruner.mirror(copy.deepcopy(model).double())
    pruner.step()
    pruner.step()
    assert mirror.get_parameter("body.weight").dtype == torch.float64
    assert_exactly_sparse(pruner, mirror)


def test_torchs_averaged_model_follows():
    model = SmallNet()
    optimizer = sgd(model)
    pruner = one_epoch(model, 4, method="ck")
    average_fn: Any = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=average_fn)
    pruner.mirror(average.module)
    for index in range(8):
        train_step(model, optimizer, index)
        pruner.step()
        average.update_parameters(model)
    assert_exactly_sparse(pruner, average.module)


@pytest.mark.parametrize("n_updates", [2, 6, 10])
def test_a_mirror_follows_a_loaded_state(n_updates):
    def run() -> tuple[SmallNet, torch.optim.Optimizer, Pruner, ModelEmaV3]:
        model = SmallNet()
        optimizer = sgd(model)
        settings = {"method": "ck", "amount": 0.6, "era": [1, 2]}
        pruner = Pruner(model, settings, updates_per_epoch=4, optimizer=optimizer)
        ema = ModelEmaV3(model, decay=DECAY)
        pruner.mirror(ema.module)
        return model, optimizer, pruner, ema

    def train(
        parts: tuple[SmallNet, torch.optim.Optimizer, Pruner, ModelEmaV3], indices: range
    ) -> None:
        model, optimizer, pruner, ema = parts
        for index in indices:
            train_step(model, optimizer, index)
            pruner.step()
            ema.update(model)
            if index % 4 == 3:
                pruner.end_epoch(pruner.epoch)

    first, second = run(), run()
    train(first, range(n_updates))
    second[2].load_state_dict(first[2].state_dict())
    second[0].load_state_dict(snapshot(first[0]))
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    second[3].module.load_state_dict(snapshot(first[3].module))
    train(first, range(n_updates, 12))
    train(second, range(n_updates, 12))
    assert equal_states(snapshot(first[3].module), snapshot(second[3].module))
    assert_exactly_sparse(second[2], second[3].module)


def test_check_reads_the_mirrors():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    mirror = pruner.mirror(copy.deepcopy(model))
    pruner.step()
    mirror.get_parameter("head.weight").data.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"^layer head: 48 pruned weights are not zero"):
        pruner.check()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Linear(2, 2),
            "the mirrored model has no layer stem with a weight of shape (8, 3, 3, 3)",
        ),
        (
            nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3)}),
            "the mirrored model has no layer stem with a weight of shape (8, 3, 3, 3)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_a_model_that_does_not_match_is_refused(other, message):
    pruner = one_epoch(SmallNet(), 1, method="ck")
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pruner.mirror(other)
    pruner.step()
    assert list(other.state_dict()) == keys


def test_the_pruned_model_itself_and_a_second_time_are_refused():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    mirror = pruner.mirror(copy.deepcopy(model))
    for known in (model, mirror):
        with pytest.raises(ValueError, match=r"^the model is the pruned one itself, or mirrored"):
            pruner.mirror(known)
    pruner.step()
    pruner.check()
