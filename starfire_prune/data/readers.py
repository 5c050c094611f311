"""Data sets of timm's readers, by their names: hfds/…, wds/… and torch/…."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os.path import exists
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from starfire_prune.data.decode import decode_image, rgb_image
from starfire_prune.data.errors import DataError
from starfire_prune.data.images import (
    Classes,
    Datasets,
    LabelledImages,
    Source,
    existing_folder,
)
from starfire_prune.data.preprocessing import Transform
from starfire_prune.data.shards import SampleReader, Shard, ShardedImages
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.text import first_line, listed

__all__ = ["READERS", "READER_OPTIONS", "option_problems", "reader_of"]


# The options of each reader, with their types
READER_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "hfds": {"input_key": "text", "target_key": "text", "class_map": "a mapping or a path"},
        "wds": {
            "input_key": "text",
            "target_key": "text",
            "class_map": "a mapping or a path",
            "shuffle_size": "a whole number from 1",
        },
        "torch": {"download": "true or false"},
    }
)
_FITS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "text": lambda value: isinstance(value, str) and value != "",
    "a mapping or a path": lambda value: isinstance(value, (str, dict)) and len(value) > 0,
    "a whole number from 1": lambda value: type(value) is int and value >= 1,
    "true or false": lambda value: isinstance(value, bool),
}
_DOWNLOAD: Final = re.compile(r"You (can|may) (use|set) download=True")  # the hints of torchvision
_IMAGE_FILES: Final = "jpg;jpeg;png;webp"
_SHUFFLE_SIZE: Final = 2048
_TRAIN_SPLITS: Final = ("train", "training")
_VAL_SPLITS: Final = ("val", "valid", "validation", "eval", "evaluation", "test")
T = TypeVar("T")


def reader_of(name: str) -> str | None:
    """The reader with which a data set's name begins, or None.

    Example:
        >>> reader_of("wds/imagenet"), reader_of("torchvision/cifar10"), reader_of("folder")
        ('wds', 'torch', None)
    """
    prefix, slash, rest = name.partition("/")
    reader = "torch" if prefix == "torchvision" else prefix
    return reader if slash and reader in READERS and (rest or reader == "wds") else None


def option_problems(reader: str, options: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The invalid options of a reader, each with its error.

    Example:
        >>> list(option_problems("torch", {"download": 1}))
        [('download', 'must be true or false')]
    """
    known = READER_OPTIONS[reader]
    for key, value in options.items():
        if key not in known:
            yield key, f"is not an option of {reader}/: the options are {', '.join(known)}"
        elif not _FITS[known[key]](value):
            yield key, f"must be {known[key]}"


def _splits(source: Source) -> tuple[str, str]:
    return source.train_split or "train", source.val_split or "validation"


def _opened(source: Source, split: str, open_split: Callable[[], T]) -> T:
    """Open a split with a package that raises errors of any kind."""
    try:
        return open_split()
    except (DataError, ModuleNotFoundError):
        raise
    except Exception as error:
        hint = "Set data.options.download: true"
        fault = _DOWNLOAD.sub(hint, first_line(error)).rstrip(".")
        raise DataError(
            f"data set {source.name!r}: split {split!r} cannot be read: {fault}; "
            f"correct its name, root, splits or options"
        ) from error


def _classes(source: Source, names: Sequence[str] = ()) -> Classes:
    """The classes of a part: mapped by an option, as it names them, or numbered."""
    class_map = source.options.get("class_map")
    if class_map is not None:
        return Classes.mapped(class_map, tuple(names))
    return Classes(tuple(names or map(str, range(source.num_classes or 0))))


# Hugging Face's data sets


def _load_hfds(source: Source) -> Datasets:
    path = os.path.expanduser(source.name.partition("/")[2])
    if path.startswith((".", "/")):
        existing_folder(source.name, Path(path))
    train_split, val_split = _splits(source)
    augment, prepare = source.preprocessing.transforms()
    train, classes = _hfds_part(source, path, train_split, augment)
    val, _ = _hfds_part(source, path, val_split, prepare)  # all splits have the same classes
    return Datasets(train, val, classes)


def _hfds_part(
    source: Source, path: str, split: str, transform: Transform
) -> tuple[Dataset[tuple[Tensor, int]], tuple[str, ...]]:
    # Without timm's reader, which accepts columns that don't exist; that of timm 1.0.15 reads
    # neither labels without names nor a part of a split
    datasets = import_optional("datasets", "data")
    root = None if source.root is None else os.path.expanduser(source.root)
    rows = _opened(source, split, lambda: datasets.load_dataset(path, split=split, cache_dir=root))
    image_key = _column(source, rows, "input_key", "image")
    label_key = _column(source, rows, "target_key", "label")
    if not len(rows):
        raise DataError(f"data set {source.name!r}: split {split!r} holds no images")
    undecoded = datasets.Image(decode=False)
    images = _opened(
        source, split, lambda: rows.select_columns(image_key).cast_column(image_key, undecoded)
    )
    name = f"of {split} in {source.name}"
    classes = _classes(source, getattr(rows.features[label_key], "names", None) or ())
    labels = [
        classes.index(label, f"image {index} {name}")
        for index, label in enumerate(rows.select_columns(label_key)[:][label_key])
    ]
    read = partial(_read_row, images=images, column=image_key, transform=transform, name=name)
    return LabelledImages(range(len(rows)), labels, read), classes.names


