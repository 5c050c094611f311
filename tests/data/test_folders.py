"""Folders of images: a folder per class, and the layout of Tiny-ImageNet."""

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from starfire_prune.data import (
    DataError,
    build_loader,
    error_sentence,
    load_datasets,
)
from tests.support.image_folders import (
    annotate,
    both_workers,
    error_of,
    labels,
    load_folder,
    load_tiny_imagenet,
    make_folder,
    make_tiny_imagenet,
    noise,
    raises,
    same,
    samples,
    save,
)

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


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


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".Trash-1000", ".DS_Store"])
def test_hidden_folders_are_left_out(tmp_path, name):
    root = make_folder(tmp_path)
    for part in ("train", "val"):
        save(root / part / name / "0.jpg")
        save(root / part / "ant" / name / "0-checkpoint.jpg")
        save(root / part / "bee" / "more" / name / "ant" / "0.jpg")
    datasets = load_folder(root)
    assert datasets.classes == ("ant", "bee")
    assert labels(datasets.train) == [0, 0, 0, 1, 1, 1]
    assert labels(datasets.val) == [0, 0, 1, 1]


def test_hidden_files_are_left_out(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"what macOS adds to a file")
    (root / "train" / ".DS_Store").write_bytes(b"")
    assert labels(load_folder(root).train) == [0, 0, 0, 1, 1, 1]


def test_images_behind_links_are_read(tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "train" / "bee").rename(tmp_path / "elsewhere")
    (root / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "ant" / "3.jpg").symlink_to(root / "train" / "ant" / "0.jpg")
    assert labels(load_folder(root).train) == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("link", "target", "first"),
    [
        ("ant/loop", "..", "train"),
        ("ant/self", ".", "train/ant"),
        ("bee/up", "../..", "train"),
        ("bee/more", "../ant", "train/ant"),
        ("cat", "ant", "train/ant"),
    ],
)
def test_a_link_to_images_that_are_read_anyway_is_named(tmp_path, link, target, first):
    root = make_folder(tmp_path)
    for part in ("train", "val"):
        (root / part / link).symlink_to(target)
    again = root / "train" / link / ("train" if target == "../.." else "")
    with raises(
        f"{again} leads to the folder {root / first}, which is part of the same images: delete the "
        f"link"
    ):
        load_folder(root)


def test_a_link_to_itself_is_named(tmp_path):
    root = make_folder(tmp_path)
    link = root / "train" / "ant" / "link"
    link.symlink_to(link)
    with raises(f"cannot read {link}: Too many levels of symbolic links"):
        load_folder(root)


def test_class_names_may_be_stored_in_other_forms(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant").rename(root / "train" / "\u00c4pfel")
    (root / "val" / "ant").rename(root / "val" / "A\u0308pfel")
    datasets = load_folder(root)
    assert datasets.classes == ("bee", "\u00c4pfel")
    assert labels(datasets.train) == [0, 0, 0, 1, 1, 1]
    assert labels(datasets.val) == [0, 0, 1, 1]


def test_two_folders_of_one_class_are_told_apart(tmp_path):
    root = make_folder(tmp_path)
    for name in ("\u00c4pfel", "A\u0308pfel"):
        save(root / "val" / name / "0.jpg")
    with raises(
        f"{root / 'val'} has two folders of the class \u00c4pfel, whose names are stored as "
        f"'A\\u0308pfel' and '\\xc4pfel': put their images into one of them"
    ):
        load_folder(root)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ant ", "ant  ('ant ')"),
        ("ant\u200b", "'ant\\u200b'"),
        ("\u0430nt", "\u0430nt ('\\u0430nt')"),  # Cyrillic
        ("ANT", "ANT"),
    ],
)
def test_class_names_that_look_the_same_are_told_apart(tmp_path, name, shown):
    root = make_folder(tmp_path)
    (root / "val" / "ant").rename(root / "val" / name)
    with raises(
        f"the classes of the two parts differ: only {root / 'train'} has ant and only "
        f"{root / 'val'} has {shown}; give both the same"
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


def test_tiny_imagenet_leaves_out_hidden_files(tmp_path):
    root = make_tiny_imagenet(tmp_path)
    save(root / "train" / ".ipynb_checkpoints" / "0.JPEG")
    (root / "val" / "images" / ".DS_Store").write_bytes(b"")
    datasets = load_tiny_imagenet(root)
    assert datasets.classes == ("n1", "n2")
    assert labels(datasets.val) == [1, 0, 1]


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
