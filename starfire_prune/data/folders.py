"""Images in folders: one folder per class, or the layout of Tiny-ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from starfire_prune.data.errors import DataError
from starfire_prune.data.images import (
    Datasets,
    LabelledImages,
    Source,
    decode_image,
    existing_folder,
)
from starfire_prune.data.preprocessing import Transform
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.text import listed

__all__ = ["load_folder", "load_tiny_imagenet"]


Samples = Sequence[tuple[str, int]]


def load_folder(source: Source) -> Datasets:
    """Load ``root/train/<class>/…`` and ``root/val/<class>/…`` or ``root/validation/<class>/…``."""
    root = _root(source)
    train, val = _part(root, "train"), _part(root, "val", "validation")
    classes = _class_names(train)
    _check_same_classes(train, classes, val, _class_names(val))
    return _photographs(source, _list_images(train, classes), _list_images(val, classes), classes)


def _root(source: Source) -> Path:
    root = None if source.root is None else Path(source.root).expanduser()
    return existing_folder(source.name, root)


def _part(folder: Path, *names: str) -> Path:
    """The first of these folders that exists."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    wanted = "/ or ".join(names)
    raise DataError(f"{folder} has no folder {wanted}/: give the folder that holds it as root")


def _class_names(part: Path) -> tuple[str, ...]:
    with os.scandir(part) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(f"{part} holds no class folders: put each class into a separate folder")
    return tuple(names)


def _check_same_classes(
    train: Path, train_classes: tuple[str, ...], val: Path, val_classes: tuple[str, ...]
) -> None:
    differences = [
        f"only {part} has {listed(only)}"
        for part, only in (
            (train, set(train_classes) - set(val_classes)),
            (val, set(val_classes) - set(train_classes)),
        )
        if only
    ]
    if differences:
        difference = " and ".join(differences)
        raise DataError(f"the classes of the two parts differ: {difference}; give both the same")


def _list_images(part: Path, classes: tuple[str, ...]) -> Samples:
    """The path and the label of every image below the class folders, in sorted order."""
    reader = import_optional("torchvision.datasets.folder")
    samples: list[tuple[str, int]] = reader.make_dataset(
        part,
        {name: label for label, name in enumerate(classes)},
        extensions=reader.IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not samples:
        raise DataError(f"{part} holds no images: files of {listed(reader.IMG_EXTENSIONS, 10)}")
    filled = {label for _, label in samples}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"class folders of {part} hold no images: fill or delete {listed(empty)}")
    return samples


def _photographs(
    source: Source, train: Samples, val: Samples, classes: tuple[str, ...]
) -> Datasets:
    augment, prepare = source.preprocessing.transforms()
    return Datasets(_image_files(train, augment), _image_files(val, prepare), classes)


def _image_files(samples: Samples, transform: Transform) -> Dataset[tuple[Tensor, int]]:
    paths, labels = [path for path, _ in samples], [label for _, label in samples]
    return LabelledImages(paths, labels, partial(_read_image, transform=transform))


def _read_image(path: str, transform: Transform) -> Tensor:
    return transform(decode_image(path, path))


# Tiny-ImageNet


def load_tiny_imagenet(source: Source) -> Datasets:
    """Load the layout of Stanford's CS231N, with the labels in ``val/val_annotations.txt``."""
    root = _root(source)
    train, val = _part(root, "train"), _part(root, "val")
    classes = _class_names(train)
    _check_wnids(root / "wnids.txt", train, classes)
    return _photographs(
        source, _list_images(train, classes), _list_annotated(val, classes), classes
    )


def _check_wnids(path: Path, train: Path, classes: tuple[str, ...]) -> None:
    if not path.exists():
        return
    absent = set(_read_text(path).split()) - set(classes)
    if absent:
        raise DataError(f"{path} lists classes that {train} lacks: {listed(absent)}; unpack again")


def _list_annotated(val: Path, classes: tuple[str, ...]) -> Samples:
    """The path and the label of every validation image, in sorted order."""
    images, path = _part(val, "images"), val / "val_annotations.txt"
    wnids = _read_annotations(path)
    files = set(os.listdir(images))
    unknown = set(wnids.values()) - set(classes)
    if unknown:
        raise DataError(f"{path} names classes that train/ lacks: {listed(unknown)}; unpack again")
    if wnids.keys() - files:
        absent = listed(wnids.keys() - files)
        raise DataError(f"{path} names images that {images} lacks: {absent}; unpack again")
    if files - wnids.keys():
        extra = listed(files - wnids.keys())
        raise DataError(f"{images} holds images without a line in {path}: {extra}; delete them")
    labels = {name: label for label, name in enumerate(classes)}
    return [(str(images / file), labels[wnids[file]]) for file in sorted(files)]


def _read_annotations(path: Path) -> dict[str, str]:
    """Read the class of every image from lines of file, class and box, separated by tabs."""
    if not path.exists():
        raise DataError(f"{path} does not exist: it holds the labels of the validation images")
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
