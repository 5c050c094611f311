"""Gradients masked where they arise, in their own memory where it is nobody else's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune.engine import gradients
from starfire_prune.engine.gradients import mask_gradient


@pytest.fixture(params=["in place", "out of place"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's counts of references, and without."""
    if request.param == "out of place":
        monkeypatch.setattr(gradients, "_counts", lambda _: None)
    way: str = request.param
    return way


def masked(weight: Tensor) -> Tensor:
    """The mask of a weight that is masked from now on."""
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    mask_gradient(weight, mask)
    return mask


def convolve(weight: Tensor) -> Any:
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return functional.conv2d(images, weight).pow(2).sum()


def weight_of(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)))


def test_the_gradient_is_what_it_was_where_the_mask_keeps_it_and_zero_elsewhere():
    weight, free = weight_of(0), weight_of(0)
    mask = masked(weight)
    for _ in range(2):  # the second one is added
        convolve(weight).backward()
        convolve(free).backward()
    assert weight.grad is not None
    assert free.grad is not None
    assert torch.equal(weight.grad, free.grad * mask)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_gradient_stays_in_its_memory(layout, way, monkeypatch):
    layer = nn.Conv2d(16, 16, 3).to(memory_format=layout)
    masked(layer.weight)
    in_place, multiply = [], Tensor.mul_

    def counting(own: Tensor, other: Tensor) -> Tensor:
        in_place.append(own)
        return multiply(own, other)

    monkeypatch.setattr(Tensor, "mul_", counting)
    layer(torch.rand(1, 16, 6, 6).to(memory_format=layout)).pow(2).sum().backward()
    assert len(in_place) == (way == "in place")


def sums(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return {
        "plain": first + second,
        "flat": (first.flatten() + second.flatten()).view_as(first),
        "views": (first.view(4, -1) + second.view(4, -1)).view_as(first),
    }


@pytest.mark.parametrize("kind", ["plain", "flat", "views"])
def test_the_gradient_of_another_tensor_that_shares_its_memory_is_left_alone(kind):
    weight, other = weight_of(0), weight_of(1)
    mask = masked(weight)
    convolve(sums(weight, other)[kind]).backward()
    free, expected = weight_of(0), weight_of(1)
    convolve(sums(free, expected)[kind]).backward()
    assert weight.grad is not None
    assert free.grad is not None
    assert torch.equal(weight.grad, free.grad * mask)
    assert other.grad is not None
    assert expected.grad is not None
    assert torch.equal(other.grad, expected.grad)


def test_a_gradient_that_an_earlier_hook_has_kept_is_left_alone():
    kept: list[Tensor] = []
    weight, free = weight_of(0), weight_of(0)
    weight.register_hook(kept.append)  # type: ignore[no-untyped-call]
    masked(weight)
    convolve(weight).backward()
    convolve(free).backward()
    assert free.grad is not None
    assert torch.equal(kept[0], free.grad)


def test_gradients_that_are_asked_for_are_masked_too():
    weight = weight_of(0)
    mask = masked(weight)
    (gradient,) = torch.autograd.grad(convolve(weight), weight, create_graph=True)
    assert not gradient[~mask].any()
    assert gradient[mask].all()
    total: Any = gradient.sum()
    total.backward()
    assert weight.grad is not None
    assert not weight.grad[~mask].any()


def test_what_runs_after_the_gradient_is_there_finds_it_masked():
    weight, seen = weight_of(0), []
    weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda own: seen.append(own.grad.clone())
    )
    mask = masked(weight)
    convolve(weight).backward()
    assert not seen[0][~mask].any()


def test_a_hook_that_is_taken_off_masks_no_more():
    weight = weight_of(0)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask_gradient(weight, mask).remove()
    convolve(weight).backward()
    assert weight.grad is not None
    assert weight.grad.any()


def test_what_was_accumulated_before_is_masked_too():
    weight = weight_of(0)
    convolve(weight).backward()
    mask = masked(weight)
    assert weight.grad is not None
    assert weight.grad[mask].all()
    assert not weight.grad[~mask].any()


def test_a_frozen_weight_is_masked_once_it_requires_gradients():
    weight = weight_of(0).requires_grad_(False)
    mask = masked(weight)
    assert not weight.requires_grad
    weight.requires_grad_(True)
    convolve(weight).backward()
    assert weight.grad is not None
    assert not weight.grad[~mask].any()


def test_masking_takes_no_random_numbers():
    gradients._counts_alone.cache_clear()
    before = torch.get_rng_state()
    masked(weight_of(0))
    assert torch.equal(torch.get_rng_state(), before)
