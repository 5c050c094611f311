import operator
import pickle
import random
import re
import shutil
import subprocess
import sys
import traceback
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
    DataError,
    Datasets,
    LabelledImages,
    build_loader,
    error_sentence,
    load_datasets,
)

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")
both_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=forks)])


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise((20, 16))).save(path)
    return path


def make_folder(root: Path, val: str = "val") -> Path:
    """Classes ant and bee with three images for training and two for validation each."""
    for name in ("ant", "bee"):
        for index in range(3):
            save(root / "train" / name / f"{index}.jpg")
        for index in range(2):
            save(root / val / name / f"{index}.jpg")
    return root


def make_tiny_imagenet(root: Path) -> Path:
    """Classes n1 and n2 with two images for training each, and three for validation in all."""
    for wnid in ("n1", "n2"):
        for index in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for index in range(3):
        save(root / "val" / "images" / f"val_{index}.JPEG")
    annotate(root, "val_0.JPEG\tn2", "val_1.JPEG\tn1", "val_2.JPEG\tn2")
    (root / "wnids.txt").write_text("n2\nn1\n")
    return root


def annotate(root: Path, *lines: str) -> None:
    text = "".join(f"{line}\t0\t0\t63\t63\n" for line in lines)
    (root / "val" / "val_annotations.txt").write_text(text)


def load_folder(root: Path, **options: Any) -> Datasets:
    return load_datasets("folder", root=root, **{"image_size": 8, **options})


def load_tiny_imagenet(root: Path) -> Datasets:
    return load_datasets("tiny_imagenet", root=root, image_size=8)


def samples(dataset: Any) -> list[tuple[Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


def labels(dataset: Any) -> list[int]:
    return list(dataset.labels)


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(one, other) and label == label_of_other
        for (one, label), (other, label_of_other) in zip(first, second, strict=True)
    )


def raises(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def error_of(loader: Any) -> DataError:
    """Read a loader to its error."""
    with pytest.raises(DataError) as caught:
        list(loader)
    # The error holds the loader's workers in a reference cycle. Left to the garbage collector,
    # they lose their queues before they are told to end, and each is waited for 5 s.
    traceback.clear_frames(caught.tb)
    return caught.value


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


# Folders of images


def test_a_folder_gives_the_classes_in_sorted_order(tmp_path):
    datasets = load_folder(make_folder(tmp_path))
    assert datasets.classes == ("ant", "bee")
    assert labels(datasets.train) == [0, 0, 0, 1, 1, 1]
    assert labels(datasets.val) == [0, 0, 1, 1]


def test_a_folder_gives_float_images_of_the_size_asked_for(tmp_path):
    datasets = load_folder(make_folder(tmp_path), image_size=12)
    for image, label in samples(datasets.train) + samples(datasets.val):
        assert image.shape == (3, 12, 12)
        assert image.dtype == torch.float32
        assert isinstance(label, int)


def test_a_folder_may_name_its_second_part_validation(tmp_path):
    datasets = load_folder(make_folder(tmp_path, val="validation"))
    assert labels(datasets.val) == [0, 0, 1, 1]


def test_a_folder_is_listed_in_sorted_order_below_the_classes_too(tmp_path):
    root = make_folder(tmp_path)
    save(root / "train" / "ant" / "more" / "3.png")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    dataset: Any = load_folder(root).train
    listed = [str(Path(path).relative_to(root / "train")) for path in dataset.items]
    assert listed == [
        "ant/0.jpg",
        "ant/1.jpg",
        "ant/2.jpg",
        "ant/more/3.png",
        "bee/0.jpg",
        "bee/1.jpg",
        "bee/2.jpg",
    ]


def test_a_root_may_start_at_the_home_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "pictures")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(samples(load_folder(Path("~/pictures")).val)) == 4


def test_validation_images_are_the_same_at_every_epoch(tmp_path):
    val = load_folder(make_folder(tmp_path)).val
    assert same(samples(val), samples(val))


def test_validation_crops_the_centre(tmp_path):
    root = make_folder(tmp_path)
    photograph = noise((32, 32), seed=1)
    save(root / "val" / "ant" / "0.png", photograph)
    dataset: Any = load_folder(root, image_size=28).val  # 28 / 0.875 = 32: nothing to resize
    path = str(root / "val" / "ant" / "0.png")
    image, _ = dataset[dataset.items.index(path)]
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (pixels[:, 2:30, 2:30] - MEAN) / STD)


