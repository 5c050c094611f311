"""WebDataset shards, dealt out to ranks and workers so that each sample is read exactly once.

timm's own iteration gives each worker whole shards and a fixed number of samples, and with it
repeats some and leaves out others. Here the lengths that `_info.json` lists make the shards one
long row of samples, of which every worker of every rank reads a stretch of its own.
"""

from __future__ import annotations

import copy
import io
import json
import os
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

from starfire_prune.data.errors import DataError
from starfire_prune.data.images import Classes, decode_image
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
"""The label of an image that another rank evaluates; CrossEntropyLoss ignores it too."""
_NAME: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # a sample's key, and what the file holds
T = TypeVar("T")


class Shard(NamedTuple):
    """A tar file, by its path or URL, and the number of samples in it."""

    path: str
    length: int


class Sample(NamedTuple):
    """The files of a sample by what follows their key's dot, in lower case: jpg, cls, json."""

    name: str
    files: Mapping[str, bytes]


def rank_range(count: int, rank: int, ranks: int) -> range:
    """Give the samples of a rank out of ``count``: as many on every rank, ``ceil(count / ranks)``.

    Together the ranges hold every sample. Where ``ranks`` doesn't divide ``count``, some overlap
    by one: the last sample of one rank is the first of the next.

    Example:
        >>> [list(rank_range(5, rank, 2)) for rank in range(2)]
        [[0, 1, 2], [2, 3, 4]]
    """
    start = rank * count // ranks
    return range(start, start + -(-count // ranks))


def worker_range(samples: range, batch_size: int, worker: int, workers: int) -> range:
    """Give a worker's part of a rank's samples: whole batches, a smaller one only at the end.

    Example:
        >>> [list(worker_range(range(10, 17), 2, worker, 3)) for worker in range(3)]
        [[10, 11], [12, 13], [14, 15, 16]]
    """
    batches = -(-len(samples) // batch_size)
    first, end = worker * batches // workers, (worker + 1) * batches // workers
    return samples[first * batch_size : end * batch_size]


class ShardedImages(IterableDataset[tuple[Tensor, int]]):
    """The images of shards, an epoch at a time.

    An epoch follows from the seed, the epoch and the division among ranks and workers alone. In
    training the shards are shuffled anew every epoch, and the samples within a window of
    ``shuffle_size`` as they are read; every rank gives the same number of images, of which the
    last may be another rank's too. Without training the images come in the order of the shards,
    and one that another rank gives has the label `PADDING_LABEL`.

    It is one rank of one until `prepare_loader` deals it out.

    Args:
        shards: The tar files and their lengths.
        read: Makes an image and its label of a sample.
        shuffle_size: Samples that wait, undecoded, to be drawn from; per worker.
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
        """Give a copy for a loader of this batch size."""
        dataset = copy.copy(self)
        dataset.batch_size, dataset.train = batch_size, train
        return dataset

    def deal(self, rank: int, ranks: int, seed: int) -> None:
        """Give only the images of one rank; ``seed`` is the same on all."""
        self.rank, self.ranks, self.seed = rank, ranks, seed

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch from the next iteration on."""
        self.epoch = epoch

    @property
    def total_dataset_length(self) -> int:
        """What Accelerate takes to find padding in the last batch by: there is none to cut off."""
        return 0

    def __len__(self) -> int:
        """The number of images of this rank."""
        return len(self._samples())

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = worker_range(self._samples(), self.batch_size, number, workers)
        samples = self._read(own)
        if self.train:
            generator = random.Random(f"{self.seed} {self.epoch} {self.rank} {number}")
            samples = _shuffled(samples, self.shuffle_size, generator)
            yield from map(self.read, samples)
            return
        others = (self.rank + 1) * self._count() // self.ranks  # first sample of the next rank
        for position, sample in zip(own, samples, strict=True):
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
        """Read a stretch of the row that the shards make, shuffled in training."""
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
    """Tell whether the last of several batches is one image, which batch norm can't train on."""
    return count > batch_size > 1 and count % batch_size == 1


def _shuffled(items: Iterator[T], size: int, generator: random.Random) -> Iterator[T]:
    """Draw at random from a window of ``size`` items that moves along."""
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
        DataError: If the shard cannot be read, or holds fewer samples than its length says, or
            more where ``end`` is its length.
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
    """The files of a shard: the key of their sample, what they hold, and how to read it."""
    with _open(path) as tar:
        for member in tar:
            name = _NAME.fullmatch(member.name)
            if member.isfile() and name and not os.path.basename(name[1]).startswith("__"):
                content: Any = tar.extractfile(member)
                yield name[1], name[2].lower(), content.read


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
    """Makes an image and its label of a sample.

    Attributes:
        input_keys: What image files are called, the first that there is counts.
        target_key: A field of the sample's json that holds the label; without, it is in ``cls``.
        classes: Of the labels.
        transform: Of the images.
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
