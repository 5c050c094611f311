"""How a run's images become tensors in evaluation, in timm's words, and its classes' names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from starfire_prune.data import IMAGENET_MEAN, IMAGENET_STD, digits_normalisation
from starfire_prune.recipe.sections import Data

__all__ = ["ImageSettings", "class_names", "image_settings"]


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """What is done to an RGB image of pixels in [0, 1] before the model gets it.

    Attributes:
        size: height and width in pixels.
        interpolation: for resizing.
        crop_pct: share of the resized side that the crop in the middle keeps, in (0, 1].
        mean: of the channels, subtracted.
        std: of the channels, above 0, divided by.
    """

    size: int
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def as_timm(self) -> dict[str, Any]:
        """The keys of `pretrained_cfg` that `timm.data.resolve_model_data_config` reads."""
        return {
            "input_size": [3, self.size, self.size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def image_settings(data: Data) -> ImageSettings:
    """The settings by which a run evaluates on the data of its recipe.

    The digits are normalised by their own mean and deviation and not cropped, whatever the recipe
    says of photographs.
    """
    if data.name == "digits":
        mean, std = digits_normalisation()
        return ImageSettings(data.image_size, data.interpolation, 1.0, (mean,) * 3, (std,) * 3)
    mean_of, std_of = data.mean or IMAGENET_MEAN, data.std or IMAGENET_STD
    return ImageSettings(data.image_size, data.interpolation, data.crop_pct, mean_of, std_of)


def class_names(
    data: Data, num_classes: int, *, reads_folders: bool = True
) -> tuple[str, ...] | None:
    """The names of the classes by their labels, where the data tell them and are at hand.

    They are those of the digits, or of the folders of photographs; images are not looked at.

    Args:
        data: of a recipe.
        num_classes: that the model tells apart; data of another number name none of them.
        reads_folders: whether to look into `data.root`. A recipe from elsewhere may name any
            folder of this machine, whose content an export would give away.
    """
    if data.name == "digits":
        names = tuple(map(str, range(10)))
    else:
        names = _folder_names(data) if reads_folders else ()
    return names if len(names) == num_classes else None


def _folder_names(data: Data) -> tuple[str, ...]:
    if data.name not in ("folder", "tiny_imagenet") or data.root is None:
        return ()
    try:
        train = Path(data.root).expanduser() / "train"
        return tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
    except (OSError, RuntimeError, ValueError):  # also of a home of nobody, of a character NUL
        return ()
