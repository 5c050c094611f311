"""The building blocks of data sets: images that are decoded on access, and their classes."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from starfire_prune.data.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from starfire_prune.data.preprocessing import Preprocessing

__all__ = [
    "Classes",
    "Datasets",
    "LabelledImages",
    "Source",
    "existing_folder",
    "is_hidden",
    "normalized",
]


Item = TypeVar("Item")


@dataclass(frozen=True)
class Datasets:
    """The training and the validation part of a data set.

    Attributes:
        train: The training images, with augmentation if the data set has any.
        val: The validation images, the same in every epoch.
        classes: The names of the classes; ``classes[label]`` is the name of ``label``. If the data
            set doesn't name them, they are the numbers below the given ``num_classes``, if any.
    """

    train: Dataset[tuple[Tensor, int]]
    val: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The arguments of `load_datasets`: a data set, and how its images are prepared."""

    name: str
    root: str | None
    train_split: str | None
    val_split: str | None
    options: Mapping[str, object]
    num_classes: int | None
    preprocessing: Preprocessing


class LabelledImages(Dataset[tuple[Tensor, int]], Generic[Item]):
    """Images that are read on access, with one label each.

    Args:
        items: Inputs of ``read``, one per image: paths, or tensors in memory.
        labels: The class index of each item.
        read: Turns an item into a float32 image of shape ``(3, height, width)``. It must be
            picklable unless workers are forked.

    Example:
        >>> import torch
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
class Classes:
    """Turns the labels of a data set into class indices.

    Attributes:
        names: Names of the classes, by their index; empty if they are unknown.
        indices: Index of each class that ``options.class_map`` lists; None without a map.
        source_names: The data set's names of its labels, if it has any; a map may list these
            instead of the labels.

    Example:
        >>> Classes(("cat", "dog")).index(1, "a.jpg")
        1
        >>> Classes.mapped({"hound": 0, "poodle": 0}, ("cat", "hound", "poodle")).index(2, "a.jpg")
        0
    """

    names: tuple[str, ...]
    indices: Mapping[str, int] | None = None
    source_names: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def mapped(cls, class_map: object, source_names: tuple[str, ...] = ()) -> Classes:
        """Read ``options.class_map``: a mapping, or a text file with one class per line."""
        indices = _read_class_map(class_map)
        names: list[list[str]] = [[] for _ in range(max(indices.values()) + 1)]
        for name, index in indices.items():
            names[index].append(name)
        if [] in names:
            missing = names.index([])
            raise DataError(
                f"options.class_map has no class with index {missing}: number the classes from 0"
            )
        return cls(tuple(", ".join(same) for same in names), indices, source_names)

    def index(self, label: object, where: str) -> int:
        """The index of a class.

        Args:
            label: Label in the data set: a whole number, or a name that the class map lists.
            where: Name of the image in errors.

        Raises:
            DataError: If there is no such class.
        """
        if self.indices is not None:
            return self._mapped_index(self.indices, label, where)
        try:
            number = int(label)  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where} has label {label!r}, not a number: name the classes in options.class_map"
            ) from error
        if number < 0 or 0 < len(self.names) <= number:
            raise DataError(
                f"{where} has label {number}, but the {len(self.names)} classes are numbered from "
                f"0: correct model.num_classes, or map the labels with options.class_map"
            )
        return int(number)

    def _mapped_index(self, indices: Mapping[str, int], label: object, where: str) -> int:
        index = indices.get(normalized(str(label)))
        if index is None and isinstance(label, int) and 0 <= label < len(self.source_names):
            index = indices.get(normalized(self.source_names[label]))
        if index is None:
            raise DataError(f"{where} has label {label!r}, which options.class_map doesn't list")
        return index


def _read_class_map(class_map: object) -> dict[str, int]:
    if isinstance(class_map, Mapping):
        indices = {normalized(str(name)): index for name, index in class_map.items()}
    else:
        try:
            with open(os.path.expanduser(str(class_map)), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            detail = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise DataError(
                f"options.class_map: cannot read {class_map}: {detail}; "
                f"give a mapping, or a text file with one class name per line"
            ) from error
        indices = {normalized(line.strip()): index for index, line in enumerate(lines)}
    if not indices or any(type(index) is not int or index < 0 for index in indices.values()):
        raise DataError("options.class_map must give each class an index, a whole number from 0")
    return indices


def existing_folder(name: str, root: Path | None) -> Path:
    """Return ``root`` if it is a folder; raise DataError otherwise."""
    if root is None:
        raise DataError(f"data set {name!r} is read from a folder: give it as root")
    if not root.exists():
        raise DataError(f"root {root} does not exist: give the folder of data set {name!r}")
    if not root.is_dir():
        raise DataError(f"root {root} is a file: give the folder of data set {name!r}")
    return root


def is_hidden(name: str) -> bool:
    """Whether a system or an editor put a file or folder of this name there, not people.

    Example:
        >>> is_hidden(".DS_Store"), is_hidden("__MACOSX"), is_hidden("ant")
        (True, True, False)
    """
    return name.startswith((".", "__MACOSX"))


def normalized(name: str) -> str:
    r"""The name of a class in the form in which names are compared (Unicode's NFC).

    Example:
        >>> normalized("A\u0308pfel") == "\u00c4pfel"
        True
    """
    return unicodedata.normalize("NFC", name)
