"""Loaders of data sets, and their division among the processes of a run."""

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
    at the start of every epoch. Restoring that generator and Python's, from which augmentation
    without workers draws, therefore repeats an epoch exactly. For the same reason workers are
    restarted every epoch. The order of images in shards depends only on the epoch.

    Args:
        dataset: Data set of ``(image, label)`` with a length.
        batch_size: Number of images in a batch, at least 1.
        train: Shuffle the images, and drop a last batch of one image unless it is the only batch,
            because batch normalization can't train on one value per channel. Otherwise every image
            appears, in the data set's order.
        workers: Number of processes that read images; with 0 this process reads them. Each worker
            reads shards for its own batches, and the workers take turns.

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
        dataset = dataset.in_batches(batch_size, train)
        return DataLoader(dataset, batch_size, num_workers=workers, pin_memory=pinned)
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
    """Prepare the loader of this process's part of the images, on its device.

    All processes get the same number of batches, and their n-th batches have the same size:

    - In training, Accelerate divides images in memory or in files, and fills up the last round of
      batches with images from the start, less than a batch per process. Of images in shards, each
      process repeats at most one image of another, or drops one that would be a batch by itself.
    - In evaluation, if gathered by ``accelerator.gather_for_metrics``, every image appears exactly
      once; images in shards with the label `PADDING_LABEL` belong to another process.

    An epoch depends on ``set_epoch``, the ``data_seed`` of the accelerator's loaders and the
    generators that are seeded at its start.

    Args:
        accelerator: Accelerator of the run.
        loader: Loader of `build_loader`. Shards are not divided a second time, as
            ``accelerator.prepare`` would do.

    Returns:
        A loader with ``len()``, the number of batches of each process, and ``set_epoch``.

    Raises:
        TypeError: If the loader reads another kind of iterable data set, which can't be divided
            exactly among processes.

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
        if accelerator.num_processes > 1:  # Accelerate fills up the last batches
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
        num_processes=1,  # the data set is divided already
        process_index=0,
        put_on_device=accelerator.device_placement,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )
    return cast("DataLoader[tuple[Tensor, Tensor]]", prepared)
