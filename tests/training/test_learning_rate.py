"""The learning rate by the epoch."""

import pytest

from starfire_prune.recipe.sections import LrSchedule
from starfire_prune.training.learning_rate import learning_rate_factor


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1.0), (29, 1.0), (30, 0.1), (59, 0.1), (60, 0.01), (99, 0.01)]
)
def test_the_learning_rate_falls_at_the_start_of_each_milestone(epoch, factor):
    schedule = LrSchedule(milestones=(30, 60), gamma=0.1)
    assert learning_rate_factor(schedule, epoch, epochs=100) == pytest.approx(factor)


def test_without_milestones_the_learning_rate_is_constant():
    assert [learning_rate_factor(LrSchedule(), epoch, epochs=501) for epoch in (0, 7, 500)] == [
        1.0
    ] * 3


def test_the_learning_rate_rises_linearly_to_its_value_after_the_warmup():
    schedule = LrSchedule(warmup_epochs=3)
    assert [learning_rate_factor(schedule, epoch, epochs=5) for epoch in range(5)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


def test_a_milestone_within_the_warmup_counts_after_it():
    schedule = LrSchedule(milestones=(1,), gamma=0.5, warmup_epochs=2)
    assert learning_rate_factor(schedule, 1, epochs=10) == pytest.approx(2 / 3)
    assert learning_rate_factor(schedule, 2, epochs=10) == 0.5


def test_a_cosine_falls_from_one_to_nearly_zero():
    schedule = LrSchedule(name="cosine")
    factors = [learning_rate_factor(schedule, epoch, epochs=4) for epoch in range(4)]
    assert factors == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_a_cosine_begins_after_the_warmup():
    schedule = LrSchedule(name="cosine", warmup_epochs=1)
    factors = [learning_rate_factor(schedule, epoch, epochs=3) for epoch in range(3)]
    assert factors == pytest.approx([0.5, 1.0, 0.5])
