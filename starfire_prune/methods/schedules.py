"""Schedules: pure functions from the progress of the era to the share of the target reached.

Progress and share are both in [0, 1]; every schedule rises from 0 to exactly 1.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

__all__ = ["SCHEDULES", "cosine", "cubic", "linear"]


def linear(progress: float) -> float:
    """The paper's schedule: the target rises evenly over the era.

    Example:
        >>> linear(0.25)
        0.25
    """
    return progress


def cubic(progress: float) -> float:
    """Fast at first, slow at the end: `1 - (1 - progress)^3` (Zhu & Gupta, 2017).

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    """Slow at both ends: half a wave of the cosine.

    Example:
        >>> round(cosine(0.25), 4)
        0.1464
    """
    return 0.5 * (1.0 - math.cos(math.pi * progress))


SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": linear, "cubic": cubic, "cosine": cosine}
)
"""The schedules by the names that recipes use."""
