"""Loaders of a data set's parts, and their division among the processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from starfire_prune.data.shards import ShardedImages, has_single_end
from starfire_prune.utils.optional import import_optional

if TYPE_CHECKING:
    from collections.abc import Sized

    from accelerate import Accelerator

__all__ = ["build_loader", "prepare_loader"]


def build_loader(
    dataset: Dataset[tuple[Tensor, int]], batch_size: int, *, train: bool, workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Build the loader of one part of a data set.

    The order of the images and the seeds of the workers are drawn from torch's default generator
    at the start of every epoch, so an epoch is repeated exactly by restoring that generator and,
    as augmentation without workers draws from it, Python's. For the same reason workers are
    started afresh every epoch. The order of images in shards follows from the epoch alone.

    Args:
        dataset: Gives ``(image, label)`` and has a length.
        batch_size: Images in a batch, at least 1.
        train: Shuffle the images. A last batch of a single image is dropped then, since batch
            normalisation cannot train on one value a channel; every other last batch is kept, and
            so is the only one. Without ``train`` every image comes, in the data set's order.
        workers: Processes that read images; 0 reads them in this one. Each worker reads shards
            for batches of its own, which come in turns.

    Returns:
        A loader of float32 images ``(N, 3, image_size, image_size)`` and int64 labels ``(N,)``, in
        pinned memory where CUDA is available.

    Raises:
        ValueError: If ``batch_size`` or ``workers`` is out of its range.

    Example:
        >>> from starfire_prune.data import LabelledImages
        >>> images = LabelledImages([torch.zeros(3, 8, 8)] * 5, [0, 1, 2, 3, 4], torch.clone)
        >>> [len(labels) for _, labels in build_loader(images, 2, train=True)]
        [2, 2]
        >>> [len(labels) for _, labels in build_loader(images, 2, train=False)]
        [2, 2, 1]
    """
    pinned = torch.cuda.is_available()
    if isinstance(dataset, ShardedImages):
        own = dataset.in_batches(batch_size, train)
        return DataLoader(own, batch_size, num_workers=workers, pin_memory=pinned)
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train and has_single_end(len(cast("Sized", dataset)), batch_size),
        num_workers=workers,
        pin_memory=pinned,
    )


def prepare_loader(
    accelerator: Accelerator, loader: DataLoader[tuple[Tensor, int]]
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Give a loader of this process's part of the images, on its device.

    All processes get equally many batches, and batch by batch equally many images:

    - In training, images in memory or in files are dealt out by Accelerate, which fills up the
      last round of batches with images from the start: less than a batch a process. Of images in
      shards, each process repeats at most one of another's, or drops one that would be left alone.
    - In evaluation, gathered by ``accelerator.gather_for_metrics``, every image comes exactly
      once, but for images in shards with the label `PADDING_LABEL`, which are another process's.

    An epoch follows from ``set_epoch``, the ``data_seed`` of the accelerator's loaders and the
    generators that are seeded at its start.

    Args:
        accelerator: Of the run.
        loader: From `build_loader`. Images in shards are not sharded a second time, as
            ``accelerator.prepare`` would do it.

    Returns:
        A loader with ``len()`` (the batches of a process, the same in all) and ``set_epoch``.

    Raises:
        TypeError: If the loader reads an iterable data set of another kind, whose division among
            processes is not known.

    Example:
        >>> from accelerate import Accelerator
        >>> from starfire_prune.data import LabelledImages
        >>> images = LabelledImages([torch.zeros(3, 8, 8)] * 5, [0, 1, 2, 3, 4], torch.clone)
        >>> loader = prepare_loader(Accelerator(), build_loader(images, 2, train=True))
        >>> loader.set_epoch(0)
        >>> len(loader)
        2
    """
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        if accelerator.num_processes > 1:  # the last round of batches is filled up: none is single
            loader.batch_sampler.drop_last = False  # type: ignore[union-attr]
        return cast("DataLoader[tuple[Tensor, Tensor]]", accelerator.prepare(loader))
    if not isinstance(dataset, ShardedImages):
        raise TypeError(
            f"a loader of {type(dataset).__name__} can't be divided exactly among processes: "
            f"load the data set with load_datasets"
        )
    seed = accelerator.dataloader_config.data_seed or 0
    dataset.deal(accelerator.process_index, accelerator.num_processes, seed)
    prepared: Any = import_optional("accelerate.data_loader").prepare_data_loader(
        loader,
        accelerator.device if accelerator.device_placement else None,
        num_processes=1,  # of those that share what this loader gives
        process_index=0,
        put_on_device=accelerator.device_placement,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )
    return cast("DataLoader[tuple[Tensor, Tensor]]", prepared)
