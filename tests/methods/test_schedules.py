"""The schedules' ends, order and shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starfire_prune.methods.schedules import SCHEDULES, cosine, cubic, linear

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ends_are_exact(schedule):
    assert schedule(0.0) == 0.0
    assert schedule(1.0) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_rises_within_the_unit_interval(schedule, a, b):
    low, high = sorted((a, b))
    assert 0.0 <= schedule(low) <= schedule(high) <= 1.0


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [(linear, 0.25, 0.5), (cubic, 0.578125, 0.875), (cosine, 0.1464466094067262, 0.5)],
)
def test_shape(schedule, quarter, half):
    assert schedule(0.25) == pytest.approx(quarter)
    assert schedule(0.5) == pytest.approx(half)
