"""How many units an amount stands for, and checks that all mask functions share."""

import math
import numbers

from torch import Tensor

__all__ = ["at_most", "check_positive", "count", "merge"]


def count(amount: float, units: int, *, name: str = "amount") -> int:
    """How many of `units` an `amount` stands for: `floor(amount * units + 0.5)`, or the int itself.

    Args:
        amount: a float in [0, 1], the share of the units; or an int in [0, units].
        units: the size of the locale.
        name: what the argument is called in errors.

    Raises:
        TypeError: if `amount` is not a real number (a bool is not one).
        ValueError: if it is out of its range or NaN.

    Example:
        >>> count(0.6, 9)
        5
    """
    value: object = amount
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` (={value!r}) must be a float in [0, 1], the share of each locale to prune, "
            f"or an int, the number of units; received {type(value).__name__}"
        )
    if isinstance(value, numbers.Integral):
        if not 0 <= amount <= units:
            raise ValueError(
                f"`{name}` (={amount}) is an int, so it counts units and must be in [0, {units}], "
                f"the units of a locale; a share is a float such as 0.6"
            )
        return int(amount)
    if not 0.0 <= amount <= 1.0:  # NaN fails this too
        raise ValueError(f"`{name}` (={amount}) is a share and must be in [0, 1]")
    return math.floor(float(amount) * units + 0.5)


def at_most(max_nonzero: int | None, size: int) -> int:
    if max_nonzero is None:
        return size
    check_positive("max_nonzero", max_nonzero)
    return min(max_nonzero, size)


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` (={value!r}) must be an int of at least 1, received {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"`{name}` (={value}) must be an int of at least 1")


def merge(kept: Tensor, mask: Tensor | None) -> Tensor:
    """`kept` without what `mask` had already taken, in memory of its own."""
    kept = kept.contiguous()
    return kept if mask is None else kept & mask.bool()
