"""Activations equal torch's, alone and as part of every operation, on each instruction set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from starfire_prune.sparse.ir import Copy, Linear, Pooling, Value
from starfire_prune.sparse.layout import Window
from starfire_prune.sparse.program_format import Activation
from tests.support.convolutions import Case, convolutions, value_of
from tests.support.native import ISAS, close, run

pytestmark = pytest.mark.usefixtures("native_kernels", "two_threads")
random_shapes = settings(max_examples=30, deadline=None)


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.HARD_SWISH: functional.hardswish,
    Activation.HARD_SIGMOID: functional.hardsigmoid,
    Activation.SIGMOID: torch.sigmoid,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: gelu_tanh,
}
activations = st.sampled_from(list(FUNCTIONS))


def activated(values: Tensor, activation: Activation, isa: int) -> Tensor:
    """The activations of a vector of numbers."""
    image = values.reshape(1, 1, 1, -1)
    source, output = value_of(image), value_of(image)
    op = Copy(source, output, activation=activation)
    return run([op], {source: image}, output, isa).reshape(-1)


def test_all_activations_are_compared():
    assert set(FUNCTIONS) == set(Activation) - {Activation.NO_ACTIVATION}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_equal_torchs_in_double_precision(isa, activation):
    values = torch.cat([torch.linspace(-30, 30, 20011), torch.linspace(-1, 1, 5000) * 1e-3])
    expected = FUNCTIONS[activation](values.double())
    errors = (activated(values, activation, isa) - expected).abs()
    # Where a result is close to zero, the error is relative to the input, as torch's own
    scale = values.double().abs() if "GELU" in activation.name else 0.0
    assert float((errors / (expected.abs() + scale).clamp(min=1e-30)).max()) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_infinities_and_nans_become_what_they_become_in_torch(isa, activation):
    other_nan = torch.tensor([0x7FC00123], dtype=torch.int32).view(torch.float32)
    values = torch.tensor([float("-inf"), float("nan"), 1e30, -1e30, 89.0, -89.0])
    values = torch.cat([values, other_nan, torch.zeros(1)])
    expected = FUNCTIONS[activation](values.double()).float()
    found = activated(values, activation, isa)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    above = activated(torch.tensor([float("inf")]), activation, isa)
    assert float(above) == (1.0 if "SIGMOID" in activation.name else float("inf"))


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(case=convolutions(), activation=activations, adds=st.booleans())
def test_activations_are_part_of_a_convolution(isa, case, activation, adds):
    expected = case.expected()
    source, output = value_of(case.images), value_of(expected)
    window, inputs, options = case.window(expected), {source: case.images}, {}
    if window.is_pointwise and window.stride != (1, 1):
        return
    if adds:
        added = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        options["residual"] = value_of(added)
        inputs[options["residual"]] = added
        expected = expected + added
    op = case.op(source, output, window, activation=activation, **options)
    result = run([op], inputs, output, isa)
    assert close(result, FUNCTIONS[activation](expected), scale=float(expected.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 3, 18])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_activations_are_part_of_a_linear_layer(isa, batch, density):
    torch.manual_seed(0)
    features, weight, bias = torch.randn(batch, 20), torch.randn(37, 20), torch.randn(37)
    weight *= density
    source, output = Value(20), Value(37)
    parts: dict[str, Any] = {"weight": weight.double().numpy(), "bias": bias.double().numpy()}
    op = Linear(source, output, activation=Activation.SILU, **parts)
    result = run([op], {source: features}, output, isa)
    expected = functional.silu(functional.linear(features, weight, bias))
    assert close(result[:, :, 0, 0], expected)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40)),
    gated=st.booleans(),
    scaled=st.booleans(),
    tiled=st.booleans(),
    activation=st.sampled_from(list(Activation)),
)
def test_products_sums_and_activations_are_part_of_a_copy(
    isa, image, gated, scaled, tiled, activation
):
    generator = torch.Generator().manual_seed(image[2])
    batch, channels, height, width = image
    images, added = (torch.randn(image, generator=generator) for _ in range(2))
    factor = torch.randn(batch, channels, *([1, 1] if gated else [height, width]))
    scale, shift = torch.ones(channels), torch.zeros(channels)
    if scaled:
        scale, shift = (torch.randn(channels, generator=generator) for _ in range(2))
    source, output, residual, gate = (value_of(x) for x in (images, images, added, factor))
    options: dict[str, Any] = {"residual": residual, "activation": activation, "factor": gate}
    if scaled:
        options |= {"scale": scale.double().numpy(), "shift": shift.double().numpy()}
    ops: list[Any] = [Copy(source, output, **options)]
    expected = images * factor * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + added
    largest = float(expected.abs().max())
    if activation != Activation.NO_ACTIVATION:
        expected = FUNCTIONS[activation](expected)
    if tiled:  # read by a 1x1 convolution, and computed by one
        identity = torch.eye(channels).view(channels, channels, 1, 1)
        for place, value in ((0, source), (1, output)):
            case = Case(images, identity, torch.zeros(channels), (1, 1), (0, 0), (1, 1), 1)
            other = value_of(images)
            pair = (other, value) if place == 0 else (value, other)
            ops.insert(place * len(ops), case.op(*pair, case.window(images)))
            source, output = (other, output) if place == 0 else (source, other)
    result = run(ops, {source: images, residual: added, gate: factor}, output, isa)
    assert close(result, expected, scale=largest)


@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_part_of_pooling(isa):
    images = torch.randn(2, 3, 9, 21, generator=torch.Generator().manual_seed(0))
    expected = functional.max_pool2d(images, 2, 1)
    source, output = value_of(images), value_of(expected)
    window = Window((2, 2), (1, 1), (1, 1), (0, 0), (0, 0))
    options: dict[str, Any] = {"fill": -float("inf"), "scale": None}
    op = Pooling(source, output, window=window, activation=Activation.SILU, **options)
    result = run([op], {source: images}, output, isa)
    assert close(result, functional.silu(expected))
