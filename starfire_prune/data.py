"""Data sets and their loaders: scikit-learn's digits, image folders and Tiny-ImageNet.

Every data set gives its images as float32 tensors of shape ``(3, image_size, image_size)`` with a
class index each. Photographs get the transforms of PyTorch's ImageNet example: a random resized
crop and a horizontal flip for training, a resize and a centre crop for validation, and the mean
and standard deviation of ImageNet.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from collections.abc import Sized

    from PIL import Image

__all__ = [
    "DATASETS",
    "INTERPOLATIONS",
    "DataError",
    "Datasets",
    "LabelledImages",
    "build_loader",
    "error_sentence",
    "load_datasets",
]

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")

Item = TypeVar("Item")


class DataError(ValueError):
    """A data set that cannot be read, in one sentence that names the path and the way out."""


def error_sentence(error: DataError) -> str:
    """Give the one sentence of an error, also of one raised in a worker of a loader.

    A loader raises the error of a worker again with the worker's whole traceback for a message,
    of which this keeps the sentence at the end.

    Args:
        error: The error as it was caught.

    Returns:
        The sentence, without the traceback.

    Example:
        >>> error_sentence(DataError("/data/train holds no images"))
        '/data/train holds no images'
    """
    heading = f"{DataError.__module__}.{DataError.__qualname__}: "
    return str(error).rpartition(heading)[2].strip()


@dataclass(frozen=True)
class Datasets:
    """The two parts of a data set.

    Attributes:
        train: The images to train on, with augmentation where the data set has any.
        val: The images to validate on, the same at every epoch.
        classes: The names of the classes; ``classes[label]`` is the name of ``label``.
    """

    train: Dataset[tuple[Tensor, int]]
    val: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]


class LabelledImages(Dataset[tuple[Tensor, int]], Generic[Item]):
    """Images that are read when they are asked for, with a label each.

    Args:
        items: What ``read`` makes an image of: paths, or tensors in memory.
        labels: The class index of each item.
        read: Turns an item into a float32 image of shape ``(3, height, width)``. It must be
            picklable where workers are started by another method than fork.

    Example:
        >>> images = LabelledImages([torch.zeros(8, 8)], [4], lambda image: image.repeat(3, 1, 1))
        >>> image, label = images[0]
        >>> tuple(image.shape), label
        ((3, 8, 8), 4)
    """

    def __init__(
        self, items: Sequence[Item], labels: Sequence[int], read: Callable[[Item], Tensor]
    ) -> None:
        self.items = items
        self.labels = labels
        self.read = read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(self.items[index]), self.labels[index]


@dataclass(frozen=True)
class _Geometry:
    image_size: int
    interpolation: str
    crop_pct: float


def load_datasets(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int = 224,
    interpolation: str = "bilinear",
    crop_pct: float = 0.875,
) -> Datasets:
    """Load the training and the validation part of a data set.

    The files of a data set are listed and checked here, and decoded when an image is asked for.
    Which images there are, and in what order, is the same at every call.

    Args:
        name: A name in ``DATASETS``. ``"digits"``: the 1797 handwritten digits of scikit-learn,
            8×8 pixels enlarged to ``image_size``, split 80 : 20, without augmentation and without
            a crop. ``"folder"``: ``root/train/<class>/…`` and ``root/val/<class>/…`` (or
            ``root/validation``), the classes in the order of their sorted names.
            ``"tiny_imagenet"``: the layout of Stanford's CS231N, with ``val_annotations.txt``.
        root: The folder of the data set; none for digits, which come with scikit-learn.
        image_size: Height and width of the images in pixels, at least 1.
        interpolation: How images are resized, one of ``INTERPOLATIONS``.
        crop_pct: For validation, the side of the crop as a share of the shorter side of the
            resized image, in (0, 1].

    Returns:
        The data sets of both parts and the names of the classes.

    Raises:
        DataError: If the name or another argument is not valid, or if the files under ``root``
            are not the data set; also by the data sets themselves where an image cannot be read.
        ModuleNotFoundError: If a package is missing that the data set needs.

    Example:
        >>> datasets = load_datasets("digits", image_size=32)
        >>> image, label = datasets.train[0]
        >>> tuple(image.shape), datasets.classes[3]
        ((3, 32, 32), '3')
    """
    load = DATASETS.get(name)
    if load is None:
        raise DataError(_unknown_name(name))
    geometry = _Geometry(image_size, interpolation, crop_pct)
    _check_geometry(geometry)
    return load(None if root is None else Path(root).expanduser(), geometry)


def build_loader(
    dataset: Dataset[tuple[Tensor, int]], batch_size: int, *, train: bool, workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Build the loader of one part of a data set.

    The order of the images and the seeds of the workers are drawn from torch's default generator
    at the start of every epoch, so an epoch is repeated exactly by restoring that generator and,
    as augmentation without workers draws from it, Python's. For the same reason workers are
    started afresh every epoch.

    Args:
        dataset: Gives ``(image, label)`` and has a length.
        batch_size: Images in a batch, at least 1.
        train: Shuffle the images. A last batch of a single image is dropped then, since batch
            normalisation cannot train on one value a channel; every other last batch is kept, and
            so is the only one. Without ``train`` every image comes, in the data set's order.
        workers: Processes that read images; 0 reads them in this one.

    Returns:
        A loader of float32 images ``(N, 3, image_size, image_size)`` and int64 labels ``(N,)``, in
        pinned memory where CUDA is available.

    Raises:
        ValueError: If ``batch_size`` or ``workers`` is out of its range.

    Example:
        >>> images = LabelledImages([torch.zeros(3, 8, 8)] * 5, [0, 1, 2, 3, 4], torch.clone)
        >>> [len(labels) for _, labels in build_loader(images, 2, train=True)]
        [2, 2]
        >>> [len(labels) for _, labels in build_loader(images, 2, train=False)]
        [2, 2, 1]
    """
    count = len(cast("Sized", dataset))
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train and count > batch_size > 1 and count % batch_size == 1,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def _unknown_name(name: str) -> str:
    near = difflib.get_close_matches(name, DATASETS)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown data set {name!r}: {hint}known are {', '.join(DATASETS)}"


