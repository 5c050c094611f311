"""The pruner's phases, targets and masks. What follows the era is in test_engine_fixed.py."""

import copy
import gc
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import Pruner, RecipeError, ck_structured
from starfire_prune.masks.counts import count
from starfire_prune.methods.base import find_hook
from tests.support.networks import (
    LAYERS,
    SmallNet,
    backward,
    drift,
    equal_states,
    hook_count,
    one_epoch,
    sgd,
    train,
    train_step,
)

Settings = Mapping[str, object]
CK: Settings = {"method": "ck", "amount": 0.6, "era": [1, 3]}


# The dense phase


def test_dense_phase_hooks_nothing():
    model = SmallNet()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    pruner = Pruner(model, CK, updates_per_epoch=4)
    for _ in range(4):
        pruner.step()
    pruner.end_epoch(0)
    assert pruner.phase == "dense"
    assert hook_count(model) == 0
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert pruner.masks() == {}


def test_dense_phase_trains_as_without_a_pruner():
    models = [SmallNet(), SmallNet()]
    optimizers = [sgd(model) for model in models]
    pruner = Pruner(models[0], CK, updates_per_epoch=4, optimizer=optimizers[0])
    train(models[0], optimizers[0], pruner, range(4))
    for index in range(4):
        train_step(models[1], optimizers[1], index)
    assert equal_states(models[0].state_dict(), models[1].state_dict())


# The schedule


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("cubic", [0.578125, 0.875, 0.984375, 1.0]),
        ("cosine", [0.1464466, 0.5, 0.8535534, 1.0]),
    ],
)
def test_threshold_follows_the_schedule(schedule, shares):
    pruner = Pruner(SmallNet(), {**CK, "schedule": schedule, "era": [0, 2]}, updates_per_epoch=2)
    targets = []
    for epoch in range(2):
        for _ in range(2):
            pruner.step()
            targets.append(pruner.target_sparsity)
        pruner.end_epoch(epoch)
    assert targets == pytest.approx([0.6 * share for share in shares])
    assert targets[-1] == 0.6


def test_era_runs_from_its_first_epochs_first_update_to_its_last_epochs_last():
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Pruner(model, CK, updates_per_epoch=2)
    seen = []
    for epoch in range(4):
        for _ in range(2):
            train_step(model, optimizer, epoch)
            pruner.step()
            seen.append((epoch, pruner.phase, round(pruner.target_sparsity, 9)))
        pruner.end_epoch(epoch)
    assert seen == [
        (0, "dense", 0.0),
        (0, "dense", 0.0),
        (1, "era", 0.15),
        (1, "era", 0.3),
        (2, "era", 0.45),
        (2, "fixed", 0.6),
        (3, "fixed", 0.6),
        (3, "fixed", 0.6),
    ]
    assert pruner.epoch == 4


def test_era_begins_with_an_update_and_not_with_an_epoch():
    pruner = Pruner(SmallNet(), CK, updates_per_epoch=1)
    pruner.step()
    pruner.end_epoch(0)
    assert (pruner.epoch, pruner.phase) == (1, "dense")


def test_era_of_one_update():
    model = SmallNet()
    pruner = one_epoch(model, 1, method="ck")
    pruner.step()
    assert pruner.phase == "fixed"
    assert pruner.sparsity()["head"].zeros == 48
    pruner.end_epoch(0)
    pruner.check()


def test_trap_12_skipped_updates_do_not_count():
    pruner = one_epoch(SmallNet(), 4, method="ck")
    for updated in (False, True, False, False, True):
        pruner.step(updated=updated)
    assert pruner.phase == "era"
    assert pruner.target_sparsity == pytest.approx(0.3)


@pytest.mark.parametrize("method", ["window", "ck", "intra", "inter"])
@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_end_epoch_reaches_the_target_where_updates_were_skipped(method, n_steps):
    models = [SmallNet(), SmallNet()]
    short, whole = (one_epoch(model, 4, method=method) for model in models)
    for _ in range(n_steps):
        short.step()
    for _ in range(4 - n_steps):
        short.step(updated=False)
    assert short.phase != "fixed"
    short.end_epoch(0)
    for _ in range(4):
        whole.step()
    assert (short.phase, short.target_sparsity) == ("fixed", 0.6)
    assert short.mask_hash() == whole.mask_hash()  # the weights have not moved meanwhile
    short.check()


