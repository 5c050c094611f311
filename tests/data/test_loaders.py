"""Loaders prepared for one process and for two: who gets which images of an epoch."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import IterableDataset

from starfire_prune.data import PADDING_LABEL, LabelledImages, build_loader, prepare_loader
from starfire_prune.training.loop import evaluate
from tests.support.runs import new_process
from tests.support.shards import sharded

COUNTS = (33, 40, 5, 1)  # images, of which only 40 are whole batches of 4 for two ranks
BATCH_SIZE = 4
EPOCHS = (0, 1, 0)  # the first again at last

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
both_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=forks)])


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    new_process()
    yield accelerator()
    new_process()


def accelerator(seed: int = 0) -> Accelerator:
    return Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    )


def numbered(count: int) -> LabelledImages[int]:
    """Images in memory whose pixels are their label."""
    return LabelledImages(
        range(count), range(count), lambda label: torch.full((3, 2, 2), float(label))
    )


def dataset(kind: str, folder: Path, count: int) -> Any:
    """Images of a data set in memory, or in shards of up to 7."""
    if kind == "memory":
        return numbered(count)
    folder = folder / f"{count}"
    return sharded(folder, [min(7, count - start) for start in range(0, count, 7)])


def epoch_of(loader: Any, epoch: int) -> list[list[int]]:
    """The labels of an epoch's batches."""
    torch.manual_seed(epoch)
    loader.set_epoch(epoch)
    batches = [labels.tolist() for _, labels in loader]
    assert len(batches) == len(loader)
    return batches


class Guess(nn.Module):
    """Guesses the class of an image of one grey value right, but for those divisible by 3."""

    def forward(self, images: Tensor) -> Tensor:
        labels = (images[:, 0, 0, 0] * (255 if images.max() <= 1 else 1)).round().long()
        wrong = labels % 3 == 0
        return 9 * nn.functional.one_hot((labels + wrong) % 64, 64).float()


# One process


@both_workers
@pytest.mark.parametrize("kind", ["memory", "shards"])
def test_one_process_gets_every_image_once(one_process, tmp_path, kind, workers):
    for count in (32, 33, 35):
        images = dataset(kind, tmp_path, count)
        for train in (False, True):
            loader = build_loader(images, BATCH_SIZE, train=train, workers=workers)
            prepared = prepare_loader(one_process, loader)
            seen = sorted(chain.from_iterable(epoch_of(prepared, 0)))
            dropped = train and count % BATCH_SIZE == 1
            assert len(seen) == len(set(seen)) == count - dropped


@pytest.mark.parametrize("kind", ["memory", "shards"])
def test_an_epoch_is_set_by_its_number_and_the_seed(one_process, tmp_path, kind):
    images = dataset(kind, tmp_path, 33)
    loader = prepare_loader(one_process, build_loader(images, BATCH_SIZE, train=True))
    first, second, again = (epoch_of(loader, epoch) for epoch in EPOCHS)
    assert first == again != second
    fresh = prepare_loader(one_process, build_loader(images, BATCH_SIZE, train=True))
    assert epoch_of(fresh, 1) == second  # as after resuming
    new_process()
    other = prepare_loader(accelerator(seed=1), build_loader(images, BATCH_SIZE, train=True))
    assert epoch_of(other, 0) != first


def test_one_process_evaluates_shards_as_what_is_in_memory(one_process, tmp_path):
    results = []
    for kind in ("memory", "shards"):
        images = dataset(kind, tmp_path, 33)
        loader = prepare_loader(one_process, build_loader(images, BATCH_SIZE, train=False))
        results.append(evaluate(Guess(), loader, one_process, nn.CrossEntropyLoss()))
    assert results[0] == pytest.approx(results[1])
    assert results[0]["top1"] == pytest.approx(22 / 33)


def test_a_prepared_loader_tells_the_end_of_an_epoch(one_process, tmp_path):
    loader: Any = prepare_loader(
        one_process, build_loader(dataset("shards", tmp_path, 33), BATCH_SIZE, train=True)
    )
    ends = [one_process.gradient_state.end_of_dataloader for _ in loader]
    assert ends == [False] * 7 + [True]


def test_an_iterable_data_set_of_another_kind_is_refused(one_process):
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(TypeError, match="a loader of Stream can't be divided exactly"):
        prepare_loader(one_process, torch.utils.data.DataLoader(Stream()))


# Two processes


def two_ranks(work: Any, folder: Path, *arguments: Any) -> list[Any]:
    """What `work` returns on each of two ranks, as JSON gives it back."""
    spawn(  # type: ignore[no-untyped-call]
        _rank, (work, folder, *arguments), nprocs=2
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def _rank(rank: int, work: Any, folder: Path, *arguments: Any) -> None:
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
    )
    torch.multiprocessing.set_start_method("fork", force=True)  # of the loaders' workers
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    result = work(folder / f"of-rank{rank}", *arguments)  # neither writes what the other reads
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def training_epochs(folder: Path, kind: str, workers: int) -> list[Any]:
    """Of each count, the batches of some epochs."""
    return [
        [epoch_of(loader, epoch) for epoch in EPOCHS]
        for count in COUNTS
        for loader in [
            prepare_loader(
                accelerator(),
                build_loader(dataset(kind, folder, count), BATCH_SIZE, train=True, workers=workers),
            )
        ]
    ]


def evaluations(folder: Path, kind: str, workers: int) -> list[Any]:
    """Of each count, the gathered labels and what `evaluate` finds."""
    results = []
    for count in COUNTS:
        own = accelerator()
        images = dataset(kind, folder, count)
        loader = prepare_loader(own, build_loader(images, BATCH_SIZE, train=False, workers=workers))
        labels = [own.gather_for_metrics(batch[1]).tolist() for batch in loader]
        model = nn.parallel.DistributedDataParallel(WithParameter())
        results.append([labels, evaluate(model, loader, own, nn.CrossEntropyLoss())])
    return results


class WithParameter(Guess):
    """DDP wraps models with parameters alone, and broadcasts buffers at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "shards"])
def test_two_processes_train_on_every_image(tmp_path, kind, workers):
    ranks = two_ranks(training_epochs, tmp_path, kind, workers)
    for count, one, other in zip(COUNTS, *ranks, strict=True):
        assert one[0] == one[2]
        assert one[0] != one[1] or count == 1
        for first, second in zip(one, other, strict=True):
            assert [len(batch) for batch in first] == [len(batch) for batch in second]
            assert min(map(len, first)) > 1 or count == 1
            seen = Counter(chain(*first, *second))
            assert set(seen) <= set(range(count))
            if kind == "memory":
                assert len(seen) == count
                assert seen.total() - count < 2 * BATCH_SIZE
            else:  # of 33 images, 17 on each rank
                assert seen.total() == {33: 32, 40: 40, 5: 6, 1: 2}[count]
                assert len(seen) >= {33: 31, 40: 40, 5: 5, 1: 1}[count]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "shards"])
def test_two_processes_evaluate_every_image_once(tmp_path, kind, workers):
    ranks = two_ranks(evaluations, tmp_path, kind, workers)
    assert ranks[0] == ranks[1]
    for count, (batches, result) in zip(COUNTS, ranks[0], strict=True):
        labels = [label for label in chain(*batches) if label != PADDING_LABEL]
        assert sorted(labels) == list(range(count))
        assert result["top1"] == pytest.approx(sum(label % 3 != 0 for label in labels) / count)
