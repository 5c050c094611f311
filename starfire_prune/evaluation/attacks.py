"""Adversarial images within a distance in every number of an image: FGSM and PGD.

The images are attacked as the model receives them, normalised: epsilon and the valid pixel range
are converted to normalised units. That is the attack on pixels, with the normalisation as part of
the model. No image is normalised again: where nothing is changed, the model receives the same bits
as without an attack.

Attacks follow the model in evaluation mode, and leave its parameters, their gradients, its buffers
and its modes as they were. Half precision: images of float16 and bfloat16 are moved in float32 and
rounded for each pass of the model and at the end, so that they may exceed the distance by half a
unit in the last place; gradients that underflow in half precision are zero and move nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune.evaluation.spaces import (
    PIXELS,
    Space,
    SpaceName,
    check_epsilon,
    epsilon_text,
)

__all__ = ["Attack", "Precision", "check_pgd", "default_step_size", "fgsm", "pgd"]


Precision = Literal["fp32", "bf16", "fp16"]
_HALVES: Final = (torch.float16, torch.bfloat16)
_STEPS: Final = 10


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack with its settings, or none: the clean images.

    Attributes:
        name: `"none"` for clean images, `"fgsm"` or `"pgd"`.
        epsilon: The most by which each number of an image may change; 0 for clean images.
        space: The space of epsilon, see `Space.name`; without meaning for clean images.
        steps: Number of PGD's steps; None stands for 10.
        step_size: Size of PGD's steps, in the unit of epsilon; None stands for
            `default_step_size`.
        restarts: Number of PGD's starts; None stands for 1.
        seed: Seed of PGD's random starts; None where it starts from the images themselves.
        source: Name of the run whose gradients the attack follows; None for the model's own.
        precision: Precision of the passes, both of the attack and of the measurement.

    Raises:
        ValueError: If a setting of PGD is out of its range.
    """

    name: Literal["none", "fgsm", "pgd"]
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    space: SpaceName = "pixel"
    steps: int | None = None
    step_size: float | None = None
    restarts: int | None = None
    seed: int | None = None
    source: str | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.name == "pgd":
            steps = _STEPS if self.steps is None else self.steps
            restarts = 1 if self.restarts is None else self.restarts
            check_pgd(steps, self.step_size if self.epsilon else None, restarts, self.seed)

    @property
    def pgd_settings(self) -> dict[str, Any]:
        """The settings that only PGD has, by the names of its arguments, without None."""
        steps = self.steps or _STEPS
        default = default_step_size(self.epsilon, steps)
        return {
            "steps": steps,
            "step_size": default if self.step_size is None else self.step_size,
            "restarts": self.restarts or 1,
            "seed": self.seed,
        }

    def completed(self) -> Attack:
        """The attack with the settings that None stands for."""
        return dataclasses.replace(self, **self.pgd_settings) if self.name == "pgd" else self

    @property
    def has_default_step_size(self) -> bool:
        """Whether its step size is the default for its epsilon."""
        default = default_step_size(self.epsilon, self.steps or _STEPS)
        return self.step_size is None or math.isclose(self.step_size, default, rel_tol=1e-9)

    @property
    def label(self) -> str:
        """The attack and its settings except epsilon, in a few words.

        Example:
            >>> Attack("pgd", steps=10, restarts=2, seed=0, source="dense-seed0").label
            'PGD of 10 steps, 2 restarts, transferred from dense-seed0'
        """
        if self.name == "none":
            return "clean"
        text = self.name.upper()
        if self.steps is not None:
            text += f" of {self.steps} step{'s' * (self.steps > 1)}"
        if self.step_size is not None and not self.has_default_step_size:
            text += f" of {epsilon_text(self.step_size, self.space)}"
        if self.name == "pgd" and self.seed is None:
            text += " from the images"
        restarts = f"{self.restarts} restarts" if (self.restarts or 1) > 1 else ""
        space = "" if self.space == "pixel" else self.space
        precision = "" if self.precision == "fp32" else self.precision
        source = "" if self.source is None else f"transferred from {self.source}"
        return ", ".join(part for part in (text, restarts, space, precision, source) if part)

    @property
    def epsilon_text(self) -> str:
        """Its epsilon, in 255ths where it is a whole number of pixel levels."""
        return epsilon_text(self.epsilon, self.space)