def _check_geometry(geometry: _Geometry) -> None:
    if geometry.image_size < 1:
        raise DataError(f"image_size (={geometry.image_size}) must be at least 1")
    if geometry.interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise DataError(f"interpolation (={geometry.interpolation!r}) must be one of {known}")
    if not 0 < geometry.crop_pct <= 1:
        raise DataError(f"crop_pct (={geometry.crop_pct}) must be above 0 and at most 1")


def _import(module: str) -> Any:
    """Import a module of an optional package; these are slow, so only where they are used."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise ModuleNotFoundError(
            f"this data set needs {package}: pip install 'starfire-prune[train]'", name=error.name
        ) from error


# Digits


def _load_digits(root: Path | None, geometry: _Geometry) -> Datasets:
    if root is not None:
        raise DataError(f"data set 'digits' comes with scikit-learn: leave out root (={root})")
    digits = _import("sklearn.datasets").load_digits()
    train, val = _import("sklearn.model_selection").train_test_split(
        range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    pixels = torch.from_numpy(digits.images).float() / 16
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    read = partial(_enlarge, geometry=geometry)

    def part(indices: list[int]) -> Dataset[tuple[Tensor, int]]:
        return LabelledImages(pixels[indices].unbind(), digits.target[indices].tolist(), read)

    return Datasets(part(train), part(val), tuple(str(name) for name in digits.target_names))


def _enlarge(pixels: Tensor, geometry: _Geometry) -> Tensor:
    """Make a ``(3, image_size, image_size)`` image of an ``(8, 8)`` one."""
    size = (geometry.image_size, geometry.image_size)
    image = functional.interpolate(pixels[None, None], size, mode=geometry.interpolation)
    return image[0].repeat(3, 1, 1)


# Folders of images


def _load_folder(root: Path | None, geometry: _Geometry) -> Datasets:
    root = _existing_root("folder", root)
    train, val = _part(root, "train"), _part(root, "val", "validation")
    classes = _class_names(train)
    _check_same_classes(train, classes, val, _class_names(val))
    return _photographs(_list_images(train, classes), _list_images(val, classes), classes, geometry)


def _existing_root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"data set {name!r} is read from a folder: give it as root")
    if not root.exists():
        raise DataError(f"root {root} does not exist: give the folder of data set {name!r}")
    if not root.is_dir():
        raise DataError(f"root {root} is a file: give the folder of data set {name!r}")
    return root


def _part(folder: Path, *names: str) -> Path:
    """Give the first folder of these names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    wanted = "/ or ".join(names)
    raise DataError(f"{folder} has no folder {wanted}/: give the folder that holds it as root")


def _class_names(part: Path) -> tuple[str, ...]:
    with os.scandir(part) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(f"{part} holds no class folders: put each class into a folder of its own")
    return tuple(names)