def test_only_the_eras_last_epoch_forces_the_target():
    pruner = Pruner(SmallNet(), {**CK, "era": [0, 2]}, updates_per_epoch=2)
    pruner.step()
    pruner.end_epoch(0)
    assert pruner.phase == "era"
    assert pruner.target_sparsity == pytest.approx(0.15)


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_wrong_epoch_is_refused(epoch):
    pruner = Pruner(SmallNet(), CK, updates_per_epoch=2)
    pruner.end_epoch(0)
    message = rf"^`epoch` \(={epoch}\) is not the current epoch, 1: call end_epoch once an epoch"
    with pytest.raises(ValueError, match=message):
        pruner.end_epoch(epoch)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        (0, ValueError, r"`updates_per_epoch` \(=0\) must be at least 1"),
        (2.0, TypeError, r"`updates_per_epoch` \(=2.0\) must be an int"),
        (True, TypeError, r"`updates_per_epoch` \(=True\) must be an int"),
    ],
)
def test_updates_per_epoch_is_checked(updates, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        Pruner(SmallNet(), CK, updates_per_epoch=updates)


# Hooks


@pytest.mark.parametrize("method", ["ck", "window"])
def test_trap_02_a_thousand_steps_leave_one_hook_and_no_container(method):
    model = SmallNet()
    pruner = Pruner(
        model,
        {"method": method, "amount": 0.6, "era": [0, 1], "resolution": 0.0},
        updates_per_epoch=1100,
    )
    for update in range(1000):
        if update % 50 == 0:
            drift(model, update)
        pruner.step()
    for name in LAYERS:
        hooks = list(model.get_submodule(name)._forward_pre_hooks.values())
        assert len(hooks) == 1
        assert not isinstance(hooks[0], prune.PruningContainer)


def test_trap_02_masks_follow_the_raw_weight_and_not_the_stale_one():
    model = SmallNet()
    pruner = one_epoch(model, 4, method="magnitude", fc="none")
    pruner.step()
    with torch.no_grad():
        model.body.weight_orig.copy_(torch.arange(864.0).view(12, 8, 3, 3))  # type: ignore
    pruner.step()
    mask = pruner.masks()["body.weight"].flatten()
    earlier = 130  # 15 % of 864
    assert not mask[:100].any()
    assert int((~mask[300:]).sum()) <= earlier


def test_trap_03_hooks_hold_no_masks_and_do_not_grow():
    model = SmallNet()
    pruner = one_epoch(model, 2000, method="window", exact_layer_sparsity=True, resolution=0.0)

    def held() -> tuple[int, list[list[str]]]:
        gc.collect()
        hooks = [find_hook(model.get_submodule(name), "weight")[1] for name in LAYERS]
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return tensors, [sorted(vars(hook)) for hook in hooks]

    for _ in range(10):
        pruner.step()
    before = held()
    for _ in range(500):
        pruner.step()
    tensors, attributes = held()
    assert tensors <= before[0]  # fewer where other tests' garbage has gone meanwhile
    assert attributes == before[1]
    for name in LAYERS:
        hook = find_hook(model.get_submodule(name), "weight")[1]
        assert not any(isinstance(value, Tensor) for value in vars(hook).values())


def test_masks_keep_their_memory_in_the_era():
    model = SmallNet()
    pruner = one_epoch(model, 10, method="ck")
    pruner.step()
    buffers = {name: id(mask) for name, mask in model.named_buffers() if "mask" in name}
    for _ in range(5):
        pruner.step()
    assert {name: id(mask) for name, mask in model.named_buffers() if "mask" in name} == buffers


def test_trap_05_channels_last_weights_get_the_same_masks():
    models = [SmallNet(), SmallNet().to(memory_format=torch.channels_last)]
    pruners = [one_epoch(model, 6, method="intra") for model in models]
    for pruner in pruners:
        for _ in range(6):
            pruner.step()
    assert pruners[0].mask_hash() == pruners[1].mask_hash()
    assert models[1].body.weight.is_contiguous(memory_format=torch.channels_last)


def test_trap_06_masks_change_between_backward_and_the_next_forward():
    model = SmallNet()
    optimizer = sgd(model)
    pruner = one_epoch(model, 8, method="window", exact_layer_sparsity=True, resolution=0.0)
    for update in range(4):  # two batches an update
        optimizer.zero_grad()
        backward(model, 2 * update)
        pruner.step(updated=False)
        backward(model, 2 * update + 1)
        optimizer.step()
        pruner.step()
    assert pruner.phase == "era"
    assert pruner.target_sparsity == pytest.approx(0.3)


def test_trap_08_sparsity_reads_the_masked_weight_and_not_the_stale_one():
    model = SmallNet()
    optimizer = sgd(model)
    pruner = one_epoch(model, 4, method="magnitude")
    train(model, optimizer, pruner, range(3))
    stale: Any = model.body.weight
    assert int((stale == 0).sum()) < count(0.45, 864)
    assert pruner.sparsity()["body"].zeros == count(0.45, 864)


def test_built_in_pruning_beforehand_is_kept():
    model = SmallNet()
    prune.l1_unstructured(model.body, "weight", 0.2)  # type: ignore[no-untyped-call]
    earlier = model.body.get_buffer("weight_mask").bool()
    pruner = one_epoch(model, 3, method="ck")
    pruner.step()
    assert pruner.masks()["body.weight"].dtype == torch.bool
    assert len(pruner.mask_hash()) == 64
    pruner.step()
    pruner.step()
    pruner.check()
    assert not (pruner.masks()["body.weight"] & ~earlier).any()
    assert hook_count(model) == 0


def test_built_in_pruning_within_the_era_is_kept_and_so_is_the_order_of_parameters():
    model = SmallNet()
    keys = list(model.state_dict())
    pruner = one_epoch(model, 4, method="ck")
    pruner.step()
    prune.l1_unstructured(model.body, "weight", 0.2)  # type: ignore[no-untyped-call]
    earlier = model.body.get_buffer("weight_mask").bool()
    for _ in range(3):
        pruner.step()
    assert not (pruner.masks()["body.weight"] & ~earlier).any()
    assert pruner.sparsity()["body"].pruned_kernels >= 7 * 8
    assert list(model.state_dict()) == keys
    pruner.check()


def test_pruning_by_hand_beforehand_counts_towards_the_amount():
    model = SmallNet()
    ck_structured(model.body, amount=0.3)
    earlier = model.body.get_buffer("weight_mask").clone()
    pruner = one_epoch(model, 3, method="ck")
    pruner.step()
    assert torch.equal(pruner.masks()["body.weight"], earlier)
    pruner.end_epoch(0)
    assert pruner.sparsity()["body"].pruned_kernels == 7 * 8


# Verification


def pruned(updates: int, n_steps: int) -> tuple[SmallNet, Pruner]:
    model = SmallNet()
    pruner = one_epoch(model, updates, method="ck")
    for _ in range(n_steps):
        pruner.step()
    return model, pruner


def test_check_names_the_layer_and_the_count_of_revived_weights():
    model, pruner = pruned(2, 2)
    pruner.check()
    gone = (~pruner.masks()["body.weight"]).nonzero()[:2]
    with torch.no_grad():
        for index in gone:
            model.body.weight[tuple(index)] = 1.0
    message = "^layer body: 2 pruned weights are not zero; step\\(\\) must follow each"
    with pytest.raises(RuntimeError, match=message):
        pruner.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-30])
