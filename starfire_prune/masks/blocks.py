"""Blocks of neighbouring output and input channels, which are pruned together.

Blocks are smaller at the edges of a weight where a complete one doesn't fit.
"""

from torch import Tensor

__all__ = ["check_block_size", "from_blocks", "n_blocks", "to_blocks"]


def check_block_size(block_size: tuple[int, int]) -> tuple[int, int]:
    """A checked `block_size`.

    Raises:
        TypeError, ValueError: Unless it is two ints of at least 1.
    """
    value: object = block_size
    wanted = f"`block_size` (={value!r}) must be two ints [out, in], such as (4, 1)"
    if not isinstance(value, (tuple, list)) or any(type(length) is not int for length in value):
        raise TypeError(wanted)
    if len(value) != 2:
        raise ValueError(wanted)
    if min(value) < 1:
        raise ValueError(f"{wanted}, each of at least 1")
    out, in_ = value
    return out, in_


def n_blocks(length: int, block: int) -> int:
    """How many blocks of `block` channels cover `length` channels."""
    return -(-length // block)


def to_blocks(values: Tensor, block_size: tuple[int, int], fill: int) -> Tensor:
    """Values `(..., m, n)` as `(..., rows, out, columns, in)`, an entry of each block and place.

    Places of the last blocks that lie outside the weight hold `fill`.
    """
    (*lead, m, n), (out, in_) = values.shape, block_size
    rows, columns = n_blocks(m, out), n_blocks(n, in_)
    if (rows * out, columns * in_) != (m, n):
        padded = values.new_full((*lead, rows * out, columns * in_), fill)
        padded[..., :m, :n] = values
        values = padded
    return values.reshape(*lead, rows, out, columns, in_)


def from_blocks(blocks: Tensor, block_size: tuple[int, int], m: int, n: int) -> Tensor:
    """Values `(..., m, n)` that are constant in each block, given those `(..., rows, columns)`."""
    (*lead, rows, columns), (out, in_) = blocks.shape, block_size
    places = blocks[..., :, None, :, None].expand(*lead, rows, out, columns, in_)
    return places.reshape(*lead, rows * out, columns * in_)[..., :m, :n]
