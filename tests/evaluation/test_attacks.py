"""FGSM and PGD: against plain loops and another package, and what they leave alone."""

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import ck_structured
from starfire_prune.evaluation.attacks import default_step_size, fgsm, pgd
from starfire_prune.evaluation.spaces import NORMALISED, PIXELS, Space, pixel_space
from starfire_prune.utils.modules import effective_weight
from tests.support.networks import SmallNet, equal_states, snapshot

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = pixel_space(MEAN, STD)
SPACES = pytest.mark.parametrize("space", [IMAGENET, NORMALISED], ids=lambda space: space.name)

# A linear model of an image of two pixels, one channel: the loss of class 0 rises with the
# first pixel and falls with the second.
WEIGHT = torch.tensor([[-1.0, 2.0], [1.0, -2.0]])
IMAGE = torch.tensor([0.5, 0.05]).view(1, 1, 1, 2)
FGSM_IMAGES = [(0.5, 0.05), (0.6, 0.0), (1.0, 0.0)]


def linear() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(WEIGHT)  # type: ignore[operator]
    return model


def network(dtype: torch.dtype = torch.float32) -> SmallNet:
    """A network in training mode that has seen images, and tells noise into many classes."""
    model = SmallNet()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        logits = model(torch.randn(16, 3, 8, 8, generator=generator))
    with torch.no_grad():
        model.head.weight.mul_(30)
        model.head.bias.copy_(30 * (model.head.bias - logits.mean(0)))
    return model.to(dtype)


def pixels(count: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], with black and white in them, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    images = (images * 1.4 - 0.2).clamp(0, 1).to(dtype)
    return images, torch.randint(10, (count,), generator=generator)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def denormalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return images * std + mean