def test_validation_resizes_the_shorter_side(tmp_path):
    root = make_folder(tmp_path)
    photograph = noise((64, 48), seed=1)
    save(root / "val" / "ant" / "0.png", photograph)
    dataset: Any = load_folder(root, image_size=12, crop_pct=0.5, interpolation="bicubic").val
    image, _ = dataset[dataset.items.index(str(root / "val" / "ant" / "0.png"))]
    small = photograph.resize((32, 24), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (pixels[:, 6:18, 10:22] - MEAN) / STD)


def test_training_crops_and_flips_at_random(tmp_path):
    train = load_folder(make_folder(tmp_path)).train
    assert len({train[0][0].numpy().tobytes() for _ in range(8)}) > 1


def test_training_changes_no_colour(tmp_path):
    root = make_folder(tmp_path)
    save(root / "train" / "ant" / "0.png", Image.new("RGB", (20, 16), (200, 100, 50)))
    dataset: Any = load_folder(root).train
    index = dataset.items.index(str(root / "train" / "ant" / "0.png"))
    colour = torch.tensor([200, 100, 50])[:, None, None] / 255
    for _ in range(8):
        torch.testing.assert_close(dataset[index][0], ((colour - MEAN) / STD).expand(3, 8, 8))


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png")])
def test_images_of_other_modes_become_rgb(tmp_path, mode, suffix):
    root = make_folder(tmp_path)
    path = save(root / "val" / "ant" / f"0.{suffix}", noise((20, 16)).convert(mode))
    with Image.open(path) as image:
        assert image.mode == mode
    assert load_folder(root).val[0][0].shape == (3, 8, 8)


def test_a_greyscale_image_has_three_equal_channels(tmp_path):
    root = make_folder(tmp_path)
    save(root / "val" / "ant" / "0.jpg", noise((20, 16)).convert("L"))
    image = load_folder(root).val[0][0] * STD + MEAN
    torch.testing.assert_close(image[1:], image[:1].expand(2, 8, 8))


def test_a_data_set_can_be_sent_to_another_process(tmp_path):
    val = load_folder(make_folder(tmp_path)).val
    assert same(samples(pickle.loads(pickle.dumps(val))), samples(val))


# Errors of folders


def test_a_folder_needs_a_root():
    with raises("data set 'folder' is read from a folder: give it as root"):
        load_datasets("folder")


@pytest.mark.parametrize("name", ["folder", "tiny_imagenet"])
def test_a_missing_root_is_named(tmp_path, name):
    root = tmp_path / "absent"
    with raises(f"root {root} does not exist: give the folder of data set {name!r}"):
        load_datasets(name, root=root)


@pytest.mark.parametrize("name", ["folder", "tiny_imagenet"])
def test_a_root_that_is_a_file_is_named(tmp_path, name):
    root = tmp_path / "train.tar"
    root.write_bytes(b"")
    with raises(f"root {root} is a file: give the folder of data set {name!r}"):
        load_datasets(name, root=root)


@pytest.mark.parametrize(
    ("name", "part", "wanted"),
    [
        ("folder", "train", "train/"),
        ("folder", "val", "val/ or validation/"),
        ("tiny_imagenet", "train", "train/"),
        ("tiny_imagenet", "val", "val/"),
    ],
)
def test_a_root_without_a_part_is_named(tmp_path, name, part, wanted):
    shutil.rmtree(make_folder(tmp_path) / part)
    with raises(f"{tmp_path} has no folder {wanted}: give the folder that holds it as root"):
        load_datasets(name, root=tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_images_outside_of_class_folders_are_refused(tmp_path, part):
    root = make_folder(tmp_path)
    shutil.rmtree(root / part)
    save(root / part / "0.jpg")
    message = f"{root / part} holds no class folders: put each class into a separate folder"
    with raises(message):
        load_folder(root)


def test_class_folders_without_any_image_are_refused(tmp_path):
    root = make_folder(tmp_path)
    for path in (root / "val").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=f"^{re.escape(str(root / 'val'))} holds no images: files"):
        load_folder(root)


def test_an_empty_class_folder_is_named(tmp_path):
    root = make_folder(tmp_path)
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    with raises(f"class folders of {root / 'train'} hold no images: fill or delete bee"):
        load_folder(root)


def test_parts_with_different_classes_are_told_apart(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "bee").rename(root / "train" / "cat")
    for index in range(7):
        (root / "train" / f"dog{index}").mkdir()
    with raises(
        f"the classes of the two parts differ: only {root / 'train'} has cat, dog0, dog1, dog2, "
        f"dog3 and 3 more and only {root / 'val'} has bee; give both the same"
    ):
        load_folder(root)


