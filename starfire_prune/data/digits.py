"""The handwritten digits of scikit-learn."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from starfire_prune.data.errors import DataError
from starfire_prune.data.images import Datasets, LabelledImages, Source
from starfire_prune.utils.optional import import_optional

__all__ = ["digits_normalisation", "load_digits"]


def load_digits(source: Source) -> Datasets:
    """Load the 1797 digits, split 80 : 20 within each class, normalized by the training part."""
    if source.root is not None:
        raise DataError(
            f"data set 'digits' comes with scikit-learn: leave out root (={source.root})"
        )
    digits, train, val = _split_digits()
    pixels = _pixels(digits)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    preprocessing = source.preprocessing
    read = partial(
        _enlarge, image_size=preprocessing.image_size, interpolation=preprocessing.interpolation
    )

    def part(indices: list[int]) -> Dataset[tuple[Tensor, int]]:
        return LabelledImages(pixels[indices].unbind(), digits.target[indices].tolist(), read)

    return Datasets(part(train), part(val), tuple(str(name) for name in digits.target_names))


def digits_normalisation() -> tuple[float, float]:
    """The mean and the standard deviation that normalize the digits' pixels in [0, 1]."""
    digits, train, _ = _split_digits()
    pixels = _pixels(digits)[train]
    return pixels.mean().item(), pixels.std().item()


def _split_digits() -> tuple[Any, list[int], list[int]]:
    """The digits as scikit-learn loads them, and the indices of the two parts."""
    digits = import_optional("sklearn.datasets").load_digits()
    train, val = import_optional("sklearn.model_selection").train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    return digits, train, val


def _pixels(digits: Any) -> Tensor:
    return torch.from_numpy(digits.images).float() / 16


def _enlarge(pixels: Tensor, image_size: int, interpolation: str) -> Tensor:
    """Enlarge an ``(8, 8)`` image to ``(3, image_size, image_size)``."""
    size = (image_size, image_size)
    image = functional.interpolate(pixels[None, None], size, mode=interpolation)
    return image[0].repeat(3, 1, 1)
