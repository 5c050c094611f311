"""Schedules: pure functions from the progress of the era to the share of the target reached.

Progress and share are both in [0, 1]; every schedule rises from 0 to exactly 1.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from starfire_prune.utils.text import did_you_mean

__all__ = [
    "SCHEDULES",
    "Schedule",
    "cosine",
    "cubic",
    "linear",
    "register_schedule",
    "schedule_function",
    "schedule_name",
    "unregister_schedule",
    "unused_name",
]

Schedule = Callable[[float], float]

_SCHEDULES: dict[str, Schedule] = {}
SCHEDULES: Mapping[str, Schedule] = MappingProxyType(_SCHEDULES)
"""The registered schedules by name."""

_PASSED: dict[str, Schedule] = {}  # functions that were passed as they are, by full name


def register_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Register a schedule under a name, so that recipes can use it.

    `Pruner(model, {"schedule": function, ...})` also takes a function that isn't registered.

    Args:
        name: Name that recipes use.

    Raises:
        TypeError: If it is not a function.
        ValueError: If it doesn't rise from 0 at 0 to 1 at 1, or if another function has this name.

    Example:
        >>> @register_schedule("late")
        ... def late(progress):
        ...     return progress**3
        >>> SCHEDULES["late"](0.5)
        0.125
        >>> unregister_schedule("late")
    """

    def register(schedule: Schedule) -> Schedule:
        _check(schedule)
        other = _SCHEDULES.get(name)
        if other is not None and _full_name(other) != _full_name(schedule):
            raise ValueError(
                f"the name {name!r} is that of {_full_name(other)}: choose another name"
            )
        _SCHEDULES[name] = schedule
        return schedule

    return register


def unregister_schedule(name: str) -> None:
    """Remove a schedule from the registry."""
    del _SCHEDULES[name]


def schedule_name(schedule: str | Schedule) -> str:
    """The registered name of a schedule, given by that name or as the function itself.

    A function that isn't registered is found by its full name, `module.function`, from then on.

    Raises:
        TypeError, ValueError: If it is neither, or no schedule has this name.
    """
    if isinstance(schedule, str):
        if schedule not in _SCHEDULES and schedule not in _PASSED:
            raise ValueError(
                f"`schedule` (={schedule!r}) must be one of {', '.join(_SCHEDULES)}, or a function"
                f"{did_you_mean(schedule, _SCHEDULES)}"
            )
        return schedule
    for name, other in (*_SCHEDULES.items(), *_PASSED.items()):
        if other is schedule:
            return name
    _check(schedule)
    name = unused_name(_full_name(schedule), _PASSED, "register_schedule")
    _PASSED[name] = schedule
    return name


def schedule_function(name: str) -> Schedule:
    """The schedule of a name that `schedule_name` gave."""
    return _SCHEDULES.get(name) or _PASSED[name]


def unused_name(full_name: str, known: Mapping[str, object], decorator: str) -> str:
    """A name for a class or function that was passed without a name of its own.

    Raises:
        ValueError: For a lambda, and for what was defined in a function: others have the same name.
    """
    if "<" in full_name:
        raise ValueError(
            f"{full_name} has no name that a checkpoint could refer to: give it one by "
            f"@{decorator}('name'), or define it in a module"
        )
    names = (f"{full_name}#{number}" if number > 1 else full_name for number in itertools.count(1))
    return next(name for name in names if name not in known)


def _full_name(schedule: Schedule) -> str:
    return f"{schedule.__module__}.{schedule.__qualname__}"


def _check(schedule: object) -> None:
    if not (callable(schedule) and hasattr(schedule, "__qualname__")):
        raise TypeError(f"a schedule must be a function, not {schedule!r}")
    for progress in (0.0, 1.0):
        if (share := schedule(progress)) != progress:
            raise ValueError(
                f"schedule {schedule.__qualname__} must rise from 0 to 1: it gives {share!r} at "
                f"{progress:g}"
            )


@register_schedule("linear")
def linear(progress: float) -> float:
    """The paper's schedule: a target that rises evenly over the era.

    Example:
        >>> linear(0.25)
        0.25
    """
    return progress


@register_schedule("cubic")
def cubic(progress: float) -> float:
    """A rise that is fast at first and slow at the end: `1 - (1 - progress)^3` (Zhu & Gupta, 2017).

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


@register_schedule("cosine")
def cosine(progress: float) -> float:
    """A rise that is slow at both ends: half a wave of the cosine.

    Example:
        >>> round(cosine(0.25), 4)
        0.1464
    """
    return 0.5 * (1.0 - math.cos(math.pi * progress))
