"""Loading a data set by its name."""

from __future__ import annotations

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
from starfire_prune.utils.text import did_you_mean

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
    crop_scale: Sequence[float] = (0.08, 1.0),
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    color_jitter: float = 0.0,
    hflip: float = 0.5,
) -> Datasets:
    """Load the training and the validation part of a data set.

    The files of a data set are listed and checked now; each image is decoded on access. The images
    and their order are the same at every call. An orientation in EXIF data has no effect.

    Args:
        name: A name in ``DATASETS``, or one that begins with one of timm's readers.
            ``"digits"``: the 1797 handwritten digits of scikit-learn, 8×8 pixels enlarged to
            ``image_size``, split 80 : 20, without augmentation, a crop or ``mean`` and ``std``.
            ``"folder"``: ``root/train/<class>/…`` and ``root/val/<class>/…`` (or
            ``root/validation``), the classes in the order of their sorted names. Names that begin
            with ``.`` or ``__MACOSX`` are left out.
            ``"tiny_imagenet"``: the layout of Stanford's CS231N, with ``val_annotations.txt``.
            ``"hfds/…"``: a data set of Hugging Face's datasets, by its name, or the path of its
            folder beginning with ``/``, ``./`` or ``~``.
            ``"wds/…"``: WebDataset shards in ``root``, whose ``_info.json`` lists the
            ``filenames`` and ``shard_lengths`` of each split; the text after ``wds/`` is free.
            ``"torch/…"`` or ``"torchvision/…"``: a torchvision data set that timm supports.
        root: Folder of the data set; None for digits, which come with scikit-learn. For ``hfds/``
            it is the cache folder, by default Hugging Face's. For ``wds/`` it may be a URL that
            webdataset opens.
        train_split: Name of the training split of a reader, by default ``"train"``.
        val_split: Name of the validation split of a reader, by default ``"validation"``.
        options: Options of the reader. For ``hfds/`` and ``wds/``: ``input_key`` and
            ``target_key``, the columns (the files, and a field of the file ``json``) with image and
            label, and ``class_map``, a mapping of labels or names to indices, or a text file with
            one class name per line. For ``wds/``: ``shuffle_size``, the number of samples to draw
            from at random, by default 2048 per worker. For ``torch/``: ``download``.
        num_classes: Number of classes, for data sets that don't name their classes.
        image_size: Height and width of the images in pixels, at least 1.
        interpolation: How images are resized, one of ``INTERPOLATIONS``.
        crop_pct: Side of the validation crop as a share of the shorter side of the resized image,
            in (0, 1].
        mean: Mean of each channel, subtracted from pixels in [0, 1]; by default ImageNet's.
        std: Standard deviation of each channel, above 0, by which pixels are then divided; by
            default ImageNet's.
        crop_scale: Least and largest area of the random crop of a training image, as shares of the
            image's area, 0 < least <= largest <= 1. Small images need larger shares than timm's
            0.08.
        auto_augment: One of timm's policies for training, such as ``"rand-m9-mstd0.5"``.
        random_erasing: Probability that a rectangle of a training image becomes noise, in [0, 1].
        color_jitter: Range of brightness, contrast and saturation of training images, from 0; it
            has no effect beside a policy of ``auto_augment`` other than 3a.
        hflip: Probability that a training image is flipped horizontally, in [0, 1].

    Returns:
        The data sets of both parts and the names of the classes.

    Raises:
        DataError: If the name or another argument is not valid, or the files under ``root`` are
            not the data set; also later, if an image can't be read or its label is out of range.
        ModuleNotFoundError: If a package that the data set needs is missing.

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
        crop_scale=tuple(crop_scale),
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
            raise DataError(f"data set {source.name!r} does not accept {key}: leave it out")
    return DATASETS[source.name]


def _unknown_name(name: str) -> str:
    if name.partition("/")[0] in ("tfds", "hfids"):
        return (
            f"data set {name!r}: timm's reader can't divide it exactly among processes and "
            f"workers; read it as hfds/, or as shards by wds/"
        )
    known = ", ".join([*DATASETS, *(f"{reader}/…" for reader in READERS)])
    return f"unknown data set {name!r}: known are {known}{did_you_mean(name, DATASETS)}"
