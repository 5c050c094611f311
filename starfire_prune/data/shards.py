"""WebDataset shards, divided among ranks and workers so that each sample is read exactly once.

timm assigns entire shards and a fixed number of samples to each worker, so that some samples are
repeated and others are left out. Here the shards form one sequence of samples, by the lengths that
`_info.json` lists, and every worker of every rank reads its own part of the sequence.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from starfire_prune.data.decode import decode_image
from starfire_prune.data.errors import DataError
from starfire_prune.data.images import Classes, is_hidden
from starfire_prune.data.preprocessing import Transform
from starfire_prune.utils.optional import import_optional

__all__ = [
    "PADDING_LABEL",
    "SampleReader",
    "Shard",
    "ShardedImages",
    "rank_range",
    "read_shard",
    "worker_range",
]


PADDING_LABEL: Final = -100
"""Label of an image that another rank evaluates; CrossEntropyLoss ignores it as well."""
_NAME: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # the sample's key, and the kind of file
T = TypeVar("T")


class Shard(NamedTuple):
    """A tar file, given by its path or URL, and its number of samples."""

    path: str
    length: int


class Sample(NamedTuple):
    """The files of a sample by their extensions in lower case, such as jpg, cls or json."""

    name: str
    files: Mapping[str, bytes]


def rank_range(count: int, rank: int, ranks: int) -> range:
    """The samples of a rank out of ``count``; every rank has ``ceil(count / ranks)`` samples.

    Together the ranges contain every sample. If ``ranks`` doesn't divide ``count``, some ranges
    overlap by one: the last sample of one rank is the first of the next.

    Example:
        >>> [list(rank_range(5, rank, 2)) for rank in range(2)]
        [[0, 1, 2], [2, 3, 4]]
    """
    start = rank * count // ranks
    return range(start, start + -(-count // ranks))


def worker_range(samples: range, batch_size: int, worker: int, workers: int) -> range:
    """A worker's part of a rank's samples: full batches, except the very last one.

    Example:
        >>> [list(worker_range(range(10, 17), 2, worker, 3)) for worker in range(3)]
        [[10, 11], [12, 13], [14, 15, 16]]
    """
    batches = -(-len(samples) // batch_size)
    first, end = worker * batches // workers, (worker + 1) * batches // workers
    return samples[first * batch_size : end * batch_size]


class ShardedImages(IterableDataset[tuple[Tensor, int]]):
    """The images of shards, one epoch at a time.

    An epoch depends only on the seed, the epoch and the division among ranks and workers. In
    training, the shards are shuffled every epoch, and the samples within a window of
    ``shuffle_size`` as they are read; every rank has the same number of images, the last of which
    may also be another rank's. In evaluation, the images are in the order of the shards, and an
    image that another rank evaluates has the label `PADDING_LABEL`.

    There is a single rank until `prepare_loader` divides the images.

    Args:
        shards: The tar files and their lengths.
        read: Turns a sample into an image and its label.
        shuffle_size: Number of undecoded samples per worker to draw from.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        read: Callable[[Sample], tuple[Tensor, int]],
        shuffle_size: int,
    ) -> None:
        self.shards = tuple(shards)
        self.read = read
        self.shuffle_size = shuffle_size
        self.batch_size, self.train = 1, False
        self.rank, self.ranks, self.seed, self.epoch = 0, 1, 0, 0

    def in_batches(self, batch_size: int, train: bool) -> ShardedImages:
        """A copy for a loader of this batch size."""
        dataset = copy.copy(self)
        dataset.batch_size, dataset.train = batch_size, train
        return dataset

    def deal(self, rank: int, ranks: int, seed: int) -> None:
        """Restrict the images to those of one rank; ``seed`` is the same on all ranks."""
        self.rank, self.ranks, self.seed = rank, ranks, seed

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration shuffles by."""
        self.epoch = epoch

    @property
    def total_dataset_length(self) -> int:
        """Read by Accelerate to remove padding from the last batch; 0, as there is none."""
        return 0

    def __len__(self) -> int:
        """The number of images of this rank."""
        return len(self._samples())

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part = worker_range(self._samples(), self.batch_size, number, workers)
        samples = self._read(part)
        if self.train:
            generator = random.Random(f"{self.seed} {self.epoch} {self.rank} {number}")
            samples = _shuffled(samples, self.shuffle_size, generator)
            yield from map(self.read, samples)
            return
        others = (self.rank + 1) * self._count() // self.ranks  # first sample of the next rank
        for position, sample in zip(part, samples, strict=True):
            image, label = self.read(sample)
            yield image, label if position < others else PADDING_LABEL

    def _count(self) -> int:
        return sum(shard.length for shard in self.shards)

    def _samples(self) -> range:
        samples = rank_range(self._count(), self.rank, self.ranks)
        if self.train and has_single_end(len(samples), self.batch_size):
            return samples[:-1]
        return samples

    def _read(self, samples: range) -> Iterator[Sample]:
        """Read a part of the sequence of samples; in training the shards are shuffled."""
        shards = self.shards
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(shards))
            shards = tuple(shards[index] for index in order)
        start = 0
        for shard in shards:
            first, end = max(samples.start - start, 0), min(samples.stop - start, shard.length)
            if first < end:
                yield from read_shard(shard, first, end)
            start += shard.length


def has_single_end(count: int, batch_size: int) -> bool:
    """Whether the last of several batches is a single image, on which batch norm can't train."""
    return count > batch_size > 1 and count % batch_size == 1


