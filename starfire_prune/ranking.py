"""Exact ranking of weights: integer keys, and selection in which ties go by the lower index.

The bits of a float that is not negative, read as an integer, rise with it. So the key of a weight
is the bits of its magnitude, with the sign bit set where an earlier mask has taken it: what is
gone comes first in every order, and integers are compared, selected and merged faster than floats.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_finite",
    "column_ranks",
    "float_bits",
    "magnitude_keys",
    "magnitudes",
    "sign_bits",
    "smallest",
]

# Up to this many weights a kernel, counting the smaller ones pairwise beats sorting by far.
_PAIRWISE_RANK_LIMIT = 64

# From this many keys on, the selection is worth the start of threads.
_THREADED_SELECTION = 1 << 17


def sign_bits(where: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers with the sign bit set where the bool tensor `where` is true, else 0."""
    return where.to(dtype).mul_(torch.iinfo(dtype).min)


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
    if mask is None:
        return bits & torch.iinfo(bits.dtype).max
    return (bits | torch.iinfo(bits.dtype).min).bitwise_xor_(sign_bits(mask.bool(), bits.dtype))


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
    """Exactly `number` smallest of each row of `keys` `(rows, units)`, as a bool tensor."""
    if number <= 0 or number >= keys.shape[1]:
        return torch.full_like(keys, number > 0, dtype=torch.bool)
    cutoff, tied_rows = _kth_smallest(keys, number)
    chosen = keys <= cutoff
    if len(tied_rows):  # more keys equal the cutoff than may go: the last of them stay
        tied = keys[tied_rows] == cutoff[tied_rows]
        allowed = number - (keys[tied_rows] < cutoff[tied_rows]).sum(1, keepdim=True)
        chosen[tied_rows] &= ~tied | (tied.cumsum(1) <= allowed)
    return chosen


def _kth_smallest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest (1-based) of each row, `(rows, 1)`, and the rows where a later one ties."""
    if keys.device.type != "cpu":
        cutoff = torch.kthvalue(keys, k, dim=1, keepdim=True).values
        return cutoff, ((keys <= cutoff).sum(1) > k).nonzero().squeeze(1)

    def select(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parted = np.partition(rows, k - 1, axis=1)  # with AVX where there is: faster than torch
        return parted[:, k - 1].copy(), parted[:, k:].min(axis=1)

    parts = np.array_split(keys.numpy(), _n_threads(keys))
    if len(parts) == 1:
        selected = [select(parts[0])]
    else:
        with ThreadPoolExecutor(len(parts)) as pool:  # NumPy lets go of the interpreter's lock
            selected = list(pool.map(select, parts))
    cutoff, following = (
        torch.from_numpy(np.concatenate(part)) for part in zip(*selected, strict=True)
    )
    return cutoff[:, None], (cutoff == following).nonzero().squeeze(1)


def _n_threads(keys: Tensor) -> int:
    return min(torch.get_num_threads(), len(keys)) if keys.numel() >= _THREADED_SELECTION else 1


def column_ranks(windows: Tensor) -> Tensor:
    """The rank (0 = smallest, ties by index) of each score in its column of `(n, columns)`."""
    n = len(windows)
    if n > _PAIRWISE_RANK_LIMIT:
        return windows.argsort(dim=0, stable=True).argsort(dim=0)
    ranks = torch.zeros(windows.shape, dtype=torch.uint8, device=windows.device)
    for j in range(1, n):
        smaller = windows[j] < windows[:j]
        ranks[:j] += smaller
        ranks[j] += j - smaller.sum(0, dtype=torch.uint8)
    return ranks
