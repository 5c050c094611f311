"""How a run prepares its images for evaluation, in timm's terms, and the names of its classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from starfire_prune.data.folders import class_folders
from starfire_prune.recipe.sections import Data
from starfire_prune.runs.data import normalisation

__all__ = ["ImageSettings", "class_names", "image_settings"]


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Preprocessing of an RGB image with pixels in [0, 1].

    Attributes:
        size: Height and width in pixels.
        interpolation: Interpolation for resizing.
        crop_pct: Share of the resized side that the center crop keeps, in (0, 1].
        mean: Mean that is subtracted, for each channel.
        std: Standard deviation, above 0, by which is divided, for each channel.
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
    """The preprocessing by which a run evaluates on the data of its recipe.

    The digits are normalized by their own mean and standard deviation and are not cropped; the
    recipe's settings for photographs have no effect on them.
    """
    mean, std = normalisation(data)
    if data.name == "digits":
        return ImageSettings(data.image_size, data.interpolation, 1.0, mean * 3, std * 3)
    return ImageSettings(data.image_size, data.interpolation, data.crop_pct, mean, std)


def class_names(
    data: Data, num_classes: int, *, reads_folders: bool = True
) -> tuple[str, ...] | None:
    """Names of the classes by label: the digits, or the names of the folders of photographs.

    Args:
        data: The data settings of a recipe.
        num_classes: Number of the model's classes.
        reads_folders: Whether the folder `data.root` may be listed. A recipe from elsewhere may
            name any folder of this machine, whose content an export would reveal.

    Returns:
        The names; None if the data have no names or are not on this machine, or have another number
        of classes.
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
        return tuple(class_folders(Path(data.root).expanduser() / "train"))
    except (OSError, RuntimeError, ValueError):  # also an unknown home folder, or a NUL character
        return ()
