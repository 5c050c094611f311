"""Data sets by the names of timm's readers: hfds/, wds/ and torch/."""

import gzip
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starfire_prune.data import DataError, Datasets, build_loader, load_datasets
from starfire_prune.training import train as training
from tests.support.runs import metrics_of, small_recipe
from tests.support.shards import add_info, picture, write_shards, write_tar

# What packages of others do while they are imported
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:webdataset"),
]

# Loaders fork, and Python 3.12 and later warn of that in a process with threads, as torch has
forks = pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")


def raises(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def labels_of(dataset: Any) -> list[int]:
    batches = build_loader(dataset, 2, train=False)
    return torch.cat([labels for _, labels in batches]).tolist()


def values_of(dataset: Any) -> list[int]:
    """The grey values of images that are loaded with a mean of 0 and a deviation of 1."""
    batches = build_loader(dataset, 2, train=False)
    return [round(255 * float(image.mean())) for images, _ in batches for image in images]


def load(name: str, root: Path | str | None = None, **options: Any) -> Datasets:
    plain: dict[str, Any] = {"image_size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}
    return load_datasets(name, root=root, **plain, **options)


# Hugging Face's data sets


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return pytest.importorskip("datasets")


def make_folder(root: Path, val: str = "validation") -> Path:
    """Classes ant and bee, images of 10 to 12 and 20 to 22 in grey for training, of 30 and 40."""
    for part, name, values in (
        ("train", "ant", (10, 11, 12)),
        ("train", "bee", (20, 21, 22)),
        (val, "ant", (30,)),
        (val, "bee", (40,)),
    ):
        folder = root / part / name
        folder.mkdir(parents=True)
        for value in values:
            (folder / f"{value}.png").write_bytes(picture(value))
    return root


def make_parquet(hugging_face: Any, root: Path, labels: list[Any], **columns: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(10 * index), "path": None} for index in range(len(labels))]
    table = hugging_face.Dataset.from_dict({"image": images, "label": labels, **columns})
    for split in ("train", "validation"):
        table.to_parquet(str(root / f"{split}.parquet"))
    return root


def load_hfds(path: Path, **options: Any) -> Datasets:
    return load(f"hfds/{path}", path.parent / "cache", **options)


def test_a_folder_of_hugging_face_has_images_labels_and_names(hugging_face, tmp_path):
    datasets = load_hfds(make_folder(tmp_path / "Data"))
    assert datasets.classes == ("ant", "bee")
    assert values_of(datasets.val) == [30, 40]
    assert labels_of(datasets.train) == [0, 0, 0, 1, 1, 1]


def test_its_path_may_start_at_the_home_folder(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(make_folder(tmp_path / "ada").parent))
    assert labels_of(load("hfds/~/ada", tmp_path / "cache").val) == [0, 1]


def test_splits_are_named_as_the_data_set_names_them(hugging_face, tmp_path):
    path = make_folder(tmp_path / "data", val="test")
    datasets = load_hfds(path, train_split="train[:3]", val_split="test")
    assert values_of(datasets.val) == [30, 40]
    assert labels_of(datasets.train) == [0, 0, 0]


def test_numbers_are_labels_where_classes_have_no_names(hugging_face, tmp_path):
    datasets = load_hfds(make_parquet(hugging_face, tmp_path / "data", [2, 0, 1]), num_classes=3)
    assert datasets.classes == ("0", "1", "2")
    assert labels_of(datasets.train) == [2, 0, 1]
    assert values_of(datasets.val) == [0, 10, 20]


def test_a_class_map_gives_the_labels(hugging_face, tmp_path):
    path = make_parquet(hugging_face, tmp_path / "data", ["dog", "cat"], fine=[7, 9])
    by_name = {"class_map": {"cat": 0, "dog": 1}}
    assert load_hfds(path, options=by_name).classes == ("cat", "dog")
    assert labels_of(load_hfds(path, options=by_name).val) == [1, 0]
    by_number = {"class_map": {"7": 0, "9": 1}, "target_key": "fine"}
    assert labels_of(load_hfds(path, options=by_number).val) == [0, 1]


def test_a_class_map_may_hold_the_names_of_numbered_classes(hugging_face, tmp_path):
    options = {"class_map": {"bee": 0, "ant": 1}}
    datasets = load_hfds(make_folder(tmp_path / "data"), options=options)
    assert datasets.classes == ("bee", "ant")
    assert labels_of(datasets.val) == [1, 0]


@forks
def test_workers_read_rows_in_order(hugging_face, tmp_path):
    val = load_hfds(make_folder(tmp_path / "data")).val
    loader = build_loader(val, 1, train=False, workers=2)
    assert [labels.tolist() for _, labels in loader] == [[0], [1]]


def test_a_label_out_of_range_is_named_before_training(hugging_face, tmp_path):
    path = make_parquet(hugging_face, tmp_path / "data", [0, 3])
    with raises(
        f"image 1 of train in hfds/{path} has label 3, but the 2 classes are numbered from 0: "
        f"correct model.num_classes, or map the labels with options.class_map"
    ):
        load_hfds(path, num_classes=2)


@pytest.mark.parametrize("content", [b"", picture(3)[:40]])
def test_a_damaged_row_is_named(hugging_face, tmp_path, content):
    path = make_folder(tmp_path / "data")
    (path / "validation" / "bee" / "40.png").write_bytes(content)
    val = load_hfds(path).val
    with raises(
        f"cannot decode image 1 of validation in hfds/{path}: the file is truncated or not an "
        f"image; replace or delete it"
    ):
        labels_of(val)


def test_a_row_whose_file_vanished_is_named(hugging_face, tmp_path):
    path = make_folder(tmp_path / "data")
    val = load_hfds(path).val
    (path / "validation" / "bee" / "40.png").unlink()
    with raises(f"cannot read image 1 of validation in hfds/{path}: No such file or directory"):
        labels_of(val)


def test_a_row_without_an_image_is_named(hugging_face, tmp_path):
    path = make_parquet(hugging_face, tmp_path / "data", [0], other=[None])
    val = load_hfds(path, num_classes=1, options={"input_key": "other"}).val
    with raises(f"image 0 of validation in hfds/{path} is missing: restore it"):
        labels_of(val)


def test_a_path_that_does_not_exist_is_named(hugging_face, tmp_path):
    name = f"hfds/{tmp_path}/absent"
    with raises(f"root {tmp_path}/absent does not exist: give the folder of data set {name!r}"):
        load(name)


def test_a_missing_split_of_hugging_face_is_named(hugging_face, tmp_path):
    path = make_folder(tmp_path / "data", val="test")
    with pytest.raises(DataError) as caught:
        load_hfds(path)
    assert str(caught.value) == (
        f"data set 'hfds/{path}': split 'validation' cannot be read: Unknown split \"validation\". "
        f"Should be one of ['train', 'test']; correct its name, root, splits or options"
    )


def test_a_missing_column_is_named_with_those_that_there_are(hugging_face, tmp_path):
    path = make_folder(tmp_path / "data")
    for option in ("input_key", "target_key"):
        with raises(
            f"data set 'hfds/{path}' has no column species: set options.{option} to one of image, "
            f"label"
        ):
            load_hfds(path, options={option: "species"})


# WebDataset's shards


@pytest.fixture(scope="module")
def webdataset() -> Any:
    return pytest.importorskip("webdataset")


def make_shards(root: Path) -> Path:
    write_shards(root, "train", [4, 3])
    write_shards(root, "validation", [3])
    return root


def test_shards_are_read_by_the_splits_of_their_info(webdataset, tmp_path):
    datasets = load("wds/numbers", make_shards(tmp_path), num_classes=7)
    assert datasets.classes == ("0", "1", "2", "3", "4", "5", "6")
    assert labels_of(datasets.train) == list(range(7))
    assert values_of(datasets.val) == labels_of(datasets.val) == [0, 1, 2]


def test_shards_may_be_given_by_a_pattern(webdataset, tmp_path):
    make_shards(tmp_path)
    datasets = load("wds/", tmp_path, train_split="train-{1..1}.tar", val_split="train-{0..1}.tar")
    assert labels_of(datasets.train) == [4, 5, 6]
    assert labels_of(datasets.val) == list(range(7))


def test_shards_may_be_at_a_url(webdataset, tmp_path):
    datasets = load("wds/numbers", f"file://{make_shards(tmp_path)}/", num_classes=7)
    assert labels_of(datasets.train) == list(range(7))


def test_a_class_map_names_the_classes_of_shards(webdataset, tmp_path):
    class_map = {str(label): 6 - label for label in range(7)}
    datasets = load("wds/", make_shards(tmp_path), options={"class_map": class_map})
    assert datasets.classes == ("6", "5", "4", "3", "2", "1", "0")
    assert labels_of(datasets.val) == [6, 5, 4]


@pytest.mark.parametrize("by", ["option", "info"])
def test_labels_may_be_in_the_json_of_a_sample(webdataset, tmp_path, by):
    files = {"0.webp": b"", "0.jpg": picture(9), "0.json": json.dumps({"fine": 5}).encode()}
    write_tar(tmp_path / "0.tar", files)
    more = {"alt_label": "fine"} if by == "info" else {}
    for split in ("train", "validation"):
        add_info(tmp_path, split, {"0.tar": 1}, **more)
    options = {"target_key": "fine", "input_key": "tif;jpg"} if by == "option" else {}
    datasets = load("wds/", tmp_path, options=options)
    assert labels_of(datasets.val) == [5]
    assert values_of(datasets.val) == [9]


def test_the_window_of_the_shuffle_is_an_option(webdataset, tmp_path):
    train: Any = load("wds/", make_shards(tmp_path), options={"shuffle_size": 5}).train
    assert train.shuffle_size == 5


def test_a_label_of_shards_out_of_range_is_named(webdataset, tmp_path):
    val = load("wds/", make_shards(tmp_path), num_classes=2).val
    with pytest.raises(DataError, match=r"0\.tar: 00002 has label 2, but the 2 classes"):
        labels_of(val)


def test_shards_without_info_are_refused(webdataset, tmp_path):
    with raises(
        f"{tmp_path} holds no _info.json: add one that lists the filenames and shard_lengths of "
        f"each split, in timm's format"
    ):
        load("wds/", tmp_path)


def test_a_split_that_the_info_lacks_is_named(webdataset, tmp_path):
    write_shards(tmp_path, "train", [2])
    with pytest.raises(DataError, match=r"'wds/': split 'validation' cannot be read: .*not found"):
        load("wds/", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"splits": {"train": {"name": "train"}}}'])
def test_an_info_that_cannot_be_read_is_refused(webdataset, tmp_path, text):
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises(DataError, match=r"split 'train' cannot be read: .*; correct its name"):
        load("wds/", tmp_path)


def test_shards_without_a_length_are_named(webdataset, tmp_path):
    make_shards(tmp_path)
    with raises("_info.json lists no shard_lengths of other-0.tar, other-1.tar: add them"):
        load("wds/", tmp_path, val_split="other-{0..1}.tar")


def test_shards_that_are_missing_are_named(webdataset, tmp_path):
    path = make_shards(tmp_path) / "train-1.tar"
    path.unlink()
    with raises(f"{tmp_path} lacks shards of split 'train': {path}; restore them"):
        load("wds/", tmp_path)


def test_a_split_without_samples_is_refused(webdataset, tmp_path):
    write_shards(tmp_path, "train", [0])
    with raises("data set 'wds/': split 'train' holds no images"):
        load("wds/", tmp_path)


# Data sets of torchvision


def make_mnist(root: Path) -> Path:
    """The files of MNIST: 3 digits for training, 2 for validation, grey as their label times 20."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, digits in (("train", [7, 0, 9]), ("t10k", [1, 2])):
        pixels = np.repeat(np.array(digits, np.uint8) * 20, 28 * 28)
        images = struct.pack(">4i", 2051, len(digits), 28, 28) + pixels.tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 2049, len(digits)) + bytes(digits)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return root


@pytest.mark.parametrize("name", ["torch/mnist", "torchvision/MNIST"])
def test_a_data_set_of_torchvision_is_read_in_rgb(tmp_path, name):
    datasets = load(name, make_mnist(tmp_path))
    assert datasets.classes[9] == "9 - nine"
    assert labels_of(datasets.train) == [7, 0, 9]
    assert values_of(datasets.val) == [20, 40]
    image, _ = datasets.train[0]
    assert image.shape == (3, 8, 8)


def test_a_data_set_of_torchvision_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        load("torch/mnist", tmp_path)
    assert str(caught.value) == (
        "data set 'torch/mnist': split 'train' cannot be read: Dataset not found. Set "
        "data.options.download: true to download it; correct its name, root, splits or options"
    )


def test_a_name_that_torchvision_lacks_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Unknown torchvision dataset nmist; "):
        load("torch/nmist", tmp_path)


def test_a_split_that_would_be_taken_for_another_is_refused(tmp_path):
    message = "data set 'torch/mnist' has no split 'tran': its splits are train and validation"
    with raises(message):
        load("torch/mnist", make_mnist(tmp_path), train_split="tran")


def test_a_folder_is_not_read_by_torchvision(tmp_path):
    with raises("data set 'torch/folder': folders of images are read by name: folder"):
        load("torch/folder", tmp_path)


@pytest.mark.parametrize("name", ["torch/mnist", "wds/x"])
def test_a_root_is_needed(name):
    if name.startswith("wds"):
        pytest.importorskip("webdataset")
    with raises(f"data set {name!r} is read from a folder: give it as root"):
        load(name)


# Arguments and packages


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "torch/mnist",
            {"target_key": "x"},
            "options.target_key (='x') is not an option of torch/: the options are download",
        ),
        ("torchvision/mnist", {"download": 1}, "options.download (=1) must be true or false"),
        ("wds/x", {"input_key": ""}, "options.input_key (='') must be text"),
        ("hfds/x", {"class_map": 3}, "options.class_map (=3) must be a mapping or a path"),
        (
            "wds/x",
            {"shuffle_size": True},
            "options.shuffle_size (=True) must be a whole number from 1",
        ),
        ("folder", {"download": True}, "data set 'folder' does not accept options: leave it out"),
    ],
)
def test_options_that_a_reader_cannot_read_are_refused(name, options, message):
    with raises(message):
        load(name, options=options)


def test_splits_have_no_effect_without_a_reader():
    with raises("data set 'digits' does not accept val_split: leave it out"):
        load("digits", val_split="test")


@pytest.mark.parametrize("name", ["tfds/mnist", "hfids/mnist"])
def test_readers_that_cannot_be_divided_exactly_are_refused(name):
    with pytest.raises(DataError, match="timm's reader can't divide it exactly among processes"):
        load(name)


@pytest.mark.parametrize("name", ["hfds/", "torch/", "mnist/train"])
def test_a_reader_without_a_name_is_unknown(name):
    with pytest.raises(DataError, match=f"^unknown data set '{name}'"):
        load(name)


@pytest.mark.parametrize(("name", "package"), [("hfds/x", "datasets"), ("wds/x", "webdataset")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = f"this data set needs {package}: pip install 'starfire-prune[data]'"
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        load(name)


# Real images


@pytest.fixture(scope="module")
def photographs(imagenette: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Some photographs of two classes: a folder data set, and the same as shards."""
    tmp_path = tmp_path_factory.mktemp("photographs")
    root = tmp_path / "part"
    for part in ("train", "val"):
        for folder in sorted((imagenette / part).iterdir())[:2]:
            (root / part / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:4]:
                shutil.copy(image, root / part / folder.name)
    shards = tmp_path / "shards"
    for split, part in (("train", "train"), ("validation", "val")):
        files = {}
        for label, folder in enumerate(sorted((root / part).iterdir())):
            for image in sorted(folder.iterdir()):
                files[f"{image.stem}.jpg"] = image.read_bytes()
                files[f"{image.stem}.cls"] = str(label).encode()
        write_tar(shards / f"{split}.tar", files)
        add_info(shards, split, {f"{split}.tar": len(files) // 2})
    return root, shards


def test_readers_give_the_photographs_that_the_folder_has(
    hugging_face, webdataset, photographs, tmp_path
):
    root, shards = photographs
    options: dict[str, Any] = {"image_size": 64, "num_classes": 2}
    expected = list(
        build_loader(load_datasets("folder", root=root, image_size=64).val, 8, train=False)
    )
    for datasets in (
        load_datasets(f"hfds/{root}", root=tmp_path / "cache", **options),
        load_datasets("wds/imagenette", root=shards, **options),
    ):
        batches = list(build_loader(datasets.val, 8, train=False))
        assert len(batches) == len(expected) == 1
        assert torch.equal(batches[0][0], expected[0][0])
        assert torch.equal(batches[0][1], expected[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["hfds", "wds"])
def test_readers_train_an_epoch(reader, hugging_face, webdataset, photographs, runs, tmp_path):
    root, shards = photographs
    name, where = {
        "hfds": (f"hfds/{root}", tmp_path / "cache"),
        "wds": ("wds/photographs", shards),
    }[reader]
    data = f"data={{name: {name}, root: {where}, image_size: 32, batch_size: 4, workers: 0}}"
    one_epoch = ("epochs=1", "lr_schedule={}", "pruning.era=[0, 1]", "model.num_classes=2")
    training.train(small_recipe(tmp_path, data, *one_epoch), tmp_path / "run")
    (row,) = metrics_of(tmp_path / "run")
    assert row["phase"] == "era"
    assert row["sparsity"] == pytest.approx(0.6, abs=0.02)  # whole kernels of small layers
