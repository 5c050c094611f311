"""Comparing the outputs of two models that should compute the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from starfire_prune.utils.modules import copied_module

__all__ = ["compare_outputs", "output_tensors", "rounding"]


def compare_outputs(expected: Any, outputs: Any, tolerance: float) -> tuple[float, float]:
    """Compare outputs, each a tensor or tensors nested in lists, tuples and dicts.

    Two NaNs in the same place, and two equal infinities, count as equal.

    Args:
        expected: Outputs of the one model.
        outputs: Outputs of the other model.
        tolerance: Largest difference allowed, as a share of the largest finite expected output.

    Returns:
        The largest difference, and the largest absolute finite expected output.

    Raises:
        ValueError: If shapes, integers or bools differ, or floats by more than the tolerance; the
            message is the predicate of a sentence, such as "differ by 0.2 …".

    Example:
        >>> compare_outputs(torch.tensor([1.0, -2.0]), torch.tensor([1.0, -1.5]), tolerance=0.5)
        (0.5, 2.0)
    """
    ones, others = output_tensors(expected), output_tensors(outputs)
    shapes, other_shapes = ([tuple(tensor.shape) for tensor in side] for side in (ones, others))
    if shapes != other_shapes:
        raise ValueError(f"have the shapes {other_shapes} instead of {shapes}")
    pairs = list(zip(ones, others, strict=True))
    if not all(torch.equal(one, other) for one, other in pairs if not one.is_floating_point()):
        raise ValueError("differ in integers or bools")
    floats = [(one, other) for one, other in pairs if one.is_floating_point()]
    largest = max((_largest(one[one.isfinite()]) for one, _ in floats), default=0.0)
    deviation = max((_largest(_difference(one, other)) for one, other in floats), default=0.0)
    if not deviation <= tolerance * (largest or 1.0):
        raise ValueError(f"differ by {deviation:.2g}, where the largest is {largest:.2g}")
    return deviation, largest


@torch.no_grad()
def rounding(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """How far a model's outputs are from those that it computes in float64.

    Some models amplify the rounding of float32, so that no other engine can have their outputs.

    Args:
        model: A model in float32, which is not changed.
        inputs: Its inputs, one call for each of them.

    Returns:
        The largest difference as a share of the largest output; 0 for a model that can't compute in
        float64.
    """
    try:
        precise = copied_module(model).double()
        expected = [precise(each.double()) for each in inputs]
        found = [tree_map_only(Tensor, _doubled, model(each)) for each in inputs]
        deviation, largest = compare_outputs(expected, found, math.inf)
    except (RuntimeError, TypeError, ValueError):
        return 0.0
    return deviation / (largest or 1.0)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, in their order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Absolute differences, infinite where only one side is NaN or infinite."""
    same = (one == other) | (one.isnan() & other.isnan())
    return (one - other).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
