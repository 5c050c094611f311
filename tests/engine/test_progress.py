"""Counting: eras in updates, epochs of more or fewer updates, and forgotten ends of epochs."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from starfire_prune import Pruner, RecipeError
from starfire_prune.engine.progress import era_in_updates
from starfire_prune.engine.settings import parse_pruning
from starfire_prune.utils.modules import layer_weight
from tests.support.networks import SmallNet, equal_states, sgd, snapshot, train_step
from tests.support.pruned_runs import UPDATES, Run, assert_same

CK = {"method": "ck", "amount": 0.6}


def update(pruner: Pruner, updated: bool = True) -> None:
    """An update that leaves all weights as they are."""
    with torch.no_grad():
        for layer in pruner.layers.values():
            layer_weight(layer.module).add_(0.0)
    pruner.step(updated)


def targets(pruner: Pruner, updates: Sequence[int], *, epochs: bool = True) -> list[list[float]]:
    """The share of the target after each update, of epochs of so many updates."""
    seen: list[list[float]] = []
    for epoch, count in enumerate(updates):
        seen.append([])
        for _ in range(count):
            update(pruner)
            seen[-1].append(round(pruner.target_sparsity / 0.6, 9))
        if epochs:
            pruner.end_epoch(epoch)
    return seen


# Eras in updates


def test_an_era_in_updates_prunes_from_its_first_update_to_the_one_before_its_end():
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [2, 6]})
    seen = []
    for _ in range(7):
        update(pruner)
        seen.append((pruner.phase, round(pruner.target_sparsity, 9)))
    dense, era, fixed = ("dense", 0.0), "era", ("fixed", 0.6)
    assert seen == [dense, dense, (era, 0.15), (era, 0.3), (era, 0.45), fixed, fixed]
    assert pruner.sparsity()["head"].zeros == 48


def test_an_era_in_updates_begins_with_update_0():
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [0, 1]})
    update(pruner)
    assert pruner.phase == "fixed"


@pytest.mark.parametrize("updates", [[8], [1, 5, 2], [3, 3, 2]])
def test_an_era_in_updates_does_not_depend_on_epochs(updates):
    whole = Pruner(SmallNet(), {**CK, "era_updates": [2, 6]})
    by_epoch = Pruner(SmallNet(), {**CK, "era_updates": [2, 6]}, updates_per_epoch=3)
    (expected,) = targets(whole, [8], epochs=False)
    assert [share for epoch in targets(by_epoch, updates) for share in epoch] == expected
    assert by_epoch.mask_hash() == whole.mask_hash()


def test_an_era_in_updates_counts_updates_that_happened():
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [1, 3]})
    for updated in (False, True, False, True, False):
        update(pruner, updated)
    assert pruner.phase == "era"
    assert pruner.target_sparsity == pytest.approx(0.3)


def test_an_era_in_updates_trains_as_the_same_era_in_epochs():
    in_epochs, in_updates = Run(), Run(era=None, era_updates=[UPDATES, 3 * UPDATES])
    for updates in range(1, 4 * UPDATES):
        assert_same(in_epochs.train_until(updates), in_updates.train_until(updates))


@pytest.mark.parametrize("updates", [3, 5, 9, 14])
def test_a_run_with_an_era_in_updates_resumes_bit_for_bit(updates):
    settings: dict[str, Any] = {"era": None, "era_updates": [4, 12], "schedule": "cubic"}
    whole = Run(**settings).train_until(16)
    resumed = Run(seed=1, **settings).resume(Run(**settings).train_until(updates))
    assert_same(resumed.train_until(16), whole)


def test_a_run_with_an_era_in_updates_may_resume_with_other_epochs():
    saved = Pruner(SmallNet(), {**CK, "era_updates": [1, 3]}, updates_per_epoch=2)
    update(saved)
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [1, 3]})
    pruner.load_state_dict(saved.state_dict())
    assert pruner.state_dict() == {**saved.state_dict(), "updates_per_epoch": None}
    update(pruner)
    assert pruner.target_sparsity == pytest.approx(0.3)


def test_skipped_epochs_count_their_updates():
    for updates, updates_per_epoch in ((5, 5), (4, None)):
        settings = {**CK, "era_updates": [5, 7]}
        pruner = Pruner(SmallNet(), settings, updates_per_epoch=updates_per_epoch)
        pruner.skip_dense(1, None if updates_per_epoch else updates)
        phases = []
        for _ in range(3):
            update(pruner)
            phases.append(pruner.phase)
        assert phases[:2] == (["era", "fixed"] if updates == 5 else ["dense", "era"])


def test_skipping_without_the_number_of_updates_is_refused():
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [5, 7]})
    with pytest.raises(ValueError, match=r"^`updates` is missing, by which `pruning.era_updates`"):
        pruner.skip_dense(1)
    with pytest.raises(ValueError, match=r"^`updates` \(=6\) must be in 0..5, where the era begi"):
        pruner.skip_dense(1, updates=6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {},
            "pruning: era: is required ([first, end]: prunes from epoch first to epoch end - 1, "
            "0-based), or era_updates, which counts updates",
        ),
        (
            {"era": [1, 2], "era_updates": [10, 20]},
            "pruning: era_updates: can't be given beside era (got [10, 20]); remove one of them",
        ),
        (
            {"era_updates": [20, 10]},
            "pruning: era_updates: must be two updates [first, end] with 0 <= first < end (got "
            "[20, 10]); [1000, 5000] prunes in the updates 1000 to 4999",
        ),
    ],
)
def test_settings_without_exactly_one_era_are_refused(settings, text):
    with pytest.raises(RecipeError) as caught:
        parse_pruning({**CK, **settings})
    assert str(caught.value) == text


def test_an_era_in_epochs_needs_the_updates_of_an_epoch():
    with pytest.raises(TypeError, match=r"^`updates_per_epoch` is missing, by which `pruning.era`"):
        Pruner(SmallNet(), {**CK, "era": [0, 1]})


@pytest.mark.parametrize(
    ("settings", "expected"), [({"era": [2, 5]}, (8, 20)), ({"era_updates": [3, 9]}, (3, 9))]
)
def test_eras_in_updates(settings, expected):
    assert era_in_updates(parse_pruning({**CK, **settings}), 4) == expected


# Epochs of more or fewer updates


def test_dense_epochs_may_have_any_number_of_updates():
    for first in (0, 1, 2, 7):
        pruner = Pruner(SmallNet(), {**CK, "era": [1, 3]}, updates_per_epoch=2)
        seen = targets(pruner, [first, 2, 2])
        assert seen == [[0.0] * first, [0.25, 0.5], [0.75, 1.0]]


def test_the_schedule_never_runs_ahead_of_the_epoch():
    pruner = Pruner(SmallNet(), {**CK, "era": [0, 2]}, updates_per_epoch=2)
    assert targets(pruner, [5, 2]) == [[0.25, 0.5, 0.5, 0.5, 0.5], [0.75, 1.0]]


def test_an_epoch_with_more_updates_makes_up_for_one_with_fewer():
    pruner = Pruner(SmallNet(), {**CK, "era": [0, 2]}, updates_per_epoch=2)
    assert targets(pruner, [1, 3]) == [[0.25], [0.5, 0.75, 1.0]]


def test_updates_beyond_the_eras_last_one_have_frozen_masks():
    pruner = Pruner(SmallNet(), {**CK, "era": [0, 2]}, updates_per_epoch=2)
    targets(pruner, [2])
    phases = []
    for _ in range(4):
        update(pruner)
        phases.append(pruner.phase)
    assert phases == ["era", "fixed", "fixed", "fixed"]
    pruner.end_epoch(1)
    pruner.check()


@pytest.mark.parametrize("updates", [[7, 3, 9, 4], [1, 1, 1, 1], [4, 6, 0, 2], [9, 0, 9, 9]])
def test_masks_stay_masks_however_many_updates_epochs_have(updates):
    model, index = SmallNet(), 0
    optimizer = sgd(model)
    settings = {**CK, "era": [1, 3]}
    pruner = Pruner(model, settings, updates_per_epoch=4, optimizer=optimizer)
    zeros: list[float] = [0.0]
    for epoch, count in enumerate(updates):
        for _ in range(count):
            train_step(model, optimizer, index)
            pruner.step()
            index += 1
            zeros.append(pruner.sparsity().network)
        pruner.end_epoch(epoch)
        assert pruner.target_sparsity <= 0.6 * min(max(epoch, 0), 2) / 2 + 1e-9
    assert zeros == sorted(zeros)
    assert (pruner.phase, pruner.sparsity()["head"].zeros) == ("fixed", 48)
    pruner.check()


@pytest.mark.parametrize("at", [2, 5, 6, 9])
def test_a_run_with_uneven_epochs_resumes_bit_for_bit(at):
    ends = (6, 9, 12)  # epochs of 6, 3 and 3 updates, where `updates_per_epoch` is 3

    def run(first: int, last: int, saved: Any = None) -> tuple[Any, ...]:
        model = SmallNet()
        optimizer = sgd(model)
        settings = {**CK, "era": [0, 3]}
        pruner = Pruner(model, settings, updates_per_epoch=3, optimizer=optimizer)
        if saved is not None:
            pruner.load_state_dict(saved[1].state_dict())
            model.load_state_dict(snapshot(saved[0]))
            optimizer.load_state_dict(saved[2].state_dict())
        for index in range(first, last):
            train_step(model, optimizer, index)
            pruner.step()
            if index + 1 in ends:
                pruner.end_epoch(pruner.epoch)
        return model, pruner, optimizer

    whole, resumed = run(0, 14), run(at, 14, run(0, at))
    assert equal_states(snapshot(whole[0]), snapshot(resumed[0]))
    assert whole[1].mask_hash() == resumed[1].mask_hash()


def test_more_updates_than_an_epoch_has_are_logged_once(caplog):
    pruner = Pruner(SmallNet(), {**CK, "era": [2, 3]}, updates_per_epoch=2)
    with caplog.at_level(logging.WARNING, logger="starfire_prune"):
        targets(pruner, [2])
        assert caplog.messages == []
        for _ in range(5):
            update(pruner)
    message = (
        "epoch 1 has more updates than `updates_per_epoch` (=2): those beyond it don't move the "
        "schedule of the pruning. If the epoch has ended, end_epoch(epoch) is missing; if epochs "
        "have more updates, correct `updates_per_epoch`"
    )
    assert caplog.messages == [message]


def test_an_era_in_updates_logs_nothing_of_epochs(caplog):
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [2, 6]}, updates_per_epoch=1)
    with caplog.at_level(logging.WARNING, logger="starfire_prune"):
        targets(pruner, [7], epochs=False)
    assert caplog.messages == []


def test_a_state_with_a_wrong_number_of_updates_is_refused():
    pruner = Pruner(SmallNet(), {**CK, "era_updates": [2, 6]})
    for key, value in (("updates", -1), ("updates_per_epoch", "2")):
        message = re.escape(f"the pruner's state is damaged: its {key} is {value!r}")
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict({**pruner.state_dict(), key: value})


# Keys that other programs have


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("sparsity", "amount"),
        ("target_sparsity", "amount"),
        ("pruning_ratio", "amount"),
        ("epochs", "era"),
        ("steps", "era_updates"),
        ("ignore", "exclude"),
    ],
)
def test_a_key_of_another_program_is_answered_by_ours(key, wanted):
    with pytest.raises(RecipeError) as caught:
        parse_pruning({**CK, "era": [0, 1], key: 0.6})
    assert str(caught.value) == f"pruning: {key}: unknown key (got 0.6); did you mean {wanted}?"


def test_a_key_is_suggested_only_where_it_is_one():
    with pytest.raises(RecipeError) as caught:
        parse_pruning({**CK, "era": [0, 1], "fc": {"sparsity": 0.6, "epochs": 3}})
    sparsity, epochs = str(caught.value).splitlines()
    assert sparsity == "pruning: fc.sparsity: unknown key (got 0.6); did you mean amount?"
    assert "did you mean era" not in epochs
