"""Exact ranking of weights: integer keys, and selection in which ties go by the lower index.

The bits of a float that is not negative, read as an integer, rise with it. So the key of a weight
is the bits of its magnitude, with the sign bit set where an earlier mask has taken it: what is
gone comes first in every order, and integers are compared, selected and merged faster than floats.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_finite",
    "column_sums",
    "float_bits",
    "magnitude_keys",
    "magnitudes",
    "sign_bits",
    "smallest",
]


# From this many keys in a row on, a sample of them (every so many) narrows the selection first.
_LONG = 1 << 16
_SAMPLED = 61  # prime, so that it doesn't walk along a column
# Up to this many more units a locale, or in locales as small as a window, taking them one by one
# beats selection.
_FEW = 4
_SMALL_LOCALE = 16


def sign_bits(where: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers with the sign bit set where the bool tensor `where` is true, else 0."""
    return where.to(dtype).bitwise_left_shift_(8 * dtype.itemsize - 1)


def float_bits(magnitudes: Tensor) -> Tensor:
    """The keys of magnitudes in float32 or float64: the same memory."""
    return magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def magnitudes(keys: Tensor) -> Tensor:
    """The inverse of `float_bits`, 0.0 where the weight is gone."""
    floating = torch.float64 if keys.dtype == torch.int64 else torch.float32
    return keys.clamp(min=0).view(floating)


def magnitude_keys(weight: Tensor, mask: Tensor | None, min_dims: int) -> Tensor:
    """The keys of a weight under its earlier mask, int32 (int64 for float64), in new memory."""
    if not weight.is_floating_point():
        raise TypeError(f"`weight` must be of a floating dtype, received {weight.dtype}")
    if weight.ndim < min_dims:
        wanted = "(K, C, *kernel)" if min_dims == 3 else f"at least {min_dims} dimensions"
        raise ValueError(f"`weight` of shape {tuple(weight.shape)} must have shape {wanted}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(
            f"`mask` of shape {tuple(mask.shape)} must have the shape of `weight`, "
            f"{tuple(weight.shape)}"
        )
    weight = weight.detach()
    bits = float_bits(weight if weight.dtype == torch.float64 else weight.float())
    lowest = torch.iinfo(bits.dtype).min  # the sign bit alone
    if mask is None:
        return bits & ~lowest
    # What is gone keeps its other bits: selection is slow among equals.
    return (bits | lowest).add_(mask.bool(), alpha=lowest)  # kept: it wraps to 0


def check_finite(keys: Tensor, weight: Tensor) -> None:
    """`keys` are those of `weight`, or their maxima over kernels."""
    infinity = int(float_bits(torch.tensor(torch.inf, dtype=magnitudes(keys[:0]).dtype)))
    if keys.numel() and int(keys.amax()) >= infinity:
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"`weight` of shape {tuple(weight.shape)} cannot be ranked: {bad} of its "
            f"{weight.numel()} values are not finite (NaN or infinity)"
        )


def smallest(keys: Tensor, number: int) -> Tensor:
    """The `number` smallest units of each locale, exactly; ties go by the lower index.

    Args:
        keys: shape `(units, locales)`.
        number: of units; where more are gone already, all of those are chosen.

    Returns:
        A bool tensor of the same shape.
    """
    if number <= 0 or number >= len(keys):
        return torch.full_like(keys, number > 0, dtype=torch.bool)
    if not _may_take_few(keys, number):
        return _smallest_by_selection(keys, number)
    taken = column_sums(keys < 0)
    steps = number - int(taken.amin())
    if steps > _FEW and len(keys) > _SMALL_LOCALE:
        return _smallest_by_selection(keys, number)
    chosen = keys <= _cutoff_after(keys, taken, number, steps)
    surplus = column_sums(chosen) != taken.clamp(min=number)
    tied = surplus.nonzero().squeeze(1)
    if len(tied):
        chosen[:, tied] = _smallest_by_selection(keys[:, tied], number)
    return chosen


