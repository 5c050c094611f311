"""Exact ranking of weights: integer keys, and selection in which ties go to the lower index.

**Keys.** The bits of a float that is not negative, read as an integer, rise with the float. So the
key of a weight is the bits of its magnitude, with the sign bit set where an earlier mask has pruned
it: pruned weights come first in every order, and integers are compared, selected and merged faster
than floats.

**Selection.** `smallest` marks the smallest units of each scope. What it returns never depends on
how it gets there; there are three ways, since masks are updated during training:

1. Between two updates few units of a scope are pruned. Then the cutoff, the largest key that is
   still chosen, is found by as many passes over the keys as there are new units.
2. Otherwise the cutoff is found by selection (quickselect), which NumPy does faster than PyTorch.
3. If the layer is one scope of many units, a sample of them narrows the keys before selection.

A cutoff chooses too many units if several keys equal it: the scopes in which that happens are
selected again, with the lower index first.
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


# A single scope of at least this many units is narrowed by a sample, each `_STRIDE`-th key.
_LONG = 1 << 16
_STRIDE = 61  # prime, so that the sample doesn't follow a column of the weight
# Passes over the keys are faster than selection for up to this many new units of a scope, and for
# any number of them in scopes that are as small as a kernel.
_FEW = 4
_SMALL_SCOPE = 16


def sign_bits(where: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers with the sign bit set where the bool tensor `where` is true, else 0."""
    return where.to(dtype).bitwise_left_shift_(8 * dtype.itemsize - 1)


def float_bits(magnitudes: Tensor) -> Tensor:
    """The keys of magnitudes in float32 or float64: the same memory."""
    return magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def magnitudes(keys: Tensor) -> Tensor:
    """The inverse of `float_bits`, 0.0 where the weight is pruned."""
    floating = torch.float64 if keys.dtype == torch.int64 else torch.float32
    return keys.clamp(min=0).view(floating)


def magnitude_keys(weight: Tensor, mask: Tensor | None, min_dims: int) -> Tensor:
    """The keys of a weight under its earlier mask, int32 (int64 for float64), in new memory."""
    if not weight.is_floating_point():
        raise TypeError(f"`weight` must be of a floating dtype, received {weight.dtype}")
    if weight.ndim < min_dims:
        wanted = f"at least {min_dims} dimensions"
        if min_dims == 3:
            wanted = "(K, C, *kernel); for linear layers there are fc_fine and fc_block"
        raise ValueError(f"`weight` of shape {tuple(weight.shape)} must have shape {wanted}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(
            f"`mask` of shape {tuple(mask.shape)} must have the shape of `weight`, "
            f"{tuple(weight.shape)}"
        )
    weight = weight.detach()
    bits = float_bits(weight if weight.dtype == torch.float64 else weight.float())
    lowest = torch.iinfo(bits.dtype).min  # only the sign bit
    if mask is None:
        return bits & ~lowest
    # What is pruned keeps its other bits: selection is slow among equals.
    return (bits | lowest).add_(mask.bool(), alpha=lowest)  # kept: the sign bit overflows to 0


def check_finite(keys: Tensor, weight: Tensor) -> None:
    """Raise ValueError if a weight that isn't pruned is NaN or infinite.

    Args:
        keys: Keys of `weight`, or their maxima over kernels.
        weight: Weight, for the error.
    """
    infinity = int(float_bits(torch.tensor(torch.inf, dtype=magnitudes(keys[:0]).dtype)))
    if keys.numel() and int(keys.amax()) >= infinity:
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"`weight` of shape {tuple(weight.shape)} cannot be ranked: {bad} of its "
            f"{weight.numel()} values are not finite (NaN or infinity)"
        )


def smallest(keys: Tensor, number: int) -> Tensor:
    """Exactly the `number` smallest units of each scope; of equal ones the lower index is chosen.

    Args:
        keys: Keys of shape `(units, scopes)`, negative where a unit is pruned already.
        number: Number of units. In a scope where more are pruned already, all of those are chosen,
            unless the number is 0.

    Returns:
        A bool tensor of the same shape, True where a unit is chosen.
    """
    if number <= 0 or number >= len(keys):
        return torch.full_like(keys, number > 0, dtype=torch.bool)
    if not _maybe_few_new(keys, number):
        return _smallest_by_selection(keys, number)
    n_pruned = column_sums(keys < 0)
    n_new = number - int(n_pruned.amin())  # the most in any scope
    if n_new > _FEW and len(keys) > _SMALL_SCOPE:
        return _smallest_by_selection(keys, number)
    chosen = keys <= _cutoff_by_passes(keys, n_pruned, number, n_new)
    surplus = column_sums(chosen) != n_pruned.clamp(min=number)
    tied = surplus.nonzero().squeeze(1)
    if len(tied):
        chosen[:, tied] = _smallest_by_selection(keys[:, tied], number)
    return chosen


