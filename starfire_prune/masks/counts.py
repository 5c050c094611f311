"""How many units an amount stands for, and checks that all mask functions share."""

import dataclasses
import math
import numbers

from torch import Tensor

__all__ = ["Units", "at_most", "check_positive", "count", "merge", "weight_units"]


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of a weight, and the scopes in which they compete with each other.

    Each mask function has a function that counts its units from the shape of the weight, such as
    `ck_units` for `ck_mask`.

    Attributes:
        size: Number of units in each scope.
        scopes: Number of scopes.
        protected: Number of units of a scope that are never pruned.

    Example:
        >>> Units(size=8, scopes=3, protected=2).pruned(0.5)
        4
    """

    size: int
    scopes: int = 1
    protected: int = 0

    def pruned(self, amount: float) -> int:
        """How many units of each scope are pruned at this amount, in `[0, size - protected]`.

        Raises:
            TypeError, ValueError: For a bad amount; see `count`.
        """
        return min(count(amount, self.size), self.size - self.protected)


def weight_units(shape: tuple[int, ...]) -> Units:
    """The units of methods that prune single weights of the layer: its weights.

    Example:
        >>> weight_units((64, 16, 3, 3))
        Units(size=9216, scopes=1, protected=0)
    """
    return Units(math.prod(shape))


def count(amount: float, units: int, *, name: str = "amount") -> int:
    """How many of `units` an amount stands for: `floor(amount * units + 0.5)`, or the int itself.

    Args:
        amount: Share of the units, a float in [0, 1], or their number, an int in [0, units].
        units: Number of units in a scope.
        name: What the argument is called in errors.

    Raises:
        TypeError: If `amount` is not a real number; a bool is not one.
        ValueError: If it is NaN or out of its range.

    Example:
        >>> count(0.6, 9)
        5
    """
    value: object = amount
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` (={value!r}) must be a float in [0, 1], the share of each scope's units to "
            f"prune, or an int, their number; received {type(value).__name__}"
        )
    if isinstance(value, numbers.Integral):
        if not 0 <= amount <= units:
            raise ValueError(
                f"`{name}` (={amount}) is an int, so it is a number of units and must be in "
                f"[0, {units}], the units of a scope; a share is a float such as 0.6"
            )
        return int(amount)
    if not 0.0 <= amount <= 1.0:  # NaN fails this too
        raise ValueError(f"`{name}` (={amount}) is a share and must be in [0, 1]")
    return math.floor(float(amount) * units + 0.5)


def at_most(max_nonzero: int | None, size: int) -> int:
    """How many of `size` units may be kept: `max_nonzero` after a check, or all of them."""
    if max_nonzero is None:
        return size
    check_positive("max_nonzero", max_nonzero)
    return min(max_nonzero, size)


def check_positive(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless the argument `name` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` (={value!r}) must be an int of at least 1, received {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"`{name}` (={value}) must be an int of at least 1")


def merge(kept: Tensor, mask: Tensor | None) -> Tensor:
    """`kept` without what `mask` had already pruned, in new memory."""
    kept = kept.contiguous()
    return kept if mask is None else kept & mask.bool()
