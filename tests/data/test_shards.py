"""Shards: every sample is read exactly once, by whichever rank and worker."""

import random
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starfire_prune.data import PADDING_LABEL, DataError, build_loader, error_sentence
from starfire_prune.data.images import Classes
from starfire_prune.data.shards import (
    Shard,
    ShardedImages,
    _shuffled,
    rank_range,
    read_shard,
    worker_range,
)
from tests.support.shards import damaged_image, picture, reader, sharded, write_shards, write_tar

LENGTHS = (10, 7, 0, 16)  # 33 samples
TOTAL = sum(LENGTHS)

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
both_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=forks)])

counts = st.integers(1, 12)


def labels_of(loader: Any) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


def of_ranks(dataset: ShardedImages, ranks: int, batch_size: int, train: bool, **loader: Any):
    """The labels of the batches of each rank."""
    epochs = []
    for rank in range(ranks):
        own = build_loader(dataset, batch_size, train=train, **loader)
        own.dataset.deal(rank, ranks, seed=0)  # type: ignore[attr-defined]
        epochs.append([labels.tolist() for _, labels in own])
        assert len(epochs[-1]) == len(own)
    return epochs


def raises(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


# The division


@given(st.integers(0, 60), counts)
def test_every_sample_is_in_a_rank(count, ranks):
    ranges = [rank_range(count, rank, ranks) for rank in range(ranks)]
    assert set(chain.from_iterable(ranges)) == set(range(count))


@given(st.integers(0, 60), counts)
def test_ranks_have_equally_many_samples_and_share_at_most_one_with_the_next(count, ranks):
    ranges = [rank_range(count, rank, ranks) for rank in range(ranks)]
    assert {len(samples) for samples in ranges} == {-(-count // ranks)}
    assert all(one.stop - other.start in (0, 1) for one, other in pairwise(ranges))


@given(st.integers(0, 20), st.integers(0, 60), counts, counts)
def test_workers_divide_the_samples_of_a_rank(start, count, batch_size, workers):
    own = range(start, start + count)
    parts = [worker_range(own, batch_size, worker, workers) for worker in range(workers)]
    assert list(chain.from_iterable(parts)) == list(own)
    sizes = [len(part) for part in parts if part]
    assert all(size % batch_size == 0 for size in sizes[:-1])


# Epochs


@both_workers
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_validation_reads_every_sample_once(tmp_path, batch_size, workers):
    loader = build_loader(sharded(tmp_path, LENGTHS), batch_size, train=False, workers=workers)
    labels = labels_of(loader)
    assert sorted(labels) == list(range(TOTAL))
    if not workers:
        assert labels == sorted(labels)


@both_workers
def test_an_image_belongs_to_its_label(tmp_path, workers):
    for train in (False, True):
        for images, labels in build_loader(
            sharded(tmp_path, LENGTHS), 4, train=train, workers=workers
        ):
            assert images.shape == (len(labels), 3, 8, 8)
            assert labels.dtype == torch.int64
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 33])
def test_ranks_evaluate_every_sample_once_in_equal_batches(tmp_path, ranks, batch_size):
    epochs = of_ranks(sharded(tmp_path, LENGTHS), ranks, batch_size, train=False)
    labels = [label for epoch in epochs for batch in epoch for label in batch]
    assert sorted(label for label in labels if label != PADDING_LABEL) == list(range(TOTAL))
    assert len({tuple(map(len, epoch)) for epoch in epochs}) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 33])