def _may_take_few(keys: Tensor, number: int) -> bool:
    """Whether to count how many more each locale loses: the first one tells what to expect."""
    units, locales = keys.shape
    if units <= _SMALL_LOCALE:
        return True
    if units >= _LONG and locales == 1:
        return False
    return number - int(torch.count_nonzero(keys[:, 0] < 0)) <= _FEW


def column_sums(bools: Tensor) -> Tensor:
    """How many of each column are true, int32; eight columns at once where they lie side by side.

    A sum over bools would turn each of them into an integer of its own first.
    """
    columns = bools.shape[1]
    if columns == 1:
        return torch.count_nonzero(bools).to(torch.int32)[None]
    if not columns or columns % 8 or bools.storage_offset() % 8 or not bools.is_contiguous():
        return bools.sum(0, dtype=torch.int32)
    eights = torch.split(bools.view(torch.int64), 255)  # rows: more would run over a byte
    sums = torch.stack([rows.sum(0) for rows in eights]).view(torch.uint8)
    return sums.sum(0, dtype=torch.int32)


def _cutoff_after(keys: Tensor, taken: Tensor, number: int, steps: int) -> Tensor:
    """The key that the `number`-th smallest of each locale has if no two are the same.

    Between two updates a locale loses a few units only. The next smallest key, one after the
    other, is found without moving anything: the difference to the present cutoff, read as an
    unsigned integer, is least for it, since keys at or below the cutoff wrap around.
    """
    lowest = torch.iinfo(keys.dtype).min
    unsigned = keys ^ lowest  # signed integers in the order of the unsigned ones
    cutoff = torch.full_like(taken, -1)
    differences = torch.empty_like(unsigned)
    for step in range(steps):
        above = torch.sub(unsigned, cutoff + 1, out=differences).amin(0) ^ lowest
        cutoff = torch.where(taken + step < number, cutoff + 1 + above, cutoff)
    return cutoff


def _smallest_by_selection(keys: Tensor, number: int) -> Tensor:
    cutoff, is_tied = _kth_smallest(keys, number)
    chosen = keys <= cutoff.clamp(min=-1)  # keys of what is gone are negative
    tied = is_tied.nonzero().squeeze(1)
    if len(tied):  # more keys equal the cutoff than may go: the last of them stay
        rows, cutoff = keys[:, tied].t(), cutoff[tied, None]
        below, equal = rows < cutoff, rows == cutoff
        allowed = number - below.sum(1, keepdim=True)
        chosen[:, tied] = (below | (equal & (equal.cumsum(1) <= allowed)) | (rows < 0)).t()
    return chosen


def _kth_smallest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest key (1-based) of each locale, and where the one after it is the same."""
    if keys.device.type != "cpu":
        cutoff = torch.kthvalue(keys, k, dim=0).values
        return cutoff, column_sums(keys <= cutoff) > k
    # NumPy selects with AVX where there is one, faster than torch on all cores.
    if keys.shape[1] == 1 and len(keys) >= _LONG:
        value, is_tied = _kth_of_long(keys.flatten().numpy(), k)
        return torch.tensor([value], dtype=keys.dtype), torch.tensor([is_tied])
    rows = keys.t().clone(memory_format=torch.contiguous_format).numpy()
    rows.partition(k - 1, axis=1)
    parted = torch.from_numpy(rows)
    return parted[:, k - 1], parted[:, k:].amin(1) == parted[:, k - 1]


def _kth_of_long(keys: np.ndarray, k: int) -> tuple[int, bool]:
    """`_kth_smallest` of many keys, sought between two bounds that a sample of them gives."""
    sample = np.sort(keys[::_SAMPLED])
    place = k * len(sample) // len(keys)
    margin = 4 * math.isqrt(len(sample))
    low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
    below = int(np.count_nonzero(keys < low))
    between = keys[(keys >= low) & (keys <= high)]
    if not below < k <= below + len(between):  # an unlucky sample
        below, between = 0, keys
    cutoff = int(np.partition(between, k - below - 1)[k - below - 1])
    return cutoff, below + int(np.count_nonzero(between <= cutoff)) > k
