"""How many units each method prunes: the units of a weight, and what an amount stands for.

Both the mask functions and the methods of `starfire_prune.methods` count by these functions; the
methods that combine two of them, intra and inter, add the two counts in `methods/conv.py`.
"""

import dataclasses
import math
import numbers

from torch import Tensor

from starfire_prune.masks.blocks import check_block_size, n_blocks

__all__ = [
    "SCOPES",
    "Units",
    "at_most",
    "check_positive",
    "ck_units",
    "count",
    "effective_block_size",
    "fc_block_units",
    "fc_fine_units",
    "filter_units",
    "merge",
    "weight_units",
    "window_units",
]


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


def count(amount: float, units: int) -> int:
    """How many of `units` an amount stands for: `floor(amount * units + 0.5)`, or the int itself.

    Args:
        amount: Share of the units, a float in [0, 1], or their number, an int in [0, units].
        units: Number of units in a scope.

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
            f"`amount` (={value!r}) must be a float in [0, 1], the share of each scope's units to "
            f"prune, or an int, their number; received {type(value).__name__}"
        )
    if isinstance(value, numbers.Integral):
        if not 0 <= amount <= units:
            raise ValueError(
                f"`amount` (={amount}) is an int, so it is a number of units and must be in "
                f"[0, {units}], the units of a scope; a share is a float such as 0.6"
            )
        return int(amount)
    if not 0.0 <= amount <= 1.0:  # NaN fails this too
        raise ValueError(f"`amount` (={amount}) is a share and must be in [0, 1]")
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


SCOPES = ("channel", "layer")


def window_units(shape: tuple[int, ...], *, exact_layer_sparsity: bool = False) -> Units:
    """The units of `window_mask`: the weights of each kernel, or of the layer.

    Raises:
        ValueError: If the kernels hold a single weight.

    Example:
        >>> window_units((64, 16, 3, 3))
        Units(size=9, scopes=1024, protected=0)
    """
    size = math.prod(shape[2:])
    if size == 1:
        raise ValueError(
            f"window pruning needs kernels of at least two weights, and `weight` of shape "
            f"{tuple(shape)} has 1x1 kernels: prune it by ck, which prunes complete kernels"
        )
    return weight_units(shape) if exact_layer_sparsity else Units(size, math.prod(shape[:2]))


def ck_units(
    shape: tuple[int, ...],
    *,
    groups: int = 1,
    block_size: tuple[int, int] = (1, 1),
    scope: str = "channel",
) -> Units:
    """The units of `ck_mask`: kernels, or blocks of them.

    Args:
        shape: Shape `(K, C / groups, *kernel)` of the weight.
        groups, block_size, scope: As in `ck_mask`.

    Raises:
        TypeError, ValueError: If they don't fit each other, or each scope would hold one unit.

    Example:
        >>> ck_units((64, 16, 3, 3), block_size=(4, 1))
        Units(size=16, scopes=16, protected=0)
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` (={scope!r}) must be one of {', '.join(map(repr, SCOPES))}")
    out, in_ = effective_block_size(shape, groups, block_size)
    rows, columns = n_blocks(shape[0] // groups, out), n_blocks(shape[1], in_)
    if scope == "layer":
        return Units(groups * rows * columns)
    if rows == 1:
        raise ValueError(
            f"each scope would hold a single unit, since `out_channels` (={shape[0]}) / `groups` "
            f'(={groups}) is 1, as in a depthwise convolution: use scope="layer" to let all '
            f"kernels of the layer compete"
        )
    return Units(rows, groups * columns)


def effective_block_size(
    shape: tuple[int, ...], groups: int, block_size: tuple[int, int]
) -> tuple[int, int]:
    """The block size of `ck_mask` in a layer, which may be too small for the one that is wanted.

    A dimension in which a group of the convolution holds fewer than two complete blocks isn't
    blocked: there the size is 1. So a first layer that reads three input channels keeps single
    ones.

    Args:
        shape: Shape `(K, C / groups, *kernel)` of the weight.
        groups: Groups of the convolution.
        block_size: Output and input channels of a block, `(out, in)`.

    Raises:
        TypeError, ValueError: For a bad `groups` or `block_size`, and for output channels that
            `groups` doesn't divide.

    Example:
        >>> effective_block_size((64, 3, 7, 7), 1, (4, 4))
        (4, 1)
    """
    check_positive("groups", groups)
    wanted = check_block_size(block_size)
    if shape[0] % groups:
        raise ValueError(f"`out_channels` (={shape[0]}) must be divisible by `groups` (={groups})")
    lengths = shape[0] // groups, shape[1]
    out, in_ = (
        size if length >= 2 * size else 1 for length, size in zip(lengths, wanted, strict=True)
    )
    return out, in_


def fc_block_units(shape: tuple[int, ...], *, block_size: tuple[int, int] = (4, 4)) -> Units:
    """The units of `fc_block_mask`: blocks, of which one in each row of blocks is protected.

    Raises:
        TypeError, ValueError: For a bad block size.

    Example:
        >>> fc_block_units((10, 64), block_size=(4, 2))
        Units(size=96, scopes=1, protected=3)
    """
    out, in_ = check_block_size(block_size)
    rows, columns = n_blocks(shape[0], out), n_blocks(shape[1], in_)
    return Units(rows * columns, protected=rows)


def fc_fine_units(shape: tuple[int, ...]) -> Units:
    """The units of `fc_fine_mask`: weights, of which one of each output neuron is protected.

    Example:
        >>> fc_fine_units((10, 64))
        Units(size=640, scopes=1, protected=10)
    """
    return Units(math.prod(shape), protected=shape[0])


def filter_units(shape: tuple[int, ...]) -> Units:
    """The units of `filter_mask`: output channels.

    Example:
        >>> filter_units((64, 16, 3, 3))
        Units(size=64, scopes=1, protected=0)
    """
    return Units(shape[0])
