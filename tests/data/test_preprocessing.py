"""What a recipe may set of timm's transforms."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from starfire_prune.data import DataError, is_policy, load_datasets
from starfire_prune.data.preprocessing import Preprocessing

POLICIES = [
    "rand-m9-mstd0.5",
    "rand-m9-n3-p0.7-mstd0.5-mmax15-inc1-tweights",
    "augmix-m5-w4-d2-a0.5-b1-mstd1",
    "augmix",
    "original-mstd0.5",
    "originalr",
    "v0",
    "v0r-mstd1",
    "3a",
]


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def augmented(image: Image.Image, times: int = 1, seed: int = 0, **options: Any) -> list[Tensor]:
    """Training images, without flips unless asked for."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    train, _ = Preprocessing(image_size=16, **{"hflip": 0.0, **options}).transforms()
    return [train(image) for _ in range(times)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_training_images_as_the_generators_say(image, policy):
    changed = augmented(image, 8, auto_augment=policy)
    assert {tensor.shape for tensor in changed} == {(3, 16, 16)}
    assert not same(changed, augmented(image, 8))
    assert same(changed, augmented(image, 8, auto_augment=policy))


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"random_erasing": 1.0}, {}),
        ({"color_jitter": 0.4}, {}),
        ({"hflip": 1.0}, {}),
        ({"crop_scale": (0.9, 1.0)}, {}),
        ({"auto_augment": "3a", "color_jitter": 0.4}, {"auto_augment": "3a"}),
    ],
)
def test_each_setting_changes_training_images_alone(image, options, plain):
    assert not same(augmented(image, 4, **options), augmented(image, 4, **plain))
    evaluated = [
        Preprocessing(image_size=16, **settings).transforms()[1](image)
        for settings in (options, plain)
    ]
    assert same(evaluated[:1], evaluated[1:])


def test_a_crop_has_the_area_that_its_scale_gives():
    """A ramp from left to right: its range in a crop is the crop's width, its side's share."""
    ramp = np.linspace(0, 255, 200).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (200, 200, 3)).copy())
    plain: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "nearest"}
    for low, high in ((0.04, 0.05), (0.2, 0.25)):
        for crop in augmented(image, 20, crop_scale=(low, high), **plain):
            area = float(crop.max() - crop.min()) ** 2
            assert low / 2 < area < high * 4 / 3 + 0.02, (area, low, high)


def test_erasing_fills_a_rectangle_with_noise(image):
    erased = augmented(image, random_erasing=1.0)[0]
    changed = (erased != augmented(image)[0]).all(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert changed.sum() == len(rows) * len(columns)
    assert len(set(erased[:, changed].flatten().tolist())) > 3


def test_mean_and_deviation_hold_for_both_parts(image):
    settings = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    for plain, changed in zip(
        Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1)).transforms(),
        Preprocessing(image_size=16, **settings).transforms(),  # type: ignore[arg-type]
        strict=True,
    ):
        random.seed(1)
        torch.manual_seed(1)
        pixels = plain(image)
        random.seed(1)
        torch.manual_seed(1)
        mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
        torch.testing.assert_close(changed(image), (pixels - mean) / std)


def test_a_data_set_is_loaded_with_its_settings(tmp_path, image):
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
        image.save(tmp_path / part / "ant" / "0.png")

    def load(**options: Any) -> Any:
        return load_datasets("folder", root=tmp_path, image_size=28, **options)

    ones = load(mean=[0, 0, 0], std=[1, 1, 1]).val[0][0]
    halves = load(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]).val[0][0]
    torch.testing.assert_close(halves, 2 * ones - 1)
    random.seed(0)
    erased = load(random_erasing=1.0, auto_augment="rand-m9", color_jitter=0.0, hflip=1.0).train
    assert erased[0][0].shape == (3, 28, 28)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_of_timm_are_known(policy):
    assert is_policy(policy)


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "random-m9",
        "rand-",
        "rand-m",  # timm takes these without a word
        "rand-magnitude9",
        "rand-m9-mstdinf",
        "rand-m9.5",
        "rand-w0",
        "rand-tanything",
        "augmix-n3",
        "v0-m9",
        "v1",
        "rand-m9 ",
        "RAND-m9",
    ],
)
def test_what_timm_would_not_read_to_its_end_is_no_policy(policy):
    assert not is_policy(policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean (=(0.5, 0.5)) must be three numbers, one per channel"),
        ({"std": (1, 0, 1)}, "std (=(1, 0, 1)) must be three numbers above 0, one per channel"),
        (
            {"auto_augment": "rand-m"},
            "auto_augment (='rand-m') must be one of timm's policies, such as rand-m9-mstd0.5, "
            "augmix-m3 or 3a",
        ),
        ({"random_erasing": 1.5}, "random_erasing (=1.5) must be in [0, 1]"),
        ({"color_jitter": -0.1}, "color_jitter (=-0.1) must be at least 0"),
        ({"hflip": 2}, "hflip (=2) must be in [0, 1]"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_file_is_read(options, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_datasets("folder", root=Path("/absent"), **options)
