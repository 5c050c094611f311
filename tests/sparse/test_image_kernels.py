"""Norms, upsampling and joins equal torch's in every layout, on each instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from starfire_prune.sparse.ir import ChannelNorm, Copy, Mean, Norm, Op, Response, Upsampling, Value
from starfire_prune.sparse.rewriting import channel_norm, global_response
from tests.support.convolutions import Case, value_of
from tests.support.native import ISAS, close, run

pytestmark = pytest.mark.usefixtures("native_kernels", "two_threads")
random_shapes = settings(max_examples=30, deadline=None)
shapes = st.tuples(
    *(st.integers(1, most) for most in (3, 20, 40, 40)),
)
# Weights of convolutions that leave images as they are, and read them in different layouts
READERS = {"tiles": (1, 1), "planes": (3, 1), "phases": (3, 2), "nothing": None}


def reader(images: Tensor, kind: str) -> Case | None:
    """A convolution that reads images in a layout; it returns every pixel, or every other one."""
    if READERS[kind] is None:
        return None
    size, stride = READERS[kind]  # type: ignore[misc]
    channels = images.shape[1]
    weight = torch.zeros(channels, channels, size, size)
    weight[:, :, size // 2, size // 2] = torch.eye(channels)
    padding = (size // 2, size // 2)
    return Case(images, weight, torch.zeros(channels), (stride, stride), padding, (1, 1), 1)


def run_before(ops: list[Op], inputs: dict[Value, Tensor], expected: Tensor, kind: str, isa: int):
    """Whether the last op, followed by a reader of its output, has the expected output."""
    output, case = ops[-1].output.root, reader(expected, kind)
    if case is not None:
        expected = case.expected()
        following = value_of(expected)
        ops = [*ops, case.op(output, following, case.window(expected))]
        output = following
    return close(run(ops, inputs, output, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(shape=shapes, kind=st.sampled_from(list(READERS)), seed=st.integers(0, 99))
def test_layer_norms_over_channels_equal_torchs(isa, shape, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    images = 3 + torch.randn(shape, generator=generator)
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    op = ChannelNorm(
        *(value_of(images), value_of(images)),
        scale=weight.double().numpy(),
        shift=bias.double().numpy(),
        epsilon=1e-3,
    )
    expected = channel_norm(images.double(), weight.double(), bias.double(), 1e-3).float()
    assert run_before([op], {op.source: images}, expected, kind, isa)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(
    shape=shapes,
    factors=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kind=st.sampled_from(list(READERS)),
)
def test_upsampling_equals_torchs(isa, shape, factors, kind):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(shape[2]))
    expected = images.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    op = Upsampling(value_of(images), value_of(expected))
    assert run_before([op], {op.source: images}, expected, kind, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_upsampling_of_wide_images_equals_torchs(isa):
    images = torch.randn(1, 2, 3, 1100, generator=torch.Generator().manual_seed(0))
    op = Upsampling(value_of(images), Value(2, 6, 2200))
    expected = functional.interpolate(images, scale_factor=2)
    assert run_before([op], {op.source: images}, expected, "phases", isa)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(shape=shapes, tiled=st.booleans())
def test_means_norms_and_responses_equal_torchs(isa, shape, tiled):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(shape[3]))
    source, inputs, ops = value_of(images), {}, []
    inputs[source] = images
    if tiled:
        case = reader(images, "tiles")
        assert case is not None
        ops.append(case.op(source, value_of(images), case.window(images)))
        source = ops[-1].output
    for kind, dtype in ((Mean, torch.float64), (Norm, torch.float64)):
        numbers = Value(shape[1])
        expected = images.to(dtype).mean((2, 3), True)
        if kind is Norm:
            expected = torch.linalg.vector_norm(images.to(dtype), dim=(2, 3), keepdim=True)
        chain: list[Op] = [*ops, kind(source, numbers)]
        scale = float(images.abs().max() + expected.abs().max())
        assert close(run(chain, inputs, numbers, isa), expected.float(), scale)
        response = Value(shape[1])
        chain.append(Response(numbers, response, epsilon=0.5))
        if kind is Norm:
            assert close(run(chain, inputs, response, isa), global_response(expected, 0.5).float())


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(shape=shapes, kind=st.sampled_from(list(READERS)), first=st.integers(0, 5))
def test_values_are_computed_where_they_are_joined(isa, shape, kind, first):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(first))
    source, channels = value_of(images), shape[1]
    joined = Value(2 * channels + first, *source.size)
    parts = [value_of(images) for _ in range(2)]
    for part, at in zip(parts, (first, first + channels), strict=True):
        part.whole, part.first = joined, at
    rest = Value(first, *source.size)
    ops: list[Op] = [Copy(source, parts[0], low=0.0), Copy(parts[0], parts[1], residual=source)]
    inputs, tensors = {source: images}, []
    if first:
        tensors = [torch.ones(shape[0], first, *shape[2:])]
        inputs[rest] = tensors[0]
        ops.append(Copy(rest, joined))
    tensors += [images.relu(), images.relu() + images]
    assert run_before(ops, inputs, torch.cat(tensors, 1), kind, isa)
