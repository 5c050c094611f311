"""Adversarial images within a distance in every number of an image: FGSM and PGD.

The images are attacked as the model gets them, normalised: a pixel's epsilon is divided by the
standard deviation of its channel, and so are the bounds of black and white moved. That is the
attack on pixels, with the normalisation a part of the model, but no image is normalised anew: where
nothing is changed, the model gets the same bits as without an attack.

Attacks follow the model in evaluation, and leave its parameters, their gradients, its buffers and
its modes as they were. Half precision: images of float16 and bfloat16 are moved in float32 and
rounded for each pass of the model and at the end, by which they may leave the distance by half a
unit in the last place; gradients that a half can't hold are zero, and move nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "NORMALISED",
    "PIXELS",
    "Space",
    "check_epsilon",
    "check_pgd",
    "default_step_size",
    "fgsm",
    "pgd",
    "pixel_space",
]


_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Space:
    """What epsilon is measured in.

    Attributes:
        name: `"pixel"`, in [0, 1], or `"normalised"`: the numbers that the model gets.
        unit: of each channel, or of all: what 1 in this space is in the model's numbers.
        low, high: of each channel, or of all: the bounds of an image in the model's numbers.
    """

    name: Literal["pixel", "normalised"]
    unit: tuple[float, ...] = (1.0,)
    low: tuple[float, ...] = (-math.inf,)
    high: tuple[float, ...] = (math.inf,)


NORMALISED = Space("normalised")
"""Epsilon is of the numbers that the model gets, and these have no bounds."""
PIXELS = Space("pixel", low=(0.0,), high=(1.0,))
"""Epsilon is of pixels in [0, 1], which the model gets as they are."""


def pixel_space(mean: Sequence[float], std: Sequence[float]) -> Space:
    """The space of pixels in [0, 1], of which a model gets `(pixel - mean) / std`.

    Args:
        mean: of each channel, or of all.
        std: of each channel, or of all; above 0.

    Raises:
        ValueError: if they are not of as many channels, or `std` is not above 0.

    Example:
        >>> pixel_space([0.5], [0.25])
        Space(name='pixel', unit=(4.0,), low=(-2.0,), high=(2.0,))
    """
    if len(mean) != len(std):
        raise ValueError(f"`mean` (={mean!r}) and `std` (={std!r}) must be of as many channels")
    if not all(value > 0 for value in std):
        raise ValueError(f"`std` (={std!r}) must be above 0: what pixels are divided by")
    return Space(
        "pixel",
        unit=tuple(1 / s for s in std),
        low=tuple((0 - m) / s for m, s in zip(mean, std, strict=True)),
        high=tuple((1 - m) / s for m, s in zip(mean, std, strict=True)),
    )


def default_step_size(epsilon: float, steps: int) -> float:
    """The step of PGD that crosses the ball from side to side and has a quarter to spare.

    Example:
        >>> default_step_size(0.04, steps=10)
        0.01
    """
    return 2.5 * epsilon / steps


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    space: Space = PIXELS,
) -> list[Tensor]:
    """The fast gradient sign method: one step of epsilon up the loss in every number.

    The gradient is worked out once for all epsilons. After Goodfellow et al., "Explaining and
    harnessing adversarial examples" (2014).

    Args:
        model: gives logits `(N, classes)`.
        images: as the model gets them, `(N, C, H, W)`, floating point.
        labels: of the images, int64 `(N,)`.
        epsilons: distances from 0, of pixels at most 1; at 0 images are returned bit for bit.
        space: what epsilon is measured in; `pixel_space` for images that are normalised.

    Returns:
        The adversarial images of each epsilon, in the dtype and memory format of `images`.

    Raises:
        ValueError: if an argument is out of its range, or shapes don't fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> clean = torch.rand(5, 3, 2, 2)
        >>> near, far = fgsm(model, clean, torch.arange(5) % 3, [1 / 255, 8 / 255])
        >>> bool((near - clean).abs().max() <= 1 / 255 + 1e-6)
        True
    """
    _check_batch(images, labels, space)
    for epsilon in epsilons:
        check_epsilon(epsilon, space)
    if not any(epsilons):
        return [images.detach().clone() for _ in epsilons]
    clean = _working(images)
    with _evaluating(model):
        direction = _gradient(model, clean, labels, images.dtype).sign()
    unit = _per_channel(space.unit, clean)
    return [
        _moved(clean, clean + direction * (unit * epsilon), epsilon, space).to(images.dtype)
        if epsilon
        else images.detach().clone()
        for epsilon in epsilons
    ]


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    space: Space = PIXELS,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    seed: int | None = 0,
    first: int = 0,
) -> Tensor:
    """Projected gradient descent: steps up the loss, each brought back to within epsilon.

    After Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).

    Args:
        model: gives logits `(N, classes)`.
        images: as the model gets them, `(N, C, H, W)`, floating point.
        labels: of the images, int64 `(N,)`.
        epsilon: distance from 0, of pixels at most 1; at 0 images are returned bit for bit.
        space: what epsilon and the step are measured in; `pixel_space` for normalised images.
        steps: from 1.
        step_size: above 0; by default `default_step_size`.
        restarts: from 1. Of several, each image keeps the end that is misclassified, and of these
            the one of the highest loss.
        seed: of the random starts, uniform within epsilon; None starts from the images.
        first: number of the first image. An image's start follows from the seed, the restart and
            its number alone, so that data may be attacked in batches of any size.

    Returns:
        The adversarial images, in the dtype and memory format of `images`.

    Raises:
        ValueError: if an argument is out of its range, or shapes don't fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> clean = torch.rand(5, 3, 2, 2)
        >>> found = pgd(model, clean, torch.arange(5) % 3, 8 / 255, steps=5, restarts=2)
        >>> bool((found - clean).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    _check_batch(images, labels, space)
    check_epsilon(epsilon, space)
    check_pgd(steps, step_size, restarts, seed)
    if epsilon == 0:
        return images.detach().clone()
    step = default_step_size(epsilon, steps) if step_size is None else step_size
    clean = _working(images)
    reach = _per_channel(space.unit, clean) * epsilon
    stride = _per_channel(space.unit, clean) * step
    ends = []
    with _evaluating(model):
        for restart in range(restarts):
            moved = clean
            if seed is not None:
                start = clean + _noise(clean, seed, restart, first) * reach
                moved = _moved(clean, start, epsilon, space)
            for _ in range(steps):
                direction = _gradient(model, moved, labels, images.dtype).sign()
                moved = _moved(clean, moved + direction * stride, epsilon, space)
            ends.append(moved.to(images.dtype))
        return _worst(model, ends, labels)


# --- the parts of an attack ---------------------------------------------------------------------


def _working(images: Tensor) -> Tensor:
    """The images in the dtype in which they are moved, out of every graph."""
    images = images.detach()
    return images.float() if images.dtype in _HALVES else images


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """Numbers of each channel, `(1, C, 1, 1)`, or of all of them."""
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def _moved(clean: Tensor, images: Tensor, epsilon: float, space: Space) -> Tensor:
    """The nearest images within epsilon of the clean ones and within the bounds of an image.

    Clean images beyond the bounds, as rounding and bicubic resizing leave them, bound themselves.
    """
    reach = _per_channel(space.unit, clean) * epsilon
    lowest = clean.minimum(_per_channel(space.low, clean)).maximum(clean - reach)
    highest = clean.maximum(_per_channel(space.high, clean)).minimum(clean + reach)
    return images.clamp(lowest, highest)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of each image's loss with respect to it, as the model gets it in `dtype`."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = images.to(dtype).clone().requires_grad_()
        losses = _losses(model(inputs), labels.clone())
        (gradient,) = torch.autograd.grad(losses.sum(), inputs)
    return gradient.to(images.dtype)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each image, in float32 at least."""
    logits = logits.float() if logits.dtype in _HALVES else logits
    return functional.cross_entropy(logits, labels, reduction="none")


def _noise(images: Tensor, seed: int, restart: int, first: int) -> Tensor:
    """Uniform numbers in [-1, 1), the same on every device and in batches of any size."""
    rows = [
        np.random.default_rng([seed, restart, first + index]).random(images.shape[1:], np.float32)
        for index in range(len(images))
    ]
    return torch.empty_like(images).copy_(torch.from_numpy(np.stack(rows))) * 2 - 1


@torch.no_grad()
def _worst(model: nn.Module, ends: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of the ends of each image the one that does the model the most harm."""
    worst = ends[0]
    if len(ends) == 1:
        return worst
    wrong, loss = _harm(model, worst, labels)
    for end in ends[1:]:
        end_wrong, end_loss = _harm(model, end, labels)
        worse = (end_wrong & ~wrong) | ((end_wrong == wrong) & (end_loss > loss))
        worst = torch.where(worse.view(-1, 1, 1, 1), end, worst)
        wrong, loss = torch.where(worse, end_wrong, wrong), torch.where(worse, end_loss, loss)
    return worst


def _harm(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image is misclassified, and its loss."""
    logits = model(images)
    return logits.argmax(1) != labels, _losses(logits, labels)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; each of its modules gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- checks -------------------------------------------------------------------------------------


def _check_batch(images: Tensor, labels: Tensor, space: Space) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"`images` must be floating point numbers (N, C, H, W), not {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"`labels` must be a class index for each of the {len(images)} images, not "
            f"{tuple(labels.shape)}"
        )
    channels = len(space.unit)
    if channels not in (1, images.shape[1]):
        raise ValueError(
            f"`space` is of {channels} channels and the images are of {images.shape[1]}: give its "
            f"mean and std for each of them"
        )


def check_epsilon(epsilon: float, space: Space) -> None:
    """Raise ValueError if an epsilon is out of the range of its space."""
    if space.name == "pixel" and not 0 <= epsilon <= 1:
        raise ValueError(
            f"`epsilon` (={epsilon:g}) must be in [0, 1] in pixel space: 8 of 255 levels are 8/255"
        )
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"`epsilon` (={epsilon:g}) must be a number from 0")


def check_pgd(steps: int, step_size: float | None, restarts: int, seed: int | None) -> None:
    """Raise ValueError if a setting of PGD is out of its range."""
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"`{name}` (={count}) must be at least 1")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"`step_size` (={step_size:g}) must be above 0")
    if seed is not None and seed < 0:
        raise ValueError(f"`seed` (={seed}) must be at least 0, or None for no random start")
    if seed is None and restarts > 1:
        raise ValueError(
            f"`restarts` (={restarts}) from the images themselves would all end alike: give a seed"
        )
