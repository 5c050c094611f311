"""Mixup and cutmix: the targets that timm makes, for batches of any size."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from starfire_prune.training.mixing import mix_batch

CLASSES = 4
MIXES = {"mixup": {"mixup_alpha": 0.8}, "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}}


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, 6, 6, generator=generator)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def mixup(label_smoothing: float = 0.1, **alphas: float) -> Mixup:
    return Mixup(num_classes=CLASSES, label_smoothing=label_smoothing, **alphas)


@pytest.mark.parametrize("kind", MIXES)
def test_an_even_batch_is_mixed_as_timm_does(kind):
    images, labels = batch(6)
    np.random.seed(0)
    expected = mixup(**MIXES[kind])(images.clone(), labels)
    np.random.seed(0)
    mixed, targets = mix_batch(mixup(**MIXES[kind]), images.clone(), labels)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(targets, expected[1])
    assert not torch.equal(mixed, images)


@pytest.mark.parametrize("kind", MIXES)
def test_of_an_odd_batch_all_but_the_last_are_mixed_as_timm_does(kind):
    images, labels = batch(7)
    np.random.seed(0)
    expected = mixup(**MIXES[kind])(images[:6].clone(), labels[:6])
    np.random.seed(0)
    mixed, targets = mix_batch(mixup(**MIXES[kind]), images.clone(), labels)
    assert torch.equal(mixed[:6], expected[0])
    assert torch.equal(targets[:6], expected[1])
    assert torch.equal(mixed[6], images[6])


@pytest.mark.parametrize("size", [1, 3])
def test_the_image_left_over_has_its_own_smoothed_label(size):
    images, labels = batch(size)
    mixed, targets = mix_batch(mixup(mixup_alpha=0.8, label_smoothing=0.2), images.clone(), labels)
    own = [0.85 if index == int(labels[-1]) else 0.05 for index in range(CLASSES)]
    assert torch.equal(mixed[-1], images[-1])
    assert targets[-1].tolist() == pytest.approx(own)


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("kind", MIXES)
def test_the_shares_of_an_image_add_up_to_one(kind, size):
    _, targets = mix_batch(mixup(**MIXES[kind]), *batch(size))
    assert targets.shape == (size, CLASSES)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * size)
