"""The preprocessing of photographs by timm's transforms, for training and for validation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from torch import Tensor

from starfire_prune.data.errors import DataError
from starfire_prune.utils.optional import import_optional

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "INTERPOLATIONS", "Preprocessing", "is_policy"]


INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
# timm silently skips sections that it can't parse; each kind of policy has its own sections
_NUMBER: Final = r"\d+(\.\d+)?"
_POLICY: Final = re.compile(
    rf"rand(-(m|n|mmax|inc)\d+|-(p|mstd){_NUMBER}|-t(weights|3aw?))*"
    rf"|augmix(-(m|w|d|b)\d+|-(a|mstd){_NUMBER})*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)
Transform = Callable[["Image.Image"], Tensor]


def is_policy(text: str) -> bool:
    """Whether a text is a policy of timm's auto-augmentation that timm reads completely.

    Example:
        >>> is_policy("rand-m9-mstd0.5"), is_policy("rand-magnitude9")
        (True, False)
    """
    return _POLICY.fullmatch(text) is not None


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the preprocessing; `load_datasets` describes them."""

    image_size: int = 224
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    auto_augment: str | None = None
    random_erasing: float = 0.0
    color_jitter: float = 0.0
    hflip: float = 0.5

    def check(self) -> None:
        """Raise DataError for the first value out of its range."""
        policies = "one of timm's policies, such as rand-m9-mstd0.5, augmix-m3 or 3a"
        checks = (
            ("image_size", self.image_size >= 1, "at least 1"),
            (
                "interpolation",
                self.interpolation in INTERPOLATIONS,
                f"one of {', '.join(INTERPOLATIONS)}",
            ),
            ("crop_pct", 0 < self.crop_pct <= 1, "above 0 and at most 1"),
            ("mean", len(self.mean) == 3, "three numbers, one per channel"),
            (
                "std",
                len(self.std) == 3 and min(self.std) > 0,
                "three numbers above 0, one per channel",
            ),
            (
                "crop_scale",
                len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
                "two numbers, 0 < low <= high <= 1",
            ),
            ("auto_augment", self.auto_augment is None or is_policy(self.auto_augment), policies),
            ("random_erasing", 0 <= self.random_erasing <= 1, "in [0, 1]"),
            ("color_jitter", self.color_jitter >= 0, "at least 0"),
            ("hflip", 0 <= self.hflip <= 1, "in [0, 1]"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise DataError(f"{name} (={getattr(self, name)!r}) must be {expected}")

    def transforms(self) -> tuple[Transform, Transform]:
        """Build the transforms of an RGB image for training and for validation."""
        create_transform = partial(
            import_optional("timm.data").create_transform,
            input_size=self.image_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
        )
        train = create_transform(
            is_training=True,
            scale=self.crop_scale,
            hflip=self.hflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            re_prob=self.random_erasing,
            re_mode="pixel",
        )
        return train, create_transform(is_training=False)