@both_workers
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_image_is_named(tmp_path, workers, damage):
    root = make_folder(tmp_path)
    path = save(root / "val" / "bee" / "1.jpg", noise((64, 64)))
    data = {"truncated": path.read_bytes()[:-500], "text": b"404 Not Found", "empty": b""}
    path.write_bytes(data[damage])
    error = error_of(build_loader(load_folder(root).val, 2, train=False, workers=workers))
    assert error_sentence(error) == (
        f"cannot decode {path}: the file is truncated or not an image; replace or delete it"
    )


def test_an_error_of_a_worker_keeps_its_traceback(tmp_path):
    error = DataError(
        "Caught DataError in DataLoader worker process 1.\nOriginal Traceback (most recent call "
        "last):\n  …\nstarfire_prune.data.errors.DataError: cannot decode a.jpg: the file is …\n"
    )
    assert error_sentence(error) == "cannot decode a.jpg: the file is …"
    assert "Traceback" in str(error)


def test_an_image_that_vanished_is_named(tmp_path):
    root = make_folder(tmp_path)
    val = load_folder(root).val
    path = root / "val" / "ant" / "0.jpg"
    path.unlink()
    with raises(f"cannot read {path}: No such file or directory"):
        val[0]


# Tiny-ImageNet


def test_tiny_imagenet_gives_the_classes_in_sorted_order(tmp_path):
    datasets = load_tiny_imagenet(make_tiny_imagenet(tmp_path))
    assert datasets.classes == ("n1", "n2")
    assert labels(datasets.train) == [0, 0, 1, 1]
    assert labels(datasets.val) == [1, 0, 1]
    assert {image.shape for image, _ in samples(datasets.val)} == {(3, 8, 8)}


def test_tiny_imagenet_needs_no_list_of_classes(tmp_path):
    (make_tiny_imagenet(tmp_path) / "wnids.txt").unlink()
    assert load_tiny_imagenet(tmp_path).classes == ("n1", "n2")


def test_tiny_imagenet_takes_annotations_in_any_order(tmp_path):
    make_tiny_imagenet(tmp_path)
    annotate(tmp_path, "val_2.JPEG\tn2", "val_0.JPEG\tn2", "val_1.JPEG\tn1")
    assert labels(load_tiny_imagenet(tmp_path).val) == [1, 0, 1]


def test_a_class_without_a_folder_is_named(tmp_path):
    root = make_tiny_imagenet(tmp_path)
    (root / "wnids.txt").write_text("n1\nn2\nn3\n")
    path, train = root / "wnids.txt", root / "train"
    with raises(f"{path} lists classes that {train} lacks: n3; unpack again"):
        load_tiny_imagenet(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("val_0.JPEG\tn2", "val_1.JPEG\tn9", "val_2.JPEG\tn2"),
            "{path} names classes that train/ lacks: n9; unpack again",
        ),
        (
            ("val_0.JPEG\tn2", "val_1.JPEG\tn1", "val_2.JPEG\tn2", "val_3.JPEG\tn1"),
            "{path} names images that {images} lacks: val_3.JPEG; unpack again",
        ),
        (
            ("val_0.JPEG\tn2", "val_2.JPEG\tn2"),
            "{images} holds images without a line in {path}: val_1.JPEG; delete them",
        ),
        (
            ("val_0.JPEG\tn2", "val_0.JPEG\tn1"),
            "{path}, line 2: val_0.JPEG has a line already; delete one of them",
        ),
        ((), "{path} names no images: restore the file"),
    ],
)
def test_annotations_that_do_not_fit_the_images_are_refused(tmp_path, lines, message):
    root = make_tiny_imagenet(tmp_path)
    annotate(root, *lines)
    images, path = root / "val" / "images", root / "val" / "val_annotations.txt"
    with raises(message.format(images=images, path=path)):
        load_tiny_imagenet(root)


def test_an_annotation_without_a_class_is_refused(tmp_path):
    path = make_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG n2\n")
    with raises(f"{path}, line 1: 'val_0.JPEG n2' is not a file and a class; restore it"):
        load_tiny_imagenet(tmp_path)


def test_missing_annotations_are_named(tmp_path):
    path = make_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    path.unlink()
    with raises(f"{path} does not exist: it holds the labels of the validation images"):
        load_tiny_imagenet(tmp_path)


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


def test_importing_the_module_imports_no_optional_package():
    program = (
        "import sys, starfire_prune.data;"
        "sys.exit(not {'timm', 'torchvision', 'PIL', 'sklearn'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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
