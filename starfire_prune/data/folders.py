"""Images in folders: one folder per class, or the layout of Tiny-ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from starfire_prune.data.decode import decode_image
from starfire_prune.data.errors import DataError
from starfire_prune.data.images import (
    Datasets,
    LabelledImages,
    Source,
    existing_folder,
    is_hidden,
    normalized,
)
from starfire_prune.data.preprocessing import Transform
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.text import listed

__all__ = ["class_folders", "load_folder", "load_tiny_imagenet"]


Samples = Sequence[tuple[str, int]]


def load_folder(source: Source) -> Datasets:
    """Load ``root/train/<class>/…`` and ``root/val/<class>/…`` or ``root/validation/<class>/…``."""
    root = _root(source)
    train, val = _part(root, "train"), _part(root, "val", "validation")
    classes, val_classes = class_folders(train), class_folders(val)
    _check_same_classes(train, classes, val, val_classes)
    images, val_images = _list_images(train, classes), _list_images(val, val_classes)
    return _photographs(source, images, val_images, tuple(classes))


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


def class_folders(part: Path) -> dict[str, Path]:
    """The folders of the classes by the names of the classes, in the order of the names.

    Names are compared as Unicode text: Linux and macOS store an ``ä`` as different characters.

    Args:
        part: The folder of the training or the validation images.

    Raises:
        DataError: If there is no such folder, or two have the same name.
    """
    folders: dict[str, Path] = {}
    for entry in _entries(part):
        if _is_folder(entry):
            name = normalized(entry.name)
            if name in folders:
                raise DataError(
                    f"{part} has two folders of the class {name}, whose names are stored as "
                    f"{folders[name].name!a} and {entry.name!a}: put their images into one of them"
                )
            folders[name] = Path(entry.path)
    if not folders:
        raise DataError(f"{part} holds no class folders: put each class into a separate folder")
    return dict(sorted(folders.items()))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The files and folders in a folder, without hidden ones, in the order of their names."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
            return sorted(visible, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def _check_same_classes(
    train: Path, train_classes: Iterable[str], val: Path, val_classes: Iterable[str]
) -> None:
    differences = [
        f"only {part} has {listed(map(_distinct, only))}"
        for part, only in (
            (train, set(train_classes) - set(val_classes)),
            (val, set(val_classes) - set(train_classes)),
        )
        if only
    ]
    if differences:
        difference = " and ".join(differences)
        raise DataError(f"the classes of the two parts differ: {difference}; give both the same")


def _distinct(name: str) -> str:
    """A name as no other name is shown, with escapes beside it where others could look the same."""
    if name.isascii() and name.isprintable() and name == name.strip():
        return name
    return f"{name} ({name!a})" if name.isprintable() else ascii(name)


def _list_images(part: Path, folders: Mapping[str, Path]) -> Samples:
    """The path and the label of every image below the class folders, in sorted order.

    Raises:
        DataError: If a class folder holds no images, or a link leads to a folder a second time.
    """
    reader = import_optional("torchvision.datasets.folder")
    extensions: tuple[str, ...] = reader.IMG_EXTENSIONS
    seen = {_identity(part): str(part)}
    samples, empty = [], []
    for label, (name, folder) in enumerate(folders.items()):
        # In the order of torchvision's data sets: by folders, and in these by names
        files = sorted(os.path.split(file) for file in _files(str(folder), seen))
        images = [os.path.join(*file) for file in files if file[1].lower().endswith(extensions)]
        samples += [(image, label) for image in images]
        empty += [] if images else [name]
    if not samples:
        raise DataError(f"{part} holds no images: files of {listed(extensions, 10)}")
    if empty:
        raise DataError(f"class folders of {part} hold no images: fill or delete {listed(empty)}")
    return samples


def _files(folder: str, seen: dict[tuple[int, int], str]) -> Iterator[str]:
    """All files below a folder, also behind links, without hidden ones.

    Args:
        folder: Path of the folder.
        seen: The path of every folder that was listed before, by its identity; it is updated.
    """
    identity = _identity(folder)
    if identity in seen:
        raise DataError(
            f"{folder} leads to the folder {seen[identity]}, which is part of the same images: "
            f"delete the link"
        )
    seen[identity] = folder
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _files(entry.path, seen)
        else:
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # for example a link to itself
        raise DataError(f"cannot read {entry.path}: {error.strerror}") from error


def _identity(folder: str | Path) -> tuple[int, int]:
    """What is the same for all paths to a folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


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
    folders = class_folders(train)
    classes = tuple(folders)
    _check_wnids(root / "wnids.txt", train, classes)
    return _photographs(
        source, _list_images(train, folders), _list_annotated(val, classes), classes
    )


def _check_wnids(path: Path, train: Path, classes: tuple[str, ...]) -> None:
    if not path.exists():
        return
    absent = set(normalized(_read_text(path)).split()) - set(classes)
    if absent:
        raise DataError(f"{path} lists classes that {train} lacks: {listed(absent)}; unpack again")


def _list_annotated(val: Path, classes: tuple[str, ...]) -> Samples:
    """The path and the label of every validation image, in sorted order."""
    images, path = _part(val, "images"), val / "val_annotations.txt"
    wnids = _read_annotations(path)
    files = {entry.name for entry in _entries(images)}
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
        wnids[file] = normalized(columns[0])
    if not wnids:
        raise DataError(f"{path} names no images: restore the file")
    return wnids


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
