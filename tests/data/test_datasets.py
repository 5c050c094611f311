"""Data sets by name: digits, their arguments, loaders and real images."""

import operator
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from starfire_prune.data import (
    DATASETS,
    Datasets,
    LabelledImages,
    build_loader,
    error_sentence,
    load_datasets,
)
from tests.support.image_folders import (
    both_workers,
    error_of,
    forks,
    labels,
    load_folder,
    make_folder,
    raises,
    same,
    samples,
)

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


# Digits


@pytest.fixture(scope="module")
def digits() -> Datasets:
    return load_datasets("digits", image_size=8)


def test_digits_are_split_80_to_20(digits):
    assert len(digits.train) == 1437
    assert len(digits.val) == 360
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_digits_are_split_in_each_class_alike(digits):
    total = Counter(load_digits().target.tolist())
    val = Counter(labels(digits.val))
    assert all(abs(val[digit] - 0.2 * total[digit]) <= 1 for digit in range(10))


def test_the_parts_of_digits_are_all_digits_once(digits):
    images = torch.stack([image[0] for image, _ in samples(digits.train) + samples(digits.val)])
    shares = (images - images.min()) / (images.max() - images.min())  # the normalisation undone
    source = load_digits()
    parts = zip(
        (shares * 16).round().to(torch.uint8).numpy(),
        labels(digits.train) + labels(digits.val),
        strict=True,
    )
    wanted = zip(source.images.astype(np.uint8), source.target.tolist(), strict=True)
    assert Counter((image.tobytes(), label) for image, label in parts) == Counter(
        (image.tobytes(), label) for image, label in wanted
    )


def test_digits_are_normalised_by_the_training_part(digits):
    pixels = torch.stack([image for image, _ in samples(digits.train)])
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_digits_are_the_same_at_every_load(digits):
    again = load_datasets("digits", image_size=8)
    assert same(samples(digits.train), samples(again.train))
    assert same(samples(digits.val), samples(again.val))


def test_digits_are_enlarged_to_three_equal_channels(digits):
    image, label = load_datasets("digits", image_size=32).val[0]
    small, small_label = digits.val[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert label == small_label
    torch.testing.assert_close(image[:, ::31, ::31], small[:, ::7, ::7])  # corners are copied
    torch.testing.assert_close(image.mean(), small.mean(), atol=0.05, rtol=0)


def test_digits_take_no_root():
    message = "data set 'digits' comes with scikit-learn: leave out root (=/data)"
    with raises(message):
        load_datasets("digits", root="/data")


# Arguments and packages


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny-imagenet",
            "unknown data set 'tiny-imagenet': known are digits, folder, tiny_imagenet, hfds/…, "
            "wds/…, torch/…; did you mean tiny_imagenet?",
        ),
        (
            "mnist",
            "unknown data set 'mnist': known are digits, folder, tiny_imagenet, "
            "hfds/…, wds/…, torch/…",
        ),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    with raises(message):
        load_datasets(name)


