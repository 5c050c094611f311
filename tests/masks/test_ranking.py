"""The ways in which units are selected: each must give what a stable sort gives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from starfire_prune.masks import ranking
from starfire_prune.masks.ranking import column_sums, magnitude_keys, smallest

LONG = ranking._LONG + 3


def chosen_by_sorting(weight: Tensor, mask: Tensor, number: int) -> Tensor:
    """What is pruned already comes first, then by magnitude, then by index; scope by scope."""
    chosen = ~mask
    for scope in range(weight.shape[1]):
        magnitudes = np.where(mask[:, scope], weight[:, scope].abs(), -1.0)
        first = np.argsort(magnitudes, kind="stable")[:number]
        chosen[torch.from_numpy(first), scope] = True
    return chosen


def weights(units: int, scopes: int, levels: int | None) -> Tensor:
    """Random weights, of `levels` different magnitudes where given: then most of them tie."""
    generator = torch.Generator().manual_seed(units * scopes)
    values = torch.randn(units, scopes, generator=generator)
    return values if levels is None else (values * levels).round() / levels


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("more", [1, 4, 5, 40])
@pytest.mark.parametrize(
    ("units", "scopes"), [(9, 64), (17, 8), (64, 1), (64, 7), (300, 16), (600, 24), (LONG, 1)]
)
def test_each_way_of_selecting_equals_a_stable_sort(units, scopes, more, levels):
    weight = weights(units, scopes, levels)
    before = units // 3
    mask = ~chosen_by_sorting(weight, torch.ones_like(weight, dtype=torch.bool), before)
    moved = weight + (0 if levels else 1e-2 * weights(units, scopes, None).flip(0))
    number = min(before + more, units - 1)
    chosen = smallest(magnitude_keys(moved, mask, 2), number)
    assert torch.equal(chosen, chosen_by_sorting(moved, mask, number))


@pytest.mark.parametrize(("units", "scopes"), [(9, 64), (300, 16), (LONG, 1)])
def test_where_more_are_pruned_already_all_of_those_are_chosen(units, scopes):
    weight = weights(units, scopes, None)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[: units // 2, 0] = False  # of the first scope only
    chosen = smallest(magnitude_keys(weight, mask, 2), 3)
    assert torch.equal(chosen, chosen_by_sorting(weight, mask, 3))


def test_a_misleading_first_scope_changes_nothing():
    weight = weights(200, 64, None)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:100, 0] = False
    chosen = smallest(magnitude_keys(weight, mask, 2), 101)
    assert torch.equal(chosen, chosen_by_sorting(weight, mask, 101))


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (5, 7), (255, 8), (256, 16), (1000, 24), (4, 0)])
def test_column_sums_count_what_is_true(shape):
    bools = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    assert column_sums(bools).tolist() == bools.sum(0).tolist()
    assert column_sums(torch.ones(shape, dtype=torch.bool)).tolist() == [shape[0]] * shape[1]


@pytest.mark.parametrize("view", [lambda bools: bools.t(), lambda bools: bools[:, 8:24]])
def test_column_sums_of_a_view(view):
    bools = view(torch.rand(16, 40, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert column_sums(bools).tolist() == bools.sum(0).tolist()


def test_column_sums_at_an_odd_place_in_memory():
    bools = torch.rand(83, generator=torch.Generator().manual_seed(0)) < 0.5
    assert column_sums(bools[3:].view(5, 16)).tolist() == bools[3:].view(5, 16).sum(0).tolist()
