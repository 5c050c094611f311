"""Folders of noise images in the layouts of the data sets, and what is read of them."""

import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from starfire_prune.data import (
    DataError,
    Datasets,
    load_datasets,
)

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
both_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=forks)])


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise((20, 16))).save(path)
    return path


def make_folder(root: Path, val: str = "val") -> Path:
    """Classes ant and bee with three images for training and two for validation each."""
    for name in ("ant", "bee"):
        for index in range(3):
            save(root / "train" / name / f"{index}.jpg")
        for index in range(2):
            save(root / val / name / f"{index}.jpg")
    return root


def make_tiny_imagenet(root: Path) -> Path:
    """Classes n1 and n2 with two images for training each, and three for validation in all."""
    for wnid in ("n1", "n2"):
        for index in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for index in range(3):
        save(root / "val" / "images" / f"val_{index}.JPEG")
    annotate(root, "val_0.JPEG\tn2", "val_1.JPEG\tn1", "val_2.JPEG\tn2")
    (root / "wnids.txt").write_text("n2\nn1\n")
    return root


def annotate(root: Path, *lines: str) -> None:
    text = "".join(f"{line}\t0\t0\t63\t63\n" for line in lines)
    (root / "val" / "val_annotations.txt").write_text(text)


def load_folder(root: Path, **options: Any) -> Datasets:
    return load_datasets("folder", root=root, **{"image_size": 8, **options})


def load_tiny_imagenet(root: Path) -> Datasets:
    return load_datasets("tiny_imagenet", root=root, image_size=8)


def samples(dataset: Any) -> list[tuple[Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


def labels(dataset: Any) -> list[int]:
    return list(dataset.labels)


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(one, other) and label == label_of_other
        for (one, label), (other, label_of_other) in zip(first, second, strict=True)
    )


def raises(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def error_of(loader: Any) -> DataError:
    """Read a loader to its error."""
    with pytest.raises(DataError) as caught:
        list(loader)
    # The error holds the loader's workers in a reference cycle. Left to the garbage collector,
    # they lose their queues before they are told to end, and each is waited for 5 s.
    traceback.clear_frames(caught.tb)
    return caught.value
