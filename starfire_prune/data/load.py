"""Loading a data set by its name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from starfire_prune.data.digits import load_digits
from starfire_prune.data.errors import DataError
from starfire_prune.data.folders import load_folder, load_tiny_imagenet
from starfire_prune.data.images import Datasets, Source
from starfire_prune.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from starfire_prune.data.readers import READERS, option_problems, reader_of

__all__ = ["DATASETS", "load_datasets"]


DATASETS: Final[Mapping[str, Callable[[Source], Datasets]]] = MappingProxyType(
    {"digits": load_digits, "folder": load_folder, "tiny_imagenet": load_tiny_imagenet}
)


def load_datasets(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    options: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    image_size: int = 224,
    interpolation: str = "bilinear",
    crop_pct: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    color_jitter: float = 0.0,
    hflip: float = 0.5,
) -> Datasets:
    """Load the training and the validation part of a data set.

    The files of a data set are listed and checked here, and decoded when an image is asked for.
    Which images there are, and in what order, is the same at every call.

    Args:
        name: A name in ``DATASETS``, or one that begins with a reader of timm's.
            ``"digits"``: the 1797 handwritten digits of scikit-learn, 8×8 pixels enlarged to
            ``image_size``, split 80 : 20, without augmentation, a crop or ``mean`` and ``std``.
            ``"folder"``: ``root/train/<class>/…`` and ``root/val/<class>/…`` (or
            ``root/validation``), the classes in the order of their sorted names.
            ``"tiny_imagenet"``: the layout of Stanford's CS231N, with ``val_annotations.txt``.
            ``"hfds/…"``: a data set of Hugging Face's datasets, by its name or the path of its
            folder, which begins with ``/``, ``./`` or ``~``.
            ``"wds/…"``: WebDataset's shards in ``root``, whose ``_info.json`` lists for each split
            the ``filenames`` and ``shard_lengths``; what follows ``wds/`` is up to you.
            ``"torch/…"`` or ``"torchvision/…"``: a data set of torchvision that timm knows.
        root: The folder of the data set; none for digits, which come with scikit-learn. For
            ``hfds/`` the folder of the cache, by default Hugging Face's. For ``wds/`` it may be
            a URL that webdataset opens.
        train_split: The reader's name of the split to train on, by default ``"train"``.
        val_split: The reader's name of the split to validate on, by default ``"validation"``.
        options: Of the reader. For ``hfds/`` and ``wds/``: ``input_key`` and ``target_key``, the
            columns (the files, and a field of the file ``json``) with image and label, and
            ``class_map``, a mapping of labels or names to indices, or a text file with the name of
            a class a line. For ``wds/``: ``shuffle_size``, the samples to draw from at random, by
            default 2048 per worker. For ``torch/``: ``download``.
        num_classes: The number of classes for data sets that don't know theirs.
        image_size: Height and width of the images in pixels, at least 1.
        interpolation: How images are resized, one of ``INTERPOLATIONS``.
        crop_pct: For validation, the side of the crop as a share of the shorter side of the
            resized image, in (0, 1].
        mean: Of the channels, subtracted from pixels in [0, 1]; by default ImageNet's.
        std: Of the channels, above 0: what pixels are then divided by; by default ImageNet's.
        auto_augment: For training, a policy of timm's, such as ``"rand-m9-mstd0.5"``.
        random_erasing: For training, the probability that a rectangle becomes noise, in [0, 1].
        color_jitter: For training, how far brightness, contrast and saturation vary, from 0;
            without effect beside a policy of ``auto_augment`` other than 3a.
        hflip: For training, the probability of a horizontal flip, in [0, 1].

    Returns:
        The data sets of both parts and the names of the classes.

    Raises:
        DataError: If the name or another argument is not valid, or if the files under ``root``
            are not the data set; also by the data sets themselves where an image cannot be read
            or has a label out of range.
        ModuleNotFoundError: If a package is missing that the data set needs.

    Example:
        >>> datasets = load_datasets("digits", image_size=32)
        >>> image, label = datasets.train[0]
        >>> tuple(image.shape), datasets.classes[3]
        ((3, 32, 32), '3')
    """
    preprocessing = Preprocessing(
        image_size=image_size,
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=tuple(mean),
        std=tuple(std),
        auto_augment=auto_augment,
        random_erasing=random_erasing,
        color_jitter=color_jitter,
        hflip=hflip,
    )
    preprocessing.check()
    folder = None if root is None else os.fspath(root)
    source = Source(name, folder, train_split, val_split, options or {}, num_classes, preprocessing)
    return _loader(source)(source)


def _loader(source: Source) -> Callable[[Source], Datasets]:
    reader = reader_of(source.name)
    if reader is not None:
        for option, problem in option_problems(reader, source.options):
            raise DataError(f"options.{option} (={source.options[option]!r}) {problem}")
        return READERS[reader]
    if source.name not in DATASETS:
        raise DataError(_unknown_name(source.name))
    for key in ("train_split", "val_split", "options"):
        if getattr(source, key):
            raise DataError(f"data set {source.name!r} takes no {key}: leave it out")
    return DATASETS[source.name]


def _unknown_name(name: str) -> str:
    if name.partition("/")[0] in ("tfds", "hfids"):
        return (
            f"data set {name!r}: timm's reader can't divide it exactly among processes and "
            f"workers; read it as hfds/, or as shards by wds/"
        )
    near = difflib.get_close_matches(name, DATASETS)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    known = ", ".join([*DATASETS, *(f"{reader}/…" for reader in READERS)])
    return f"unknown data set {name!r}: {hint}known are {known}"
