"""The masks that the mask functions must compute: plain loops, straight from the algorithms.

The code is clear rather than fast, and independent of the package. The arguments of every function
are the weight's values as float64, the amount, and `kept`, the earlier mask (True = kept); it
returns the new mask.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Weight = NDArray[np.float64]
Mask = NDArray[np.bool_]
Unit = list[tuple[int, int]]  # the (k, c) of the kernels that are pruned together

PRUNED = -1.0  # the score of what is pruned already: below every magnitude


def share_count(amount: float, units: int) -> int:
    """How many of `units` an amount prunes: an int is that number, a float rounds half up."""
    return amount if isinstance(amount, int) else math.floor(amount * units + 0.5)


def lowest(scores: Sequence[float], wanted: int) -> list[int]:
    """The indices of the `wanted` lowest scores; of equals the lower index comes first."""
    return sorted(range(len(scores)), key=lambda index: (scores[index], index))[:wanted]


def window(
    weight: Weight,
    amount: float,
    kept: Mask,
    *,
    max_nonzero: int | None = None,
    exact_layer_sparsity: bool = False,
) -> Mask:
    """Algorithm 3: in each kernel the smallest magnitudes are pruned."""
    if exact_layer_sparsity:
        return prune_evenly(weight, kept, share_count(amount, weight.size), max_nonzero)
    n = math.prod(weight.shape[2:])
    wanted = share_count(amount, n)
    if max_nonzero is not None:
        wanted = max(wanted, n - max_nonzero)
    result = kept.copy()
    for k in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            kernel, alive = weight[k, c].ravel(), kept[k, c].ravel()
            scores = [abs(kernel[i]) if alive[i] else PRUNED for i in range(n)]
            for i in lowest(scores, wanted):
                result[k, c][np.unravel_index(i, weight.shape[2:])] = False
    return result


def prune_evenly(weight: Weight, kept: Mask, total: int, max_nonzero: int | None = None) -> Mask:
    """The smallest weights of kernels are pruned up to `total` zeros of the layer, evenly."""
    n = math.prod(weight.shape[2:])
    channels = weight.shape[1]
    values = weight.reshape(-1, n)  # kernel (k, c) is row k * channels + c
    alive = kept.copy().reshape(-1, n)

    def zeros(kernel: int) -> int:
        return n - int(alive[kernel].sum())

    def smallest(kernel: int) -> tuple[float, int]:
        return min((abs(values[kernel, i]), i) for i in range(n) if alive[kernel, i])

    def drop_smallest(kernel: int) -> None:
        alive[kernel, smallest(kernel)[1]] = False

    survivors = [kernel for kernel in range(weight.shape[0] * channels) if alive[kernel].any()]
    need = total - n * (weight.shape[0] * channels - len(survivors))
    if not survivors:
        return kept.copy()
    base = min(max(need, 0) // len(survivors), n - 1)
    if max_nonzero is not None:
        base = max(base, n - max_nonzero)
    for kernel in survivors:
        while zeros(kernel) < base:
            drop_smallest(kernel)
    rest = need - sum(zeros(kernel) for kernel in survivors)
    while rest > 0 and base + 1 < n:
        level = [kernel for kernel in survivors if zeros(kernel) == base]
        level.sort(key=lambda kernel: (smallest(kernel)[0], kernel))
        for kernel in level[:rest]:
            drop_smallest(kernel)
        rest -= len(level[:rest])
        base += 1
    return alive.reshape(weight.shape)


def blocks(length: int, size: int, *, at_least: int = 0) -> list[range]:
    """The channels of each block along one dimension; single ones if few whole blocks fit."""
    if length // size < at_least:
        size = 1
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def ck_scopes(
    shape: tuple[int, ...],
    *,
    groups: int = 1,
    block_size: tuple[int, int] = (1, 1),
    scope: str = "channel",
) -> list[list[Unit]]:
    """The units of each scope: blocks of kernels inside one group of the convolution."""
    each = shape[0] // groups
    outputs = blocks(each, block_size[0], at_least=2)
    inputs = blocks(shape[1], block_size[1], at_least=2)

    def unit(group: int, output: range, input: range) -> Unit:
        return [(group * each + k, c) for k in output for c in input]

    if scope == "layer":
        return [[unit(g, o, i) for g in range(groups) for o in outputs for i in inputs]]
    return [[unit(g, o, i) for o in outputs] for g in range(groups) for i in inputs]


def ck(
    weight: Weight,
    amount: float,
    kept: Mask,
    *,
    groups: int = 1,
    block_size: tuple[int, int] = (1, 1),
    scope: str = "channel",
    max_nonzero: int | None = None,
) -> Mask:
    """Algorithm 1: of the units that read the same input channels, the lowest maxima are pruned."""
    result = kept.copy()
    for units in ck_scopes(weight.shape, groups=groups, block_size=block_size, scope=scope):
        wanted = share_count(amount, len(units))
        if max_nonzero is not None:
            wanted = max(wanted, len(units) - max_nonzero)
        scores = []
        for unit in units:
            score = PRUNED
            for k, c in unit:
                score = max([score, *np.abs(weight[k, c][kept[k, c]])])
            scores.append(score)
        for index in lowest(scores, wanted):
            for k, c in units[index]:
                result[k, c] = False
    return result


def intra(
    weight: Weight,
    amount: float,
    kept: Mask,
    *,
    window_fraction: float = 0.5,
    groups: int = 1,
    scope: str = "channel",
) -> Mask:
    """Algorithm 4: kernels are pruned up to a part of the amount, then weights up to the total."""
    if math.prod(weight.shape[2:]) == 1:
        return ck(weight, amount, kept, groups=groups, scope=scope)
    s = window_fraction * amount
    c = 1.0 if s == 1 else (amount - s) / (1 - s)
    survivors = ck(weight, c, kept, groups=groups, scope=scope)
    return prune_evenly(weight, survivors, share_count(amount, weight.size))


def protect_best(scores: list[float], columns: int) -> int:
    """Make the best of each row of `columns` scores infinite; returns how many there are."""
    n_protected = 0
    for start in range(0, len(scores), columns):
        best = max(range(start, start + columns), key=lambda index: (scores[index], index))
        if scores[best] != PRUNED:
            scores[best] = math.inf
            n_protected += 1
    return n_protected


def fc_block(
    weight: Weight, amount: float, kept: Mask, *, block_size: tuple[int, int] = (4, 4)
) -> Mask:
    """Figure 2d: the blocks with the lowest sums are pruned, the best of a row of blocks never."""
    outputs, inputs = map(blocks, weight.shape, block_size)
    areas = [np.ix_(output, input) for output in outputs for input in inputs]
    scores = []
    for area in areas:
        total = 0.0
        for value, alive in zip(weight[area].ravel(), kept[area].ravel(), strict=True):
            total += abs(value) if alive else 0.0
        scores.append(total if kept[area].any() else PRUNED)
    wanted = share_count(amount, len(areas))
    wanted = min(wanted, len(areas) - protect_best(scores, len(inputs)))
    result = kept.copy()
    for index in lowest(scores, wanted):
        result[areas[index]] = False
    for row in range(len(weight)):  # no neuron loses its last weight
        if kept[row].any() and not result[row].any():
            magnitudes = np.where(kept[row], np.abs(weight[row]), -1.0)
            result[row, int(magnitudes.argmax())] = True
    return result


def fc_fine(weight: Weight, amount: float, kept: Mask) -> Mask:
    """Figure 2c: the smallest weights of the layer are pruned, the largest of a row never."""
    scores = [
        abs(value) if alive else PRUNED
        for value, alive in zip(weight.ravel(), kept.ravel(), strict=True)
    ]
    wanted = share_count(amount, len(scores))
    wanted = min(wanted, len(scores) - protect_best(scores, weight.shape[1]))
    result = kept.copy()
    for index in lowest(scores, wanted):
        result[np.unravel_index(index, weight.shape)] = False
    return result


def with_a_weight(weight: Weight, result: Mask, kept: Mask) -> Mask:
    """`result`, in which each row that would lose all its weights keeps its largest."""
    for row in range(len(weight)):
        candidates = np.flatnonzero(kept[row])
        if len(candidates) and not result[row].any():
            result[row, max(candidates, key=lambda column: abs(weight[row, column]))] = True
    return result


def fc_structure(
    weight: Weight,
    amount: float,
    kept: Mask,
    *,
    columns: Iterable[bool],
    then: str = "fine",
    block_size: tuple[int, int] = (4, 4),
) -> Mask:
    """Figure 3: the columns that read zeros are pruned, then weights or blocks up to the amount."""
    dead = np.array([bool(column) for column in columns])
    start = with_a_weight(weight, kept & ~dead, kept)
    wanted = share_count(amount, weight.size)
    if then == "fine":
        return fc_fine(weight, wanted, start)
    numbers = range(math.prod(map(math.ceil, np.divide(weight.shape, block_size))) + 1)
    every = [fc_block(weight, number, start, block_size=block_size) for number in numbers]
    nearest = min(every, key=lambda mask: (abs((~mask).sum() - wanted), mask.sum()))
    return with_a_weight(weight, nearest, start)


def magnitude(weight: Weight, amount: float, kept: Mask) -> Mask:
    """The smallest weights of the layer are pruned, whatever a channel keeps."""
    scores = [
        abs(value) if alive else PRUNED
        for value, alive in zip(weight.ravel(), kept.ravel(), strict=True)
    ]
    result = kept.copy()
    for index in lowest(scores, share_count(amount, len(scores))):
        result[np.unravel_index(index, weight.shape)] = False
    return result


def filters(weight: Weight, amount: float, kept: Mask) -> Mask:
    """The output channels with the smallest L1 norms are pruned."""
    scores = []
    for k in range(weight.shape[0]):
        total = sum(abs(value) for value in weight[k][kept[k]])
        scores.append(total if kept[k].any() else PRUNED)
    result = kept.copy()
    for k in lowest(scores, share_count(amount, len(scores))):
        result[k] = False
    return result