def test_check_takes_no_value_but_zero(value):
    model, pruner = pruned(1, 1)
    with torch.no_grad():
        model.head.weight[~pruner.masks()["head.weight"]] = value
    with pytest.raises(RuntimeError, match=r"^layer head: 48 pruned weights are not zero"):
        pruner.check()


def test_check_in_the_era_does_not_read_the_stale_weight():
    model, pruner = pruned(4, 2)
    backward(model, 0)
    pruner.step()  # more zeros than the stale weight has
    pruner.check()


def test_check_names_the_layer_that_has_lost_its_hook():
    model, pruner = pruned(4, 2)
    pruner.check()
    prune.remove(model.point, "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(
        RuntimeError, match=r"^layer point has lost its pruning hook within the era"
    ):
        pruner.check()


def test_mask_hash_tells_masks_apart():
    hashes = []
    for n_steps in (0, 2, 3, 4):
        _, pruner = pruned(4, n_steps)
        _, again = pruned(4, n_steps)
        assert pruner.mask_hash() == again.mask_hash()
        hashes.append(pruner.mask_hash())
    assert len(set(hashes)) == 4


def test_mask_hash_sees_a_single_element():
    _, pruner = pruned(4, 2)
    before = pruner.mask_hash()
    mask = pruner.masks()["head.weight"]
    mask[9, 7] = ~mask[9, 7]
    after = pruner.mask_hash()
    assert after != before
    mask[9, 7] = ~mask[9, 7]
    assert pruner.mask_hash() == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_with_their_layer(value):
    model, pruner = pruned(4, 2)
    model.body.weight_orig.data[3, 2, 1, 0] = value  # type: ignore
    message = r"^layer body: `weight` of shape \(12, 8, 3, 3\) cannot be ranked: 1 of its 864"
    with pytest.raises(ValueError, match=message):
        pruner.end_epoch(0)


# What is pruned at all


class FullyShardedDataParallel(nn.Module):
    """As FSDP's wrapper is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_fsdp_is_refused():
    model = nn.Sequential(FullyShardedDataParallel(SmallNet()))
    with pytest.raises(ValueError, match=r"^the model's parameters are sharded \(FSDP\): .*Dist"):
        Pruner(model, CK, updates_per_epoch=1)


def test_settings_are_a_plain_mapping_in_the_users_own_loop():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10)
    )
    optimizer = sgd(model)
    settings = {"method": "ck", "amount": 0.6, "era": [1, 3]}
    pruner = Pruner(model, settings, updates_per_epoch=4, optimizer=optimizer)
    for epoch in range(4):
        for index in range(4):
            train_step(model, optimizer, index)
            pruner.step()
        pruner.end_epoch(epoch)
    pruner.check()
    assert (pruner.phase, pruner.sparsity().network) == ("fixed", 0.6)
    assert repr(pruner) == "Pruner(ck, 2 layers, phase='fixed', target_sparsity=0.6000)"


def test_a_layer_can_be_the_model_itself():
    model = nn.Conv2d(3, 8, 3)
    pruner = one_epoch(model, 2, method="ck")
    pruner.step()
    assert list(pruner.masks()) == ["weight"]
    again = one_epoch(nn.Conv2d(3, 8, 3), 2, method="ck")
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    pruner.step()
    assert math.isclose(pruner.sparsity().network, 15 / 24)


def test_unknown_keys_are_refused():
    with pytest.raises(RecipeError, match=r"^pruning: amuont: unknown key .*did you mean amount"):
        Pruner(SmallNet(), {**CK, "amuont": 0.6}, updates_per_epoch=1)
