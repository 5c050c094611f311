"""Random networks: an error before the first update, or reported zeros that are true zeros."""

import pytest
from hypothesis import given, settings

from tests.zoo.networks import BLOCKS, Case, cases
from tests.zoo.training import check_case

KNOWN = {
    "reading and calling": "a weight that is also read by a call is not noticed",
}
"""Blocks that are neither refused at once nor right, if the pruner has no example input."""

sound_blocks = sorted(set(BLOCKS) - set(KNOWN))
blocks_and_examples = [
    pytest.param(
        name,
        with_example,
        marks=[pytest.mark.xfail(reason=KNOWN[name], strict=True)]
        if name in KNOWN and not with_example
        else [],
    )
    for name in BLOCKS
    for with_example in (False, True)
]


@pytest.mark.parametrize(("block", "with_example"), blocks_and_examples)
def test_a_block_is_refused_at_once_or_its_reported_zeros_are_true(block, with_example):
    pruning = {"method": "ck", "amount": 0.6, "era": [1, 2], "fc": {"method": "fine"}}
    check_case(
        Case(
            blocks=(block, "spatial"),
            seed=0,
            residual=True,
            first_forward=True,
            pruning=pruning,
            updates_per_epoch=3,
            optimizer="sgd",
            resumed_at=4,
            with_example=with_example,
        )
    )


@settings(max_examples=40)
@given(cases(sound_blocks))
def test_a_random_network_is_refused_at_once_or_its_reported_zeros_are_true(case):
    check_case(case)


@pytest.mark.slow
@settings(max_examples=600)
@given(cases(sound_blocks))
def test_many_random_networks_are_refused_at_once_or_their_zeros_are_true(case):
    check_case(case)