def batch(count: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images as a network gets them, and labels."""
    images, labels = pixels(count, dtype)
    return normalised(images), labels


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return functional.cross_entropy(model(images), labels)


def both(model: nn.Module, images: Tensor, labels: Tensor, space: Space) -> list[Tensor]:
    """The images of either attack."""
    return [
        *fgsm(model, images, labels, [0.03], space),
        pgd(model, images, labels, 0.03, space, steps=3, restarts=2),
    ]


# What they do


def test_fgsm_moves_every_pixel_up_the_loss_and_stays_an_image():
    found = fgsm(linear(), IMAGE, torch.tensor([0]), [0.0, 0.1, 1.0])
    expected = [torch.tensor(values).view(1, 1, 1, 2) for values in FGSM_IMAGES]
    torch.testing.assert_close(found, expected)


def test_in_normalised_space_nothing_bounds_an_image():
    (found,) = fgsm(linear(), IMAGE, torch.tensor([0]), [1.0], NORMALISED)
    torch.testing.assert_close(found, torch.tensor([1.5, -0.95]).view(1, 1, 1, 2))


def test_pgd_takes_its_steps_and_stays_within_epsilon():
    def end(steps: int) -> Any:
        options: Any = {"steps": steps, "step_size": 0.04, "seed": None}
        return pgd(linear(), IMAGE, torch.tensor([0]), 0.1, **options)

    expected = [(0.54, 0.01), (0.58, 0.0), (0.6, 0.0), (0.6, 0.0)]
    for steps, values in enumerate(expected, start=1):
        torch.testing.assert_close(end(steps), torch.tensor(values).view(1, 1, 1, 2))


def test_the_default_step_crosses_the_ball_and_has_a_quarter_to_spare():
    assert default_step_size(0.04, steps=10) * 10 == pytest.approx(0.04 * 2 * 1.25)


@SPACES
def test_attacks_equal_plain_loops(space):
    """An oracle in float64: pixels are moved, and normalised within the model."""
    model = network(torch.float64).eval()
    images, labels = pixels(dtype=torch.float64)
    in_pixels = space is IMAGENET
    clean = images if in_pixels else normalised(images)

    def moved(x: Tensor, step: float) -> Tensor:
        leaf = x.clone().requires_grad_()
        logits = model(normalised(leaf) if in_pixels else leaf)
        functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        x = x + step * leaf.grad.sign()
        x = clean + (x - clean).clamp(-0.05, 0.05)
        return x.clamp(0, 1) if in_pixels else x

    x = clean
    for _ in range(4):
        x = moved(x, 0.02)
    wanted = [moved(clean, 0.05), x]
    if in_pixels:
        wanted = [normalised(image) for image in wanted]
    given_images = normalised(images)
    found = [
        *fgsm(model, given_images, labels, [0.05], space),
        pgd(model, given_images, labels, 0.05, space, steps=4, step_size=0.02, seed=None),
    ]
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_attacks_agree_with_foolbox():
    """Another package gives the same images within 1e-6, and the same predictions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that SciPy has moved
        foolbox = pytest.importorskip("foolbox")
    model = network().eval()
    images, labels = pixels(64)
    preprocessing = {"mean": MEAN, "std": STD, "axis": -3}
    other = foolbox.PyTorchModel(
        model, bounds=(0, 1), device=images.device, preprocessing=preprocessing
    )
    one_step = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    steps = foolbox.attacks.LinfPGD(abs_stepsize=0.01, steps=10, random_start=False)
    wanted = [attack.run(other, images, labels, epsilon=0.03) for attack in (one_step, steps)]
    given_images = normalised(images)
    found = [
        *fgsm(model, given_images, labels, [0.03], IMAGENET),
        pgd(model, given_images, labels, 0.03, IMAGENET, steps=10, step_size=0.01, seed=None),
    ]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(denormalised(ours), theirs, atol=1e-6, rtol=0)
        assert torch.equal(model(ours).argmax(1), other(theirs).argmax(1))
        assert not torch.equal(model(ours).argmax(1), model(given_images).argmax(1))


@settings(max_examples=40)
@given(epsilon=st.floats(0, 1), seed=st.none() | st.integers(0, 9), steps=st.integers(1, 3))
def test_adversarial_images_are_images_within_epsilon(epsilon, seed, steps):
    images, labels = batch(4)
    found = [
        *fgsm(MODEL, images, labels, [epsilon], IMAGENET),
        pgd(MODEL, images, labels, epsilon, IMAGENET, steps=steps, seed=seed),
    ]
    for adversarial in map(denormalised, found):
        assert (adversarial - denormalised(images)).abs().max() <= epsilon + 1e-6
        assert adversarial.min() >= -1e-6
        assert adversarial.max() <= 1 + 1e-6


MODEL = network()


@SPACES
def test_no_epsilon_leaves_the_bits(space):
    images, labels = batch()
    images[0, 0, 0] = -0.0
    bits = images.view(torch.int32)
    (found, _), steps = (
        fgsm(MODEL, images, labels, [0, 0.1], space),
        pgd(MODEL, images, labels, 0, space),
    )
    assert torch.equal(found.view(torch.int32), bits)
    assert torch.equal(steps.view(torch.int32), bits)


def test_clean_images_beyond_the_bounds_are_not_brought_back():
    images = torch.tensor([1.25, -0.25]).view(1, 1, 1, 2)
    (found,) = fgsm(linear(), images, torch.tensor([0]), [0.1])
    torch.testing.assert_close(found, images)


def test_fgsm_works_out_one_gradient_for_all_epsilons():
    passes = []
    model = linear()
    model.register_forward_hook(lambda *_: passes.append(1))
    fgsm(model, IMAGE, torch.tensor([0]), [0.0, 0.1, 0.2, 0.3])
    assert len(passes) == 1


@SPACES
def test_pgd_raises_the_loss_above_that_of_fgsm(space):
    images, labels = batch(64)
    losses = [
        float(loss_of(MODEL, found, labels))
        for found in (
            images,
            *fgsm(MODEL, images, labels, [0.05], space),
            pgd(MODEL, images, labels, 0.05, space, steps=20),
        )
    ]
    assert all(one < other for one, other in pairwise(losses))


# Random starts


def test_a_seed_repeats_and_another_does_not():
    images, labels = batch()
    one, again, other = (
        pgd(MODEL, images, labels, 0.05, IMAGENET, steps=2, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_global_random_state_is_neither_read_nor_moved():
    images, labels = batch()
    torch.manual_seed(0)
    np.random.seed(0)
    one = pgd(MODEL, images, labels, 0.05)
    drawn = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert (torch.rand(1), np.random.rand()) == drawn
    assert torch.equal(pgd(MODEL, images, labels, 0.05), one)


def test_a_start_follows_from_the_number_of_the_image():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))  # the same in batches of any size
    images, labels = batch()
    whole = pgd(model, images, labels, 0.5, steps=1, step_size=1e-6)
    parts = [
        pgd(model, images[at], labels[at], 0.5, steps=1, step_size=1e-6, first=at.start)
        for at in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_starts_fill_the_ball():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    images = torch.full((16, 3, 8, 8), 0.5)
    found = pgd(model, images, torch.zeros(16, dtype=torch.int64), 0.1, steps=1, step_size=1e-6)
    shift = (found - images) / 0.1
    assert shift.mean().abs() < 0.03
    assert shift.std() == pytest.approx(3**-0.5, abs=0.02)
    assert len(torch.unique(shift)) > 0.9 * shift.numel()


def test_of_several_restarts_each_image_keeps_the_most_harmful_end():
    images, labels = batch(32)
    model = network().eval()

    def end(restarts: int) -> tuple[Tensor, Tensor]:
        found = pgd(model, images, labels, 0.02, IMAGENET, steps=2, restarts=restarts)
        logits = model(found)
        return logits.argmax(1) != labels, functional.cross_entropy(
            logits, labels, reduction="none"
        )

    (wrong, loss), (worst_wrong, worst_loss) = end(1), end(4)
    assert (worst_wrong >= wrong).all()
    assert (worst_loss >= loss)[worst_wrong == wrong].all()
    assert (worst_loss > loss).any()


# What they leave alone


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_model_is_left_as_it_was(mode):
    model = network().train(mode)
    model.bn2.eval()
    model.head.weight.requires_grad_(False)
    images, labels = batch()
    functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    state, grads = snapshot(model), {name: p.grad for name, p in model.named_parameters()}
    bits = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    modes = [module.training for module in model.modules()]
    both(model, images, labels, IMAGENET)
    assert equal_states(snapshot(model), state)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.requires_grad is (name != "head.weight")
        kept = bits[name]
        assert kept is None or torch.equal(grads[name], kept)  # type: ignore[arg-type]


def test_modes_come_back_after_an_error():
    model = network()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fgsm(model, *batch(), [0.1])
    assert all(module.training for module in model.modules())


def test_the_model_is_attacked_in_evaluation():
    model = network()
    images, labels = batch()
    training = both(model, images, labels, IMAGENET)
    assert all(map(torch.equal, training, both(model.eval(), images, labels, IMAGENET)))


def test_images_and_labels_are_not_changed():
    images, labels = batch()
    images.requires_grad_()
    before = images.detach().clone(), labels.clone()
    found = both(MODEL, images, labels, IMAGENET)
    assert torch.equal(images.detach(), before[0])
    assert torch.equal(labels, before[1])
    assert images.grad is None
    assert not any(adversarial.requires_grad for adversarial in found)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_need_no_gradients_around_them(context):
    images, labels = batch()
    wanted = both(MODEL, images, labels, IMAGENET)
    with context():
        found = both(MODEL, images.clone(), labels.clone(), IMAGENET)
    assert all(map(torch.equal, found, wanted))


def test_a_pruned_model_is_attacked_with_its_mask():
    model = network().eval()
    ck_structured(model.body, "weight", amount=0.5)
    images, labels = batch()
    found = both(model, images, labels, IMAGENET)
    dense = network().eval()
    dense.body.weight.data.copy_(effective_weight(model.body))
    assert all(map(torch.equal, found, both(dense, images, labels, IMAGENET)))


# Formats


def test_the_memory_format_stays():
    images, labels = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    model = network().to(memory_format=torch.channels_last)
    for found in both(model, images, labels, IMAGENET):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.is_contiguous()


def test_channels_last_attacks_the_same_images():
    images, labels = batch(dtype=torch.float64)
    model = network(torch.float64)
    wanted = both(model, images, labels, IMAGENET)
    found = both(
        model.to(memory_format=torch.channels_last),
        images.contiguous(memory_format=torch.channels_last),
        labels,
        IMAGENET,
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attacks_within_its_rounding(dtype):
    images, labels = batch(64)
    half, halved = network().eval().to(dtype), images.to(dtype)
    clean = loss_of(half, halved, labels)
    for found in both(half, halved, labels, IMAGENET):
        assert found.dtype == dtype
        reach = 0.03 / torch.tensor(STD).view(3, 1, 1)
        rounding = torch.finfo(dtype).eps * found.abs().float()
        assert ((found.float() - halved.float()).abs() <= reach + rounding).all()
        assert loss_of(half, found, labels) > clean


def test_half_precision_without_epsilon_leaves_the_bits():
    images, labels = batch()
    halved = images.bfloat16()
    (found,) = fgsm(network(torch.bfloat16), halved, labels, [0], IMAGENET)
    assert torch.equal(found, halved)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_attacks_run_where_the_images_are():
    device = torch.accelerator.current_accelerator()
    images, labels = batch(dtype=torch.float64)
    wanted = both(network(torch.float64), images, labels, IMAGENET)
    found = both(network(torch.float64).to(device), images.to(device), labels.to(device), IMAGENET)
    assert all(adversarial.device.type == device.type for adversarial in found)  # type: ignore[union-attr]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-9, rtol=0)


# Errors


@pytest.mark.parametrize(
    ("epsilon", "space", "message"),
    [
        (8, PIXELS, r"`epsilon` \(=8\) must be in \[0, 1\] in pixel space: 8 of 255 levels are 8"),
        (-0.1, IMAGENET, r"`epsilon` \(=-0\.1\) must be in \[0, 1\]"),
        (-0.1, NORMALISED, r"`epsilon` \(=-0\.1\) must be a number from 0"),
        (float("inf"), NORMALISED, r"`epsilon` \(=inf\) must be a number from 0"),
        (float("nan"), PIXELS, r"`epsilon` \(=nan\) must be in \[0, 1\]"),
    ],
)
def test_an_epsilon_out_of_range_raises(epsilon, space, message):
    with pytest.raises(ValueError, match=message):
        fgsm(MODEL, *batch(), [0.1, epsilon], space)
    with pytest.raises(ValueError, match=message):
        pgd(MODEL, *batch(), epsilon, space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"`steps` \(=0\) must be at least 1"),
        ({"restarts": 0}, r"`restarts` \(=0\) must be at least 1"),
        ({"step_size": 0.0}, r"`step_size` \(=0\) must be above 0"),
        ({"seed": -1}, r"`seed` \(=-1\) must be at least 0, or None"),
        ({"seed": None, "restarts": 2}, r"`restarts` \(=2\) from the images themselves would all"),
    ],
)
def test_settings_of_pgd_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(MODEL, *batch(), 0.1, **options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(3), r"not torch\.float32 \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), r"not torch\.uint8"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 10), r"each of the 2 images, not \(2, 10\)"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "has 3 channels and the images have 1: give"),
    ],
)
def test_a_batch_that_does_not_fit_raises(images, labels, message):
    with pytest.raises(ValueError, match=message):
        fgsm(MODEL, images, labels, [0.1], IMAGENET)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            [0.5],
            [0.5, 0.5],
            r"`mean` \(=\[0\.5\]\) and `std` \(=\[0\.5, 0\.5\]\) must have the same",
        ),
        ([0.5], [0.0], r"`std` \(=\[0\.0\]\) must be above 0"),
    ],
)
def test_a_normalisation_of_unequal_or_zero_numbers_raises(mean, std, message):
    with pytest.raises(ValueError, match=message):
        pixel_space(mean, std)