def test_the_table_holds_every_data_set():
    assert sorted(DATASETS) == ["digits", "folder", "tiny_imagenet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size (=0) must be at least 1"),
        (
            {"interpolation": "linear"},
            "interpolation (='linear') must be one of bicubic, bilinear, nearest",
        ),
        ({"crop_pct": 0.0}, "crop_pct (=0.0) must be above 0 and at most 1"),
        ({"crop_pct": 1.5}, "crop_pct (=1.5) must be above 0 and at most 1"),
        (
            {"crop_scale": (0.5, 0.2)},
            "crop_scale (=(0.5, 0.2)) must be two numbers, 0 < low <= high <= 1",
        ),
        ({"crop_scale": (0.5,)}, "crop_scale (=(0.5,)) must be two numbers, 0 < low <= high <= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with raises(message):
        load_datasets("digits", **options)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_every_interpolation_works(tmp_path, interpolation):
    datasets = [
        load_datasets("digits", image_size=10, interpolation=interpolation),
        load_folder(make_folder(tmp_path), image_size=10, interpolation=interpolation),
    ]
    for part in [part for both in datasets for part in (both.train, both.val)]:
        assert part[0][0].shape == (3, 10, 10)


@pytest.mark.parametrize(
    ("module", "package"), [("timm.data", "timm"), ("torchvision.datasets.folder", "torchvision")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    message = f"this data set needs {package}: pip install 'starfire-prune[train]'"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        load_folder(make_folder(tmp_path))


# Loaders


def numbered(count: int) -> LabelledImages[Tensor]:
    """Images whose every pixel is their label."""
    return LabelledImages(
        [torch.full((3, 2, 2), float(label)) for label in range(count)],
        range(count),
        operator.pos,
    )


def batch_sizes(loader: Any) -> list[int]:
    return [len(batch_labels) for _, batch_labels in loader]


def test_a_loader_gives_batches_of_images_and_labels():
    images, batch_labels = next(iter(build_loader(numbered(6), 4, train=True)))
    assert images.shape == (4, 3, 2, 2)
    assert images.dtype == torch.float32
    assert batch_labels.dtype == torch.int64
    assert torch.equal(images[:, 0, 0, 0], batch_labels.float())


def test_a_validation_loader_keeps_the_order():
    loader = build_loader(numbered(5), 2, train=False)
    assert torch.cat([batch_labels for _, batch_labels in loader]).tolist() == [0, 1, 2, 3, 4]


def test_a_training_loader_shuffles_afresh_every_epoch():
    loader = build_loader(numbered(64), 16, train=True)
    first, second = (torch.cat([batch_labels for _, batch_labels in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))


@pytest.mark.parametrize(
    ("count", "batch_size", "train", "sizes"),
    [
        (5, 2, True, [2, 2]),  # a single image at the end
        (5, 3, True, [3, 2]),
        (6, 3, True, [3, 3]),
        (1, 3, True, [1]),  # the only batch there is
        (3, 1, True, [1, 1, 1]),  # asked for
        (5, 2, False, [2, 2, 1]),
    ],
)
def test_only_a_single_last_training_image_is_dropped(count, batch_size, train, sizes):
    assert batch_sizes(build_loader(numbered(count), batch_size, train=train)) == sizes


def test_workers_are_started_afresh_every_epoch():
    assert not build_loader(numbered(4), 2, train=True, workers=2).persistent_workers


def test_memory_is_pinned_where_cuda_is_available(monkeypatch):
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)  # noqa: B023
        assert build_loader(numbered(4), 2, train=True).pin_memory is available


@both_workers
def test_an_epoch_is_repeated_from_the_state_of_the_generators(tmp_path, workers):
    loader = build_loader(load_folder(make_folder(tmp_path)).train, 2, train=True, workers=workers)
    states = random.getstate(), torch.get_rng_state()
    first = list(loader)
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    second, third = list(loader), list(loader)
    for (images, batch_labels), (images_again, labels_again) in zip(first, second, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(batch_labels, labels_again)
    assert not torch.equal(
        torch.cat([images for images, _ in second]), torch.cat([images for images, _ in third])
    )


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (2, -1)])
def test_a_loader_refuses_arguments_out_of_range(batch_size, workers):
    with pytest.raises(ValueError, match=r"batch_size=0|num_workers"):
        build_loader(numbered(4), batch_size, train=False, workers=workers)


# Real images


def count_images(dataset: Any, image_size: int) -> Counter[int]:
    """Read every image in two workers and count those of each class."""
    counts: Counter[int] = Counter()
    for images, batch_labels in build_loader(dataset, 100, train=False, workers=2):
        assert images.shape == (len(batch_labels), 3, image_size, image_size)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        counts.update(batch_labels.tolist())
    return counts


@forks
@pytest.mark.parametrize(
    ("part", "images_per_class"),
    [pytest.param("train", 500, marks=pytest.mark.slow), ("val", 50)],
)
def test_every_image_of_tiny_imagenet_is_read(tiny_imagenet, part, images_per_class):
    datasets = load_datasets("tiny_imagenet", root=tiny_imagenet, image_size=64)
    counts = count_images(getattr(datasets, part), 64)
    assert counts == dict.fromkeys(range(20), images_per_class)
    assert datasets.classes == tuple((tiny_imagenet / "wnids.txt").read_text().split())


def test_greyscale_images_of_tiny_imagenet_have_three_equal_channels(tiny_imagenet):
    val: Any = load_datasets("tiny_imagenet", root=tiny_imagenet, image_size=64).val
    greyscale = [index for index, path in enumerate(val.items) if is_greyscale(path)]
    assert len(greyscale) >= 5
    for index in greyscale:
        image = val[index][0] * STD + MEAN
        torch.testing.assert_close(image[1:], image[:1].expand(2, 64, 64))


def is_greyscale(path: str) -> bool:
    with Image.open(path) as image:
        return image.mode == "L"


def test_labels_of_tiny_imagenet_are_those_of_its_annotations(tiny_imagenet):
    datasets = load_datasets("tiny_imagenet", root=tiny_imagenet, image_size=64)
    val: Any = datasets.val
    lines = (tiny_imagenet / "val" / "val_annotations.txt").read_text().splitlines()
    wanted = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    given = zip(val.items, val.labels, strict=True)
    assert {Path(path).name: datasets.classes[label] for path, label in given} == wanted


@forks
@pytest.mark.parametrize(("part", "images_per_class"), [("train", 100), ("val", 50)])
def test_every_image_of_imagenette_is_read(imagenette, part, images_per_class):
    datasets = load_datasets("folder", root=imagenette, image_size=96)
    counts = count_images(getattr(datasets, part), 96)
    assert counts == dict.fromkeys(range(10), images_per_class)


@both_workers
def test_a_truncated_photograph_is_named(imagenette, tmp_path, workers):
    for part in ("train", "val"):
        shutil.copytree(imagenette / part / "n01440764", tmp_path / part / "n01440764")
    path = sorted((tmp_path / "train" / "n01440764").iterdir())[0]
    path.write_bytes(path.read_bytes()[:2000])
    train = load_datasets("folder", root=tmp_path, image_size=32).train
    error = error_of(build_loader(train, 50, train=True, workers=workers))
    assert error_sentence(error).startswith(f"cannot decode {path}: ")
