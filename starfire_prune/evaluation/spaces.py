"""The space of an attack's epsilon: pixels in [0, 1], or the normalised numbers of an image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final, Literal

__all__ = [
    "NORMALISED",
    "PIXELS",
    "Space",
    "SpaceName",
    "check_epsilon",
    "epsilon_text",
    "is_level",
    "pixel_space",
]

SpaceName = Literal["pixel", "normalised"]


@dataclasses.dataclass(frozen=True)
class Space:
    """The space in which epsilon is measured; tuples have an entry per channel, or one for all.

    Attributes:
        name: `"pixel"`, in [0, 1], or `"normalised"`: the numbers that the model receives.
        unit: The size of 1 in this space, in the model's numbers.
        low, high: The bounds of an image, in the model's numbers.
    """

    name: SpaceName
    unit: tuple[float, ...] = (1.0,)
    low: tuple[float, ...] = (-math.inf,)
    high: tuple[float, ...] = (math.inf,)


NORMALISED: Final = Space("normalised")
"""The numbers that the model receives, without bounds."""
PIXELS: Final = Space("pixel", low=(0.0,), high=(1.0,))
"""Pixels in [0, 1], which the model receives as they are."""


def pixel_space(mean: Sequence[float], std: Sequence[float]) -> Space:
    """The space of pixels in [0, 1] for a model that receives `(pixel - mean) / std`.

    Args:
        mean: Mean of each channel, or one for all.
        std: Standard deviation of each channel, or one for all; above 0.

    Raises:
        ValueError: If they differ in the number of channels, or `std` is not above 0.

    Example:
        >>> pixel_space([0.5], [0.25])
        Space(name='pixel', unit=(4.0,), low=(-2.0,), high=(2.0,))
    """
    if len(mean) != len(std):
        raise ValueError(
            f"`mean` (={mean!r}) and `std` (={std!r}) must have the same number of channels"
        )
    if not all(value > 0 for value in std):
        raise ValueError(f"`std` (={std!r}) must be above 0: pixels are divided by it")
    return Space(
        "pixel",
        unit=tuple(1 / s for s in std),
        low=tuple((0 - m) / s for m, s in zip(mean, std, strict=True)),
        high=tuple((1 - m) / s for m, s in zip(mean, std, strict=True)),
    )


def check_epsilon(epsilon: float, space: SpaceName) -> None:
    """Raise ValueError if an epsilon is out of the range of its space."""
    if space == "pixel" and not 0 <= epsilon <= 1:
        raise ValueError(
            f"`epsilon` (={epsilon:g}) must be in [0, 1] in pixel space: 8 of 255 levels are 8/255"
        )
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"`epsilon` (={epsilon:g}) must be a number from 0")


def epsilon_text(value: float, space: SpaceName) -> str:
    """An epsilon or a step size: in 255ths where it is a whole number of pixel levels.

    Example:
        >>> epsilon_text(8 / 255, "pixel"), epsilon_text(0.1, "pixel")
        ('8/255', '0.1')
    """
    return f"{round(255 * value)}/255" if space == "pixel" and is_level(value) else f"{value:.4g}"


def is_level(value: float) -> bool:
    """Whether a number is a whole number of the levels of 8-bit pixels.

    Example:
        >>> is_level(2 / 255), is_level(0.05)
        (True, False)
    """
    return abs(255 * value - round(255 * value)) < 1e-6