def _shuffled(items: Iterator[T], size: int, generator: random.Random) -> Iterator[T]:
    """Draw at random from a moving window of ``size`` items."""
    window = list(islice(items, size))
    for item in items:
        index = generator.randrange(len(window))
        yield window[index]
        window[index] = item
    generator.shuffle(window)
    yield from window


# Tar files


def read_shard(shard: Shard, start: int, end: int) -> Iterator[Sample]:
    """Read the samples ``start`` to ``end - 1`` of a shard.

    Raises:
        DataError: If the shard can't be read, or doesn't hold as many samples as listed; too many
            are noticed only if ``end`` is the listed length.
    """
    try:
        with closing(_files(shard.path)) as files:
            samples = groupby(files, key=lambda file: file[0])
            for _ in islice(samples, start):
                pass
            read = 0
            for key, parts in islice(samples, end - start):
                yield Sample(f"{shard.path}: {key}", {kind: load() for _, kind, load in parts})
                read += 1
            wrong = read < end - start or (end == shard.length and next(samples, None) is not None)
    except (OSError, EOFError, tarfile.TarError) as error:
        detail = getattr(error, "strerror", None) or str(error).partition(":\n")[0]
        raise DataError(f"cannot read {shard.path}: {detail}; restore the shard") from error
    if wrong:
        raise DataError(
            f"{shard.path} doesn't hold the {shard.length} samples that _info.json lists: correct "
            f"its shard_lengths, or restore the shard"
        )


def _files(path: str) -> Generator[tuple[str, str, Callable[[], bytes]], None, None]:
    """The files of a shard: the key of their sample, their kind, and a function that reads them."""
    with _open(path) as tar:
        for member in tar:
            name = _NAME.fullmatch(member.name)
            if member.isfile() and name and not _is_left_out(name[1]):
                content: Any = tar.extractfile(member)
                yield name[1], name[2].lower(), content.read


def _is_left_out(key: str) -> bool:
    """Whether a sample is hidden, as in image folders, or holds what WebDataset says of a shard."""
    *folders, name = key.split("/")
    return name.startswith("__") or any(is_hidden(folder) for folder in folders if folder != ".")


@contextmanager
def _open(path: str) -> Iterator[tarfile.TarFile]:
    if "://" not in path:
        with tarfile.open(path) as tar:
            yield tar
        return
    stream = import_optional("webdataset", "data").gopen(path)
    with closing(stream), tarfile.open(fileobj=stream, mode="r|*") as tar:
        yield tar


@dataclass(frozen=True)
class SampleReader:
    """Turns a sample into an image and its label.

    Attributes:
        input_keys: Possible extensions of the image file; the first that exists is read.
        target_key: Field of the sample's json that holds the label; if empty, it is in ``cls``.
        classes: Classes of the labels.
        transform: Transform of the images.
    """

    input_keys: tuple[str, ...]
    target_key: str
    classes: Classes
    transform: Transform

    def __call__(self, sample: Sample) -> tuple[Tensor, int]:
        label = self.classes.index(self._label(sample), sample.name)
        key = next((key for key in self.input_keys if key in sample.files), None)
        if key is None:
            raise self._lacks(sample, f"image of {' or '.join(self.input_keys)}", "input_key")
        image = decode_image(io.BytesIO(sample.files[key]), f"{sample.name}.{key}")
        return self.transform(image), label

    def _label(self, sample: Sample) -> object:
        try:
            if not self.target_key:
                return sample.files["cls"].decode().strip()
            return json.loads(sample.files["json"])[self.target_key]
        except (LookupError, TypeError, ValueError) as error:
            wanted = f"field {self.target_key} in its json" if self.target_key else "file cls"
            raise self._lacks(sample, wanted, "target_key") from error

    def _lacks(self, sample: Sample, wanted: str, option: str) -> DataError:
        files = ", ".join(sample.files)
        return DataError(f"{sample.name} has no {wanted} (it has {files}): set options.{option}")