def _check_same_classes(
    train: Path, train_classes: tuple[str, ...], val: Path, val_classes: tuple[str, ...]
) -> None:
    differences = [
        f"only {part} has {_listed(only)}"
        for part, only in (
            (train, set(train_classes) - set(val_classes)),
            (val, set(val_classes) - set(train_classes)),
        )
        if only
    ]
    if differences:
        difference = " and ".join(differences)
        raise DataError(f"the classes of the two parts differ: {difference}; give both the same")


def _listed(names: Iterable[str], most: int = 5) -> str:
    """Enumerate names in sorted order, and only count those after the first few."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _list_images(part: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """List path and label of every image below the class folders, in sorted order."""
    reader = _import("torchvision.datasets.folder")
    samples: list[tuple[str, int]] = reader.make_dataset(
        part,
        {name: label for label, name in enumerate(classes)},
        extensions=reader.IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not samples:
        raise DataError(f"{part} holds no images: files of {_listed(reader.IMG_EXTENSIONS, 10)}")
    filled = {label for _, label in samples}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"class folders of {part} hold no images: fill or delete {_listed(empty)}")
    return samples


def _photographs(
    train: list[tuple[str, int]],
    val: list[tuple[str, int]],
    classes: tuple[str, ...],
    geometry: _Geometry,
) -> Datasets:
    create_transform = partial(
        _import("timm.data").create_transform,
        input_size=geometry.image_size,
        interpolation=geometry.interpolation,
        crop_pct=geometry.crop_pct,
        color_jitter=None,
    )
    return Datasets(
        _image_files(train, create_transform(is_training=True)),
        _image_files(val, create_transform(is_training=False)),
        classes,
    )


def _image_files(
    samples: list[tuple[str, int]], transform: Callable[[Image.Image], Tensor]
) -> Dataset[tuple[Tensor, int]]:
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    return LabelledImages(paths, labels, partial(_read_image, transform=transform))


def _read_image(path: str, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    return transform(_decode(path))


def _decode(path: str) -> Image.Image:
    """Decode a file into an RGB image, greyscale ones too."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # What Pillow raises for damaged files of the various formats
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not from the decoder
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        raise DataError(
            f"cannot decode {path}: the file is truncated or not an image; replace or delete it"
        ) from error


# Tiny-ImageNet


def _load_tiny_imagenet(root: Path | None, geometry: _Geometry) -> Datasets:
    root = _existing_root("tiny_imagenet", root)
    train, val = _part(root, "train"), _part(root, "val")
    classes = _class_names(train)
    _check_wnids(root / "wnids.txt", train, classes)
    return _photographs(
        _list_images(train, classes), _list_annotated(val, classes), classes, geometry
    )


def _check_wnids(path: Path, train: Path, classes: tuple[str, ...]) -> None:
    if not path.exists():
        return
    absent = set(_read_text(path).split()) - set(classes)
    if absent:
        raise DataError(f"{path} lists classes that {train} lacks: {_listed(absent)}; unpack again")


def _list_annotated(val: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """List path and label of every image of the validation part, in sorted order."""
    images, path = _part(val, "images"), val / "val_annotations.txt"
    wnids = _read_annotations(path)
    files = set(os.listdir(images))
    unknown = set(wnids.values()) - set(classes)
    if unknown:
        raise DataError(f"{path} names classes that train/ lacks: {_listed(unknown)}; unpack again")
    if wnids.keys() - files:
        absent = _listed(wnids.keys() - files)
        raise DataError(f"{path} names images that {images} lacks: {absent}; unpack again")
    if files - wnids.keys():
        extra = _listed(files - wnids.keys())
        raise DataError(f"{images} holds images without a line in {path}: {extra}; delete them")
    labels = {name: label for label, name in enumerate(classes)}
    return [(str(images / file), labels[wnids[file]]) for file in sorted(files)]


def _read_annotations(path: Path) -> dict[str, str]:
    """Read the class of every image: lines of file, wnid and a box, separated by tabs."""
    if not path.exists():
        raise DataError(f"{path} does not exist: the labels of the validation part stand there")
    wnids: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        file, *columns = line.split("\t")
        if not columns:
            raise DataError(
                f"{path}, line {number}: {line!r} is not a file and a class; restore it"
            )
        if file in wnids:
            raise DataError(f"{path}, line {number}: {file} has a line already; delete one of them")
        wnids[file] = columns[0]
    if not wnids:
        raise DataError(f"{path} names no images: restore the file")
    return wnids


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


DATASETS: Mapping[str, Callable[[Path | None, _Geometry], Datasets]] = MappingProxyType(
    {"digits": _load_digits, "folder": _load_folder, "tiny_imagenet": _load_tiny_imagenet}
)