def test_ranks_train_on_every_sample_in_equal_batches(tmp_path, ranks, batch_size):
    epochs = of_ranks(sharded(tmp_path, LENGTHS), ranks, batch_size, train=True)
    seen = Counter(label for epoch in epochs for batch in epoch for label in batch)
    assert len({tuple(map(len, epoch)) for epoch in epochs}) == 1
    share = -(-TOTAL // ranks)
    dropped = ranks if share % batch_size == 1 and share > batch_size > 1 else 0
    assert len(seen) >= TOTAL - dropped
    assert seen.total() == ranks * share - dropped  # at most one a rank comes twice


@forks
@pytest.mark.parametrize("train", [False, True])
def test_workers_change_nothing_about_which_samples_a_rank_reads(tmp_path, train):
    dataset = sharded(tmp_path, LENGTHS)
    alone = of_ranks(dataset, 2, 4, train)
    shared = of_ranks(dataset, 2, 4, train, workers=2)
    for one, other in zip(alone, shared, strict=True):
        assert sorted(chain.from_iterable(one)) == sorted(chain.from_iterable(other))


def test_a_single_last_image_is_not_trained_on(tmp_path):
    dataset = sharded(tmp_path, [9])
    assert [len(batch) for batch in of_ranks(dataset, 1, 4, train=True)[0]] == [4, 4]
    assert [len(batch) for batch in of_ranks(dataset, 1, 4, train=False)[0]] == [4, 4, 1]


@both_workers
def test_an_epoch_follows_from_its_number_and_the_seed(tmp_path, workers):
    dataset = sharded(tmp_path, LENGTHS)
    orders: dict[tuple[int, int], list[int]] = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loader: Any = build_loader(dataset, 4, train=True, workers=workers)
        loader.dataset.deal(0, 1, seed)
        loader.dataset.set_epoch(epoch)
        order = labels_of(loader)
        assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) == 3


def test_training_shuffles_shards_and_the_samples_in_them(tmp_path):
    labels = labels_of(build_loader(sharded(tmp_path, [20] * 10, 4), 10, train=True))
    shards = [label // 20 for label in labels]
    assert len(set(shards[:20])) <= 3
    assert shards != sorted(shards)
    assert [label % 20 for label in labels if label < 20] != list(range(20))


@given(st.lists(st.integers()), counts, st.integers(0, 9))
def test_shuffling_loses_nothing_and_looks_ahead_by_the_window(items, size, seed):
    read: list[int] = []

    def noted() -> Iterator[int]:
        for item in items:
            read.append(item)
            yield item

    given_out = []
    for item in _shuffled(noted(), size, random.Random(seed)):
        given_out.append(item)
        assert len(read) <= len(given_out) + size
    assert sorted(given_out) == sorted(items)


# Tar files


def test_a_stretch_of_a_shard_is_read(tmp_path):
    (shard,) = write_shards(tmp_path, "train", [6])
    samples = list(read_shard(shard, 2, 4))
    assert [sample.files["cls"] for sample in samples] == [b"2", b"3"]
    assert samples[0].name == f"{shard.path}: 00002"


def test_samples_may_be_in_folders_and_stand_beside_other_files(tmp_path):
    files = {
        "README": b"",
        "__meta__.json": b"{}",
        "./a.b/0.JPG": b"0",
        "./a.b/0.seg.png": b"1",
        "./a.b/1.jpg": b"2",
    }
    shard = Shard(str(write_tar(tmp_path / "0.tar", files)), 2)
    assert [sample.files for sample in read_shard(shard, 0, 2)] == [
        {"jpg": b"0", "seg.png": b"1"},
        {"jpg": b"2"},
    ]


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX", ".Trash-1000", "a/.hidden"])
def test_hidden_folders_are_left_out(tmp_path, folder):
    files = {f"{folder}/0.jpg": b"", "./0.jpg": b"0", "..a/1.jpg": b"", "1.jpg": b"1"}
    shard = Shard(str(write_tar(tmp_path / "0.tar", files)), 2)
    assert [sample.files["jpg"] for sample in read_shard(shard, 0, 2)] == [b"0", b"1"]


@pytest.mark.parametrize("length", [5, 7])
def test_a_shard_of_another_length_is_named(tmp_path, length):
    (shard,) = write_shards(tmp_path, "train", [6])
    with raises(
        f"{shard.path} doesn't hold the {length} samples that _info.json lists: correct its "
        f"shard_lengths, or restore the shard"
    ):
        list(read_shard(Shard(shard.path, length), 2, length))


@pytest.mark.parametrize("size", [0, 100, 700, 1500, 3000])
def test_a_truncated_shard_is_named(tmp_path, size):
    (shard,) = write_shards(tmp_path, "train", [6])
    Path(shard.path).write_bytes(Path(shard.path).read_bytes()[:size])
    with pytest.raises(DataError, match=re.escape(shard.path) + ".*restore the shard$"):
        list(read_shard(shard, 0, 6))


def test_a_vanished_shard_is_named(tmp_path):
    path = str(tmp_path / "0.tar")
    with raises(f"cannot read {path}: No such file or directory; restore the shard"):
        list(read_shard(Shard(path, 1), 0, 1))


@both_workers
def test_a_damaged_image_is_named(tmp_path, workers):
    shard = Shard(str(damaged_image(tmp_path / "0.tar")), 1)
    loader = build_loader(ShardedImages([shard], reader(), 8), 1, train=False, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # ends the workers, as garbage they take 5 s
    assert error_sentence(caught.value) == (
        f"cannot decode {shard.path}: a/7.png: the file is truncated or not an image; replace or "
        f"delete it"
    )


# Samples


def read(tmp_path: Path, files: dict[str, bytes], **options: Any) -> tuple[Any, int]:
    shard = Shard(str(write_tar(tmp_path / "0.tar", files)), 1)
    (sample,) = read_shard(shard, 0, 1)
    return reader(**options)(sample)


@pytest.mark.parametrize("label", [b"3", b" 3\n"])
def test_a_label_is_read_from_cls(tmp_path, label):
    assert read(tmp_path, {"0.png": picture(0), "0.cls": label})[1] == 3


def test_a_label_may_be_a_field_of_the_json(tmp_path):
    files = {"0.png": picture(0), "0.cls": b"3", "0.json": b'{"fine": 4}'}
    assert read(tmp_path, files, target_key="fine")[1] == 4


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"0.cls": b"3"}, {}, "has no image of jpg or png (it has cls): set options.input_key"),
        ({"0.png": b""}, {}, "has no file cls (it has png): set options.target_key"),
        (
            {"0.png": b"", "0.json": b'{"coarse": 4}'},
            {"target_key": "fine"},
            "has no field fine in its json (it has png, json): set options.target_key",
        ),
        (
            {"0.png": b"", "0.json": b"[4]"},
            {"target_key": "fine"},
            "has no field fine in its json (it has png, json): set options.target_key",
        ),
        (
            {"0.png": b"", "0.cls": b"cat"},
            {},
            "has label 'cat', not a number: name the classes in options.class_map",
        ),
        (
            {"0.png": b"", "0.cls": b"10"},
            {"classes": 10},
            "has label 10, but the 10 classes are numbered from 0: correct model.num_classes, or "
            "map the labels with options.class_map",
        ),
        (
            {"0.png": b"", "0.cls": b"-1"},
            {"classes": 10},
            "has label -1, but the 10 classes are numbered from 0: correct model.num_classes, or "
            "map the labels with options.class_map",
        ),
    ],
)
def test_a_sample_that_lacks_something_is_named(tmp_path, files, options, message):
    with raises(f"{tmp_path / '0.tar'}: 0 {message}"):
        read(tmp_path, files, **options)


