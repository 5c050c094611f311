"""A part's share of the CPU time, by a clock that the test moves."""

import pytest

from starfire_prune.training import cpu_share
from starfire_prune.training.cpu_share import CpuShare


class Clock:
    """The process's CPU time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def process_time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cpu_share, "time", clock)
    return clock


def test_the_share_is_that_of_all_parts_since_the_beginning(clock):
    cpu = CpuShare()
    for _ in range(2):
        clock.now_s += 6.0
        with cpu.part():
            clock.now_s += 2.0
    assert cpu.share == pytest.approx(4 / 16)


def test_without_a_part_the_share_is_zero(clock):
    cpu = CpuShare()
    clock.now_s += 5.0
    assert cpu.share == 0.0


def test_before_any_time_has_passed_the_share_is_zero(clock):
    cpu = CpuShare()
    with cpu.part():
        pass
    assert cpu.share == 0.0


def test_a_part_alone_has_all_the_time(clock):
    cpu = CpuShare()
    with cpu.part():
        clock.now_s += 3.0
    assert cpu.share == 1.0