def _maybe_few_new(keys: Tensor, number: int) -> bool:
    """Whether to count the new units of all scopes: the first scope is an example of them."""
    units, scopes = keys.shape
    if units <= _SMALL_SCOPE:
        return True
    if units >= _LONG and scopes == 1:
        return False
    return number - int(torch.count_nonzero(keys[:, 0] < 0)) <= _FEW


def column_sums(bools: Tensor) -> Tensor:
    """How many of each column are true, int32.

    Eight neighbouring columns are added at once, as the bytes of a 64-bit integer, where they lie
    next to each other in memory. A sum over bools would convert each of them first.
    """
    columns = bools.shape[1]
    if columns == 1:
        return torch.count_nonzero(bools).to(torch.int32)[None]
    if not columns or columns % 8 or bools.storage_offset() % 8 or not bools.is_contiguous():
        return bools.sum(0, dtype=torch.int32)
    eights = torch.split(bools.view(torch.int64), 255)  # rows: more would overflow a byte
    sums = torch.stack([rows.sum(0) for rows in eights]).view(torch.uint8)
    return sums.sum(0, dtype=torch.int32)


def _cutoff_by_passes(keys: Tensor, n_pruned: Tensor, number: int, n_new: int) -> Tensor:
    """The `number`-th smallest key of each scope, if no two keys are equal.

    Each of `n_new` passes raises the cutoff of a scope to its next larger key. That is the key
    whose difference to the present cutoff is the smallest as an unsigned integer: the differences
    of keys at or below the cutoff wrap around to large values.
    """
    lowest = torch.iinfo(keys.dtype).min
    unsigned = keys ^ lowest  # signed integers in the order of the unsigned ones
    cutoff = torch.full_like(n_pruned, -1)  # the keys of pruned units are below 0
    differences = torch.empty_like(unsigned)
    for step in range(n_new):
        above = torch.sub(unsigned, cutoff + 1, out=differences).amin(0) ^ lowest
        cutoff = torch.where(n_pruned + step < number, cutoff + 1 + above, cutoff)
    return cutoff


def _smallest_by_selection(keys: Tensor, number: int) -> Tensor:
    """`smallest` for any keys: the cutoff of each scope is selected, and ties are resolved."""
    cutoff, is_tied = _kth_smallest(keys, number)
    chosen = keys <= cutoff.clamp(min=-1)  # all pruned units, whose keys are negative
    tied = is_tied.nonzero().squeeze(1)
    if len(tied):  # more keys equal the cutoff than are wanted: the first of them are chosen
        rows, cutoff = keys[:, tied].t(), cutoff[tied, None]
        below, equal = rows < cutoff, rows == cutoff
        allowed = number - below.sum(1, keepdim=True)
        chosen[:, tied] = (below | (equal & (equal.cumsum(1) <= allowed)) | (rows < 0)).t()
    return chosen


def _kth_smallest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest key (1-based) of each scope, and where the one after it is equal."""
    if keys.device.type != "cpu":
        cutoff = torch.kthvalue(keys, k, dim=0).values
        return cutoff, column_sums(keys <= cutoff) > k
    # NumPy selects with AVX where the CPU has it, faster than PyTorch on all cores.
    if keys.shape[1] == 1 and len(keys) >= _LONG:
        value, is_tied = _kth_of_long(keys.flatten().numpy(), k)
        return torch.tensor([value], dtype=keys.dtype), torch.tensor([is_tied])
    rows = keys.t().clone(memory_format=torch.contiguous_format).numpy()
    rows.partition(k - 1, axis=1)
    parted = torch.from_numpy(rows)
    return parted[:, k - 1], parted[:, k:].amin(1) == parted[:, k - 1]


def _kth_of_long(keys: np.ndarray, k: int) -> tuple[int, bool]:
    """`_kth_smallest` of many keys, selected among those between two bounds from a sample."""
    sample = np.sort(keys[::_STRIDE])
    place = k * len(sample) // len(keys)
    margin = 4 * math.isqrt(len(sample))
    low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
    below = int(np.count_nonzero(keys < low))
    between = keys[(keys >= low) & (keys <= high)]
    if not below < k <= below + len(between):  # the sample was misleading
        below, between = 0, keys
    cutoff = int(np.partition(between, k - below - 1)[k - below - 1])
    return cutoff, below + int(np.count_nonzero(between <= cutoff)) > k