# Classes


def test_a_class_map_may_list_labels_or_names():
    assert Classes.mapped({"3": 0, "4": 1}).index(4, "a") == 1
    assert Classes.mapped({"cat": 0, "dog": 1}).index("dog", "a") == 1
    assert Classes.mapped({"dog": 0}, ("cat", "dog")).index(1, "a") == 0


def test_a_class_map_may_be_a_text_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("n2\nn1\n")
    classes = Classes.mapped(str(path))
    assert classes.names == ("n2", "n1")
    assert classes.index("n1", "a") == 1


def test_classes_with_the_same_index_are_named_together():
    assert Classes.mapped({"hound": 0, "tabby": 1, "poodle": 0}).names == ("hound, poodle", "tabby")


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"a": 0, "b": 2},
            "options.class_map has no class with index 1: number the classes from 0",
        ),
        (
            {"a": "b"},
            "options.class_map must give each class an index, a whole number from 0",
        ),
        (
            {"a": -1},
            "options.class_map must give each class an index, a whole number from 0",
        ),
        (
            "/absent.txt",
            "options.class_map: cannot read /absent.txt: No such file or directory; give a "
            "mapping, or a text file with one class name per line",
        ),
    ],
)
def test_a_class_map_that_cannot_be_read_is_refused(class_map, message):
    with raises(message):
        Classes.mapped(class_map)


def test_a_label_that_the_map_lacks_is_named():
    with raises("image 3 has label 'cow', which options.class_map doesn't list"):
        Classes.mapped({"cat": 0}).index("cow", "image 3")