def default_step_size(epsilon: float, steps: int) -> float:
    """The step size of PGD with which all steps together cover 2.5 times epsilon.

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

    The gradient is computed once for all epsilons. After Goodfellow et al., "Explaining and
    harnessing adversarial examples" (2014).

    Args:
        model: A model that returns logits `(N, classes)`.
        images: Images as the model receives them, `(N, C, H, W)`, floating point.
        labels: Classes of the images, int64 `(N,)`.
        epsilons: Distances, from 0; in pixels at most 1. At 0 images are returned bit for bit.
        space: The space of epsilon; `pixel_space(mean, std)` for normalised images.

    Returns:
        The adversarial images of each epsilon, in the dtype and memory format of `images`.

    Raises:
        ValueError: If an argument is out of its range, or shapes don't fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> clean = torch.rand(5, 3, 2, 2)
        >>> near, far = fgsm(model, clean, torch.arange(5) % 3, [1 / 255, 8 / 255])
        >>> bool((near - clean).abs().max() <= 1 / 255 + 1e-6)
        True
    """
    _check_batch(images, labels, space)
    for epsilon in epsilons:
        check_epsilon(epsilon, space.name)
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
    """Projected gradient descent: steps up the loss, each projected back to within epsilon.

    After Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).

    Args:
        model: A model that returns logits `(N, classes)`.
        images: Images as the model receives them, `(N, C, H, W)`, floating point.
        labels: Classes of the images, int64 `(N,)`.
        epsilon: Distance, from 0; in pixels at most 1. At 0 images are returned bit for bit.
        space: The space of epsilon and of the step size; `pixel_space(mean, std)` for normalised
            images.
        steps: Number of steps, from 1.
        step_size: Size of a step, above 0; by default `default_step_size`.
        restarts: Number of starts, from 1. Of several results for an image a misclassified one is
            kept, and of these the one with the highest loss.
        seed: Seed of the random starts, uniform within epsilon; None starts from the images.
        first: Number of the first image. The start of an image depends only on the seed, the
            restart and its number, so that data may be attacked in batches of any size.

    Returns:
        The adversarial images, in the dtype and memory format of `images`.

    Raises:
        ValueError: If an argument is out of its range, or shapes don't fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> clean = torch.rand(5, 3, 2, 2)
        >>> found = pgd(model, clean, torch.arange(5) % 3, 8 / 255, steps=5, restarts=2)
        >>> bool((found - clean).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    _check_batch(images, labels, space)
    check_epsilon(epsilon, space.name)
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


# The parts of an attack


def _working(images: Tensor) -> Tensor:
    """The images in the dtype in which they are moved, detached from every graph."""
    images = images.detach()
    return images.float() if images.dtype in _HALVES else images


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """Numbers per channel, `(1, C, 1, 1)`, or one for all, `(1, 1, 1, 1)`."""
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def _moved(clean: Tensor, images: Tensor, epsilon: float, space: Space) -> Tensor:
    """The nearest images within epsilon of the clean ones and within the bounds of an image.

    Where a clean image exceeds the bounds, after rounding or bicubic resizing, it is the bound.
    """
    reach = _per_channel(space.unit, clean) * epsilon
    lowest = clean.minimum(_per_channel(space.low, clean)).maximum(clean - reach)
    highest = clean.maximum(_per_channel(space.high, clean)).minimum(clean + reach)
    return images.clamp(lowest, highest)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of each loss with respect to its image, which the model gets in `dtype`."""
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
    """The most harmful of the results for each image."""
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
    """Put the model in evaluation mode; afterwards each module has its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Checks


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
            f"`space` has {channels} channels and the images have {images.shape[1]}: give mean and "
            f"std for each of them"
        )


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
            f"`restarts` (={restarts}) from the images themselves would all be equal: give a seed"
        )
