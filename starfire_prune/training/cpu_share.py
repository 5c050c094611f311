"""How much of a process's CPU time one part of a loop takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CpuShare"]


class CpuShare:
    """Measures the CPU time of a part, over all threads, against that since it was made.

    Time in which the process waits or is stopped counts nowhere, nor does the device's work.

    Example:
        >>> cpu = CpuShare()
        >>> with cpu.part():
        ...     total = sum(range(1000))
        >>> 0 <= cpu.share <= 1
        True
    """

    def __init__(self) -> None:
        self._start = time.process_time()
        self._part_s = 0.0

    @contextmanager
    def part(self) -> Iterator[None]:
        """Count what the block takes towards the part."""
        start = time.process_time()
        yield
        self._part_s += time.process_time() - start

    @property
    def share(self) -> float:
        """The part's share until now, in [0, 1]."""
        total = time.process_time() - self._start
        return self._part_s / total if total else 0.0
