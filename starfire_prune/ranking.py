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
    "float_bits",
    "magnitude_keys",
    "magnitudes",
    "sign_bits",
    "smallest",
]

# From this many keys in a row on, a sample of them (every so many) narrows the selection first.
_LONG = 1 << 16
_SAMPLED = 61  # prime, so that it doesn't walk along a column

# Up to this many more units a locale, taking them one by one beats selection.
_FEW = 48


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
    return (bits | lowest).add_(mask.bool().to(bits.dtype), alpha=lowest)  # kept: it wraps to 0


def check_finite(keys: Tensor, weight: Tensor) -> None:
    """`keys` are those of `weight`, or their maxima over kernels."""
    infinity = int(float_bits(torch.tensor(torch.inf, dtype=magnitudes(keys[:0]).dtype)))
    if keys.numel() and int(keys.max()) >= infinity:
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
    taken = -(keys >> (8 * keys.itemsize - 1)).sum(0, dtype=keys.dtype)  # shifted: -1 if gone
    more = number - int(taken.min())
    if more > _FEW:
        return _smallest_by_selection(keys, number)
    chosen = keys <= _cutoff_after(keys, taken, number, more)
    surplus = chosen.sum(0, dtype=keys.dtype) != taken.clamp(min=number)
    tied = surplus.nonzero().squeeze(1)
    if len(tied):
        chosen[:, tied] = _smallest_by_selection(keys[:, tied], number)
    return chosen


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
    rows = keys.t().contiguous()
    cutoff = _kth_smallest(rows, number)
    chosen = rows <= cutoff
    tied_rows = (chosen.sum(1, dtype=torch.int32) > number).nonzero().squeeze(1)
    if len(tied_rows):  # more keys equal the cutoff than may go: the last of them stay
        tied = rows[tied_rows] == cutoff[tied_rows]
        allowed = number - (rows[tied_rows] < cutoff[tied_rows]).sum(1, keepdim=True)
        chosen[tied_rows] &= ~tied | (tied.cumsum(1) <= allowed)
    return (chosen | (rows < 0)).t()


def _kth_smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest key (1-based) of each row, shape `(rows, 1)`."""
    if rows.device.type != "cpu":
        return torch.kthvalue(rows, k, dim=1, keepdim=True).values
    # NumPy selects with AVX where there is one, faster than torch on all cores.
    keys = rows.numpy()
    if len(keys) == 1 and keys.size >= _LONG:
        return torch.tensor([[_kth_of_long(keys[0], k)]], dtype=rows.dtype)
    return torch.from_numpy(np.partition(keys, k - 1, axis=1)[:, k - 1 : k].copy())


def _kth_of_long(keys: np.ndarray, k: int) -> int:
    """The k-th smallest of many keys, sought between two bounds that a sample of them gives."""
    sample = np.sort(keys[::_SAMPLED])
    place = k * len(sample) // len(keys)
    margin = 4 * math.isqrt(len(sample))
    low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
    below = int(np.count_nonzero(keys < low))
    between = keys[(keys >= low) & (keys <= high)]
    if not below < k <= below + len(between):  # an unlucky sample
        below, between = 0, keys
    return int(np.partition(between, k - below - 1)[k - below - 1])
