"""Plain states, tied weights, and masks from files, with which training continues."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import (
    apply_masks,
    ck_structured,
    fc_fine,
    load_masks,
    load_pruned,
    load_pruned_model,
)
from starfire_prune.serialization.codec import bits_of
from starfire_prune.serialization.state import check_tied, plain_state_dict
from tests.serialization.test_pruned import every_form, pruned, same, saved
from tests.support.networks import LAYERS, SmallNet, sgd, train_step

# Masks


@every_form
@pytest.mark.parametrize("hooked", [True, False])
def test_a_layer_that_is_used_twice_comes_back(form, hooked, tmp_path):
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    if not hooked:
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    model = nn.Sequential(layer, nn.ReLU(), layer)
    path = saved(tmp_path, form, model)
    state, masks = load_pruned(path), load_masks(path)
    assert sorted(state) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 8, "2.weight": 8}
    layer = nn.Linear(4, 4)
    loaded = apply_masks(load_pruned_model(path, nn.Sequential(layer, nn.ReLU(), layer)), masks)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    assert len(layer._forward_pre_hooks) == 1


@every_form
@pytest.mark.parametrize("phase", ["era", "fixed"])
def test_the_masks_come_back(form, phase, tmp_path):
    model, pruner = pruned(phase)
    assert same(load_masks(saved(tmp_path, form, model, pruner=pruner)), pruner.masks())


@every_form
def test_before_the_era_nothing_is_masked(form, tmp_path):
    model, pruner = pruned("dense")
    with torch.no_grad():
        model.body.weight[0] = 0.0
    masks = load_masks(saved(tmp_path, form, model, pruner=pruner))
    assert list(masks) == [f"{name}.weight" for name in LAYERS]
    assert all(bool(mask.all()) for mask in masks.values())


@every_form
def test_kept_weights_that_are_zero_are_kept_by_the_mask(form, tmp_path):
    model, pruner = pruned()
    kept = pruner.masks()["body.weight"].clone()
    with torch.no_grad():
        model.body.weight[:6] = 0.0
    path = saved(tmp_path, form, model, pruner=pruner)
    assert torch.equal(load_masks(path)["body.weight"], kept)


@every_form
def test_of_an_average_the_masks_are_those_of_the_model(form, tmp_path):
    model, pruner = pruned("dense")
    average = pruner.mirror(copy.deepcopy(model))
    for _ in range(3):
        train_step(model, sgd(model), 0)
        pruner.step()
        if pruner.state_dict()["epoch_updates"] == 2:
            pruner.end_epoch(pruner.epoch)
    path = saved(tmp_path, form, average, pruner=pruner)
    assert same(load_masks(path), pruner.masks())


@every_form
def test_without_hooks_and_pruner_zeros_are_what_is_pruned(form, tmp_path):
    model, pruner = pruned()
    masks = {name: mask.clone() for name, mask in pruner.masks().items()}
    assert same(load_masks(saved(tmp_path, form, model)), masks)


def test_negative_zeros_of_removed_hooks_are_pruned(tmp_path):
    model = nn.Sequential(nn.Linear(20, 20))
    nn.init.constant_(model.get_parameter("0.weight"), -1.0)
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    path = saved(tmp_path, "compressed", model)
    assert int(load_masks(path)["0.weight"].sum()) == 200
    assert not bits_of(load_pruned(path)["0.weight"])[~load_masks(path)["0.weight"]].any()


# Training on


@pytest.fixture
def reloaded(tmp_path: Path) -> tuple[SmallNet, dict[str, Tensor]]:
    path = saved(tmp_path, "compressed")
    model = load_pruned_model(path, SmallNet(seed=1))
    assert isinstance(model, SmallNet)
    return model, load_masks(path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    ],
    ids=["sgd", "adamw"],
)
def test_a_reloaded_model_trains_on_with_the_same_masks(
    when: str,
    make: Callable[..., torch.optim.Optimizer],
    reloaded: tuple[SmallNet, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    model, masks = reloaded
    before = plain_state_dict(model)
    if when == "before":
        optimizer = make(model.parameters())
        apply_masks(model, masks)
    else:
        apply_masks(model, masks)
        optimizer = make(model.parameters())
    for update in range(4):
        train_step(model, optimizer, update)
    path = saved(tmp_path, "compressed", model)
    after = load_pruned(path)
    assert same(load_masks(path), masks)
    for name, mask in masks.items():
        assert not bits_of(after[name])[~mask].any()
        assert not torch.equal(after[name], before[name])


def test_the_masks_are_those_of_torchs_pruning(reloaded):
    model, masks = reloaded
    apply_masks(model, masks)
    assert prune.is_pruned(model)
    assert list(plain_state_dict(model)) == list(SmallNet().state_dict())
    copy.deepcopy(model)
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert torch.equal(layer.get_buffer("weight_mask"), masks[f"{name}.weight"])
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    assert list(model.state_dict()) == list(SmallNet().state_dict())


def test_a_method_applied_to_loaded_masks_prunes_more(reloaded):
    model, masks = reloaded
    apply_masks(model, masks)
    fc_fine(model.head, amount=0.7)
    mask = model.head.get_buffer("weight_mask")
    assert int(mask.sum()) == 24
    assert not bool((mask & ~masks["head.weight"]).any())


def mask_for(kind: str) -> tuple[dict[str, Tensor], str]:
    ones = torch.ones(12, 8, 3, 3, dtype=torch.bool)
    return {
        "unknown": ({"bdy.weight": ones}, "no parameter 'bdy.weight'; did you mean body.weight?"),
        "none": ({"body.scale": ones}, "the model has no parameter 'body.scale'"),
        "shape": ({"body.weight": ones[1:]}, "torch.bool of shape (11, 8, 3, 3), must be bool of"),
        "dtype": ({"body.weight": ones.float()}, "the mask of body.weight, torch.float32 of shape"),
        "twice": ({"stem.weight": ones}, "stem.weight is pruned already: make that permanent by"),
    }[kind]


@pytest.mark.parametrize("kind", ["unknown", "none", "shape", "dtype", "twice"])
def test_masks_that_do_not_fit_are_refused_before_anything_changes(kind):
    model = SmallNet()
    ck_structured(model.stem, amount=0.5)
    good = {"head.weight": torch.ones(10, 8, dtype=torch.bool)}
    masks, message = mask_for(kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_masks(model, {**good, **masks})
    assert "weight_orig" not in model.head._parameters


# Tensors that share memory

MEMORY = torch.arange(12.0)
WHOLE = MEMORY.view(3, 4)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (MEMORY.view(3, 4), WHOLE + 1),
        (WHOLE.t(), WHOLE.t() + 1),
        (MEMORY[4:8], torch.zeros(4)),
        (WHOLE.t(), WHOLE.t().masked_fill(WHOLE.t() == 5, 0.0)),
        (MEMORY.view(torch.int32)[:2], torch.tensor([1, 2], dtype=torch.int32)),
    ],
)
def test_contents_that_overwrite_each_other_are_refused(other, differing):
    targets: dict[str, Tensor] = {"a": WHOLE, "b": other, "c": torch.zeros(2)}
    before = MEMORY.clone()
    check_tied(targets, {"a": WHOLE, "b": other, "c": torch.ones(2)}.__getitem__)
    with pytest.raises(ValueError, match=r"tensors 'a' and 'b' share memory"):
        check_tied(targets, {"a": WHOLE, "b": differing, "c": torch.ones(2)}.__getitem__)
    assert torch.equal(MEMORY, before)


def test_parts_of_one_memory_that_do_not_overlap_may_differ():
    targets = {"a": MEMORY[:6], "b": MEMORY[6:], "none": MEMORY[:0]}
    check_tied(targets, {"a": torch.ones(6), "b": torch.zeros(6)}.__getitem__)


def test_contents_of_another_dtype_are_compared_as_they_will_be():
    half = torch.zeros(2, dtype=torch.float16)
    content = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    check_tied({"a": half, "b": half}, lambda _: content)