def _column(source: Source, rows: Any, option: str, default: str) -> str:
    column = str(source.options.get(option, default))
    if column not in rows.column_names:
        raise DataError(
            f"data set {source.name!r} has no column {column}: set options.{option} to one of "
            f"{listed(rows.column_names)}"
        )
    return column


def _read_row(index: int, images: Any, column: str, transform: Transform, name: str) -> Tensor:
    image = images[index][column] or {"bytes": None, "path": None}
    if not image["bytes"] and not image["path"]:
        raise DataError(f"image {index} {name} is missing: restore it")
    file = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
    return transform(decode_image(file, f"image {index} {name}"))


# Shards of WebDataset


def _load_wds(source: Source) -> Datasets:
    import_optional("webdataset", "data")
    root = _shard_root(source)
    train_split, val_split = _splits(source)
    augment, prepare = source.preprocessing.transforms()
    train, classes = _wds_part(source, root, train_split, augment)
    val, _ = _wds_part(source, root, val_split, prepare)
    return Datasets(train, val, classes)


def _shard_root(source: Source) -> str:
    """The folder or the URL of the shards, which contains `_info.json`."""
    if source.root is not None and "://" in source.root:
        return source.root.rstrip("/")
    path = None if source.root is None else Path(source.root).expanduser()
    root = existing_folder(source.name, path)
    if not (root / "_info.json").is_file() and not (root / "info.json").is_file():
        raise DataError(
            f"{root} holds no _info.json: add one that lists the filenames and shard_lengths of "
            f"each split, in timm's format"
        )
    return str(root)


def _wds_part(
    source: Source, root: str, split: str, transform: Transform
) -> tuple[Dataset[tuple[Tensor, int]], tuple[str, ...]]:
    reader_class = import_optional("timm.data.readers.reader_wds").ReaderWds
    reader = _opened(source, split, lambda: reader_class(root, split=split))
    shards = _opened(source, split, lambda: _shards(root, reader.info, reader.split_info.filenames))
    if not sum(shard.length for shard in shards):
        raise DataError(f"data set {source.name!r}: split {split!r} holds no images")
    absent = [shard.path for shard in shards if "://" not in root and not exists(shard.path)]
    if absent:
        raise DataError(f"{root} lacks shards of split {split!r}: {listed(absent)}; restore them")
    classes = _classes(source)
    options: Mapping[str, Any] = source.options
    read = SampleReader(
        input_keys=tuple(options.get("input_key", _IMAGE_FILES).split(";")),
        target_key=options.get("target_key", reader.split_info.alt_label),
        classes=classes,
        transform=transform,
    )
    shuffle_size = options.get("shuffle_size", _SHUFFLE_SIZE)
    return ShardedImages(shards, read, shuffle_size), classes.names


def _shards(root: str, info: Any, filenames: Iterable[str]) -> list[Shard]:
    """The shards with their lengths, which any split in `_info.json` may list."""
    lengths = {
        name: int(length)
        for part in info["splits"].values()
        for name, length in zip(part["filenames"], part["shard_lengths"], strict=True)
    }
    unknown = [name for name in filenames if name not in lengths]
    if unknown:
        raise DataError(f"_info.json lists no shard_lengths of {listed(unknown)}: add them")
    return [Shard(f"{root}/{name}", lengths[name]) for name in filenames]


# Data sets of torchvision


class TorchImages(Dataset[tuple[Tensor, int]]):
    """The images of a torchvision data set."""

    def __init__(self, images: Any, name: str, classes: Classes, transform: Transform) -> None:
        self.images = images
        self.name = name
        self.classes = classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        where = f"image {index} {self.name}"
        try:
            image, label = self.images[index]
            image = rgb_image(image, where)
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read {where}: {error}; restore it") from error
        return self.transform(image), self.classes.index(label, where)


def _load_torch(source: Source) -> Datasets:
    name = source.name.partition("/")[2].lower()
    if name in ("folder", "image_folder"):
        raise DataError(f"data set {source.name!r}: folders of images are read by name: folder")
    root = existing_folder(source.name, _root_to_fill(source))
    train_split, val_split = _splits(source)
    augment, prepare = source.preprocessing.transforms()
    train = _torch_part(source, name, root, train_split, augment)
    val = _torch_part(source, name, root, val_split, prepare)
    return Datasets(train, val, train.classes.names)


def _root_to_fill(source: Source) -> Path | None:
    """The root, which is created for a download."""
    root = None if source.root is None else Path(source.root).expanduser()
    if root is not None and source.options.get("download"):
        root.mkdir(parents=True, exist_ok=True)
    return root


def _torch_part(
    source: Source, name: str, root: Path, split: str, transform: Transform
) -> TorchImages:
    if split not in _TRAIN_SPLITS + _VAL_SPLITS:  # timm would read any other as validation
        raise DataError(
            f"data set {source.name!r} has no split {split!r}: its splits are train and validation"
        )
    create_dataset = import_optional("timm.data").create_dataset
    download = bool(source.options.get("download", False))
    images = _opened(
        source,
        split,
        lambda: create_dataset(f"torch/{name}", root=str(root), split=split, download=download),
    )
    names = [
        text if isinstance(text, str) else ", ".join(text)
        for text in getattr(images, "classes", ())
    ]
    return TorchImages(images, f"of {split} in {source.name}", _classes(source, names), transform)


READERS: Final[Mapping[str, Callable[[Source], Datasets]]] = MappingProxyType(
    {"hfds": _load_hfds, "wds": _load_wds, "torch": _load_torch}
)
