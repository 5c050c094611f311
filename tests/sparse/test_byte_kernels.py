"""The kernels for quantized values give exactly the integers, on each instruction set."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from starfire_prune.sparse import emit_bytes, pack_rectangles, pack_taps
from starfire_prune.sparse.ir import (
    Convolution,
    Copy,
    Dequantize,
    Linear,
    Mean,
    Op,
    Pooling,
    Quantization,
    Quantize,
    Value,
)
from starfire_prune.sparse.layout import padded
from starfire_prune.sparse.pack_quads import is_narrow, quads_of
from starfire_prune.sparse.pack_spatial import as_rectangles, merged, pack_byte_spatial, shared
from tests.support.convolutions import Case, convolutions, seeds
from tests.support.native import run

ISAS = (128, 256, 257, 512)  # 257: AVX2 with VNNI
LOWEST, HIGHEST = -128, 127

pytestmark = pytest.mark.usefixtures("native_kernels", "two_threads")
random_shapes = settings(max_examples=40, deadline=None)
# Powers of two, so that the bytes of inputs and outputs are found from floats without rounding
steps = st.sampled_from([2.0**-n for n in (0, 3, 6)])
bytes_ = st.integers(0, 255)
quantizations = st.builds(Quantization, steps, bytes_)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tensor of bytes and how they stand for floats."""

    values: Tensor
    quantization: Quantization

    @property
    def floats(self) -> Tensor:
        difference = self.values.double() - self.quantization.zero_point
        return (difference * self.quantization.scale).float()

    def value(self) -> Value:
        return quantized_value(self.values, self.quantization)


def quantized_value(tensor: Tensor, how: Quantization | None) -> Value:
    channels, height, width = tensor.shape[1:]
    return Value(channels, height, width, how)


def random_bytes(shape: tuple[int, ...], how: Quantization, seed: int) -> Bytes:
    """Random bytes, of which one in five is 0 and one in five 255."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-64, 320, shape, generator=generator).clamp(0, 255)
    return Bytes(values.to(torch.uint8), how)


def random_weight(shape: tuple[int, ...], kept: Tensor, largest: int, seed: int) -> NDArray[Any]:
    """Random weights in int8, zero where `kept` is, with both ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2 * largest, 2 * largest, shape, generator=generator)
    weight = values.clamp(-largest - 1 if largest == HIGHEST else -largest, largest)
    return (weight * (kept != 0)).to(torch.int8).numpy()


def compute(op: Op, inputs: list[Bytes], isa: int) -> Tensor:
    """The output of an op in floats; inputs that it reads as bytes are quantized from floats."""
    values = [op.source, *([] if op.residual is None else [op.residual])]
    floats = [
        value if value.quantization is None else Value(*each.values.shape[1:])
        for value, each in zip(values, inputs, strict=True)
    ]
    ops: list[Op] = [Quantize(f, v) for f, v in zip(floats, values, strict=True) if f is not v]
    output = op.output
    window = op.window if isinstance(op, Convolution) else None
    if window and window.is_pointwise and window.stride != (1, 1):
        thinned = Value(op.source.channels, *output.size, op.source.quantization)
        ops.append(Copy(op.source, thinned, stride=window.stride))
        window = window._replace(stride=(1, 1))
        op = dataclasses.replace(op, source=thinned, window=window)  # type: ignore[call-arg]
    ops.append(op)
    if op.output.quantization is not None:
        output = Value(op.output.channels, *op.output.size)
        ops.append(Dequantize(op.output, output))
    tensors = {value: each.floats for value, each in zip(floats, inputs, strict=True)}
    return run(ops, tensors, output, isa)


def fused(factor: Any, other: Any, summand: Any) -> NDArray[np.float32]:
    """The product of floats plus another one, rounded once."""
    product = np.asarray(factor, np.longdouble) * np.asarray(other, np.longdouble)
    return (product + np.asarray(summand, np.longdouble)).astype(np.float32)


def channelwise(vector: NDArray[Any]) -> NDArray[np.float32]:
    return vector.astype(np.float32).reshape(-1, 1, 1)


def oracle(op: Any, sums: Tensor, added: Bytes | None) -> NDArray[Any]:
    """The results of int32 sums (N, K, H, W), bytes or floats, straight from the definition."""
    source, output = op.source.quantization, op.output.quantization
    weights = op.weight.reshape(len(op.weight), -1).astype(np.int64).sum(1)
    scale = source.scale * op.weight_scale
    shift = op.bias - scale * source.zero_point * weights
    bounds = (op.low, op.high)
    if output is not None:
        scale, shift = scale / output.scale, shift / output.scale + output.zero_point
        bounds = tuple(np.clip(np.array(bounds) / output.scale + output.zero_point, 0, 255))
    residual: Any = 0.0
    if added is not None and output is None:
        residual = added.floats.numpy()
    elif added is not None:
        ratio = added.quantization.scale / output.scale
        shift = shift - added.quantization.zero_point * ratio
        residual = np.float32(ratio) * added.values.numpy().astype(np.float32)
    values = fused(sums.numpy().astype(np.float32), channelwise(scale), channelwise(shift))
    values = fused(1.0, residual, values)
    values = np.clip(values, *bounds)
    return values if output is None else np.rint(values)


def sums_of(case: Case, images: Bytes, weight: NDArray[Any]) -> Tensor:
    """The sums of products of bytes and weights; images are padded with their zero point."""
    above, left = case.padding
    padded = functional.pad(
        images.values.double(), (left, left, above, above), value=images.quantization.zero_point
    )
    kernel = torch.from_numpy(weight).double()
    return functional.conv2d(padded, kernel, None, case.stride, 0, case.dilation, case.groups)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Convolution, Case, list[Bytes]]:
    """A convolution of bytes, and its inputs."""
    case, seed = draw(convolutions()), draw(seeds)
    images = random_bytes(tuple(case.images.shape), draw(quantizations), seed)
    largest = draw(st.sampled_from([1, 63, HIGHEST]))
    weight = random_weight(tuple(case.weight.shape), case.weight, largest, seed)
    rng = np.random.default_rng(seed)
    shape = tuple(case.expected().shape)
    output = quantized_value(case.expected(), draw(st.none() | quantizations))
    inputs = [images]
    residual = None
    if draw(st.booleans()):
        inputs.append(random_bytes(shape, draw(quantizations), seed + 1))
        how = inputs[1].quantization if output.quantization else None
        residual = quantized_value(inputs[1].values, how)
    op = Convolution(
        images.value(),
        output,
        residual,
        *draw(st.sampled_from([(-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)])),
        weight=weight,
        weight_scale=rng.integers(1, 128, len(weight)) / draw(st.sampled_from([64, 4096])),
        bias=rng.integers(-64, 64, len(weight)) / 4,
        groups=case.groups,
        window=case.window(case.expected()),
    )
    return op, case, inputs


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(layer=layers())
def test_convolutions_give_the_integers(isa, layer):
    op, case, inputs = layer
    result = compute(op, inputs, isa)
    sums = sums_of(case, inputs[0], op.weight)
    expected = oracle(op, sums, inputs[1] if len(inputs) > 1 else None)
    quantization = op.output.quantization
    if quantization is not None:
        expected = (expected - quantization.zero_point) * quantization.scale
    assert torch.equal(result, torch.from_numpy(expected).float())


def test_a_layer_is_narrow_up_to_the_range_of_int16():
    pair = np.array([[64, 64, 0, 0]], np.int8)
    assert is_narrow(quads_of(pair, 1), 255)  # 128 * 255 = 32,640
    assert not is_narrow(quads_of(pair + np.array([1, 0, 0, 0], np.int8), 1), 255)
    assert is_narrow(quads_of(np.array([[HIGHEST, -HIGHEST, 0, 0]], np.int8), 1), 127)
    assert not is_narrow(quads_of(np.array([[0, 0, LOWEST, 1]], np.int8), 1), 255)


def test_channels_of_one_byte_each_are_not_paired_with_other_groups():
    depthwise = np.full((8, 1, 3, 3), LOWEST, np.int8)
    quads = quads_of(depthwise, 8)
    assert quads.shape == (8, 2, 3, 3)
    assert is_narrow(quads, 255)


def convolution_in_blocks(
    images: Bytes, block: tuple[int, int], stride: int, outputs: int = 10, dilation: int = 1
) -> tuple[Convolution, Tensor]:
    """A 3x3 convolution of which 20 % are kept, in blocks of outputs and inputs, and its sums."""
    channels = images.values.shape[1]
    rng = np.random.default_rng(1)
    mask = rng.random((outputs, channels, 1, 1)) < 0.2
    for axis, side in enumerate(block):
        first = range(0, mask.shape[axis], side)
        mask = np.repeat(np.take(mask, first, axis), side, axis)[:outputs, :channels]
    weight = (rng.integers(LOWEST, HIGHEST, (*mask.shape[:2], 3, 3)) * mask).astype(np.int8)
    kernel = torch.from_numpy(weight).float()
    strides, dilations = (stride,) * 2, (dilation,) * 2
    case = Case(images.floats, kernel, torch.zeros(outputs), strides, dilations, dilations, 1)
    expected = case.expected()
    op = Convolution(
        images.value(),
        Value(*expected.shape[1:]),
        weight=weight,
        weight_scale=np.ones(outputs),
        bias=np.zeros(outputs),
        groups=1,
        window=case.window(expected),
    )
    return op, expected


WAYS = [(as_rectangles, (1, 4)), (shared, (4, 4)), (merged, (4, 1))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("image", [(14, 14), (7, 6), (9, 30)], ids=str)
@pytest.mark.parametrize(("way", "block"), WAYS)
def test_each_way_to_store_weights_gives_the_integers(
    isa, way, block, image, stride, tiled, monkeypatch
):
    if tiled:
        monkeypatch.setattr(pack_rectangles, "L2_LINE_CYCLES", 1000.0)  # so that tiles are cheaper
        for module in (pack_rectangles, pack_taps):
            monkeypatch.setattr(module, "L1_BYTES", 4096)
    monkeypatch.setattr(emit_bytes, "pack_byte_spatial", way)
    images = random_bytes((2, 90, *image), Quantization(1.0, 3), 0)
    op, expected = convolution_in_blocks(images, block, stride)
    packed = way(op, padded(image[0], image[1], op.window)).weights
    assert packed.input_tiles > 1 or not tiled
    assert torch.equal(compute(op, [images], isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dilation", [8, 9, 20])
@pytest.mark.parametrize(("way", "block"), WAYS)
def test_taps_reach_columns_beyond_the_next_register(isa, way, block, dilation, monkeypatch):
    monkeypatch.setattr(emit_bytes, "pack_byte_spatial", way)
    images = random_bytes((1, 20, 5, 60), Quantization(1.0, 3), 0)
    op, expected = convolution_in_blocks(images, block, stride=1, dilation=dilation)
    assert torch.equal(compute(op, [images], isa), expected)


@pytest.mark.parametrize(("way", "block"), WAYS)
@pytest.mark.parametrize("size", [7, 14])
def test_weights_are_stored_as_their_blocks_suggest(way, block, size):
    images = random_bytes((1, 256, size, size), Quantization(1.0, 3), 0)
    op, _ = convolution_in_blocks(images, block, stride=1, outputs=64)
    geometry = padded(size, size, op.window)
    packed, expected = pack_byte_spatial(op, geometry), way(op, geometry)
    assert packed.weights.shared == expected.weights.shared
    assert (packed.merged is None) == (expected.merged is None)
    assert len(packed.weights.weights) == len(expected.weights.weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("weight", [64, HIGHEST, LOWEST])
def test_products_of_the_largest_numbers_do_not_saturate(isa, size, weight):
    how = Quantization(1.0, 0)
    images = Bytes(torch.full((1, 64, 9, 9), 255, dtype=torch.uint8), how)
    output = Value(8, 9 - size + 1, 9 - size + 1)
    kernel, bias = torch.zeros(8, 64, size, size), torch.zeros(8)
    case = Case(images.floats, kernel, bias, (1, 1), (0, 0), (1, 1), 1)
    op = Convolution(
        images.value(),
        output,
        weight=np.full((8, 64, size, size), weight, np.int8),
        weight_scale=np.ones(8),
        bias=np.zeros(8),
        groups=1,
        window=case.window(case.expected()),
    )
    assert (compute(op, [images], isa) == 255 * weight * 64 * size**2).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("features", "outputs"), [(4, 3), (75, 37), (513, 10)])
def test_linear_layers_give_the_integers(isa, batch, features, outputs):
    source = random_bytes((batch, features, 1, 1), Quantization(2.0**-6, 77), 0)
    kept = torch.ones(outputs, features)
    op = Linear(
        source.value(),
        Value(outputs),
        weight=random_weight((outputs, features), kept, HIGHEST, 1),
        weight_scale=np.arange(1, outputs + 1) / 256,
        bias=np.arange(outputs) / 4,
    )
    sums = source.values[:, :, 0, 0].double() @ torch.from_numpy(op.weight).double().T
    expected = oracle(op, sums[:, :, None, None], None)
    assert torch.equal(compute(op, [source], isa), torch.from_numpy(expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 30), (33, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooling_gives_the_largest_byte(isa, size, stride):
    images = random_bytes((2, 6, *size), Quantization(1.0, 100), 0)
    expected = functional.max_pool2d(images.floats, 3, stride, 1)
    kernel, bias = torch.zeros(1, 1, 3, 3), torch.zeros(1)
    case = Case(images.floats, kernel, bias, (stride, stride), (1, 1), (1, 1), 1)
    output = quantized_value(expected, images.quantization)
    window = case.window(expected)
    op = Pooling(images.value(), output, window=window, fill=-float("inf"), scale=None)
    assert torch.equal(compute(op, [images], isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 40), (14, 14)], ids=str)
def test_means_are_those_of_the_floats(isa, size):
    images = random_bytes((3, 10, *size), Quantization(0.5, 100), 0)
    expected = images.floats.double().mean((2, 3), keepdim=True).float()
    assert torch.equal(compute(Mean(images.value(), Value(10)), [images], isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_floats_are_rounded_to_the_nearest_byte_and_saturate(isa):
    how = Quantization(0.25, 10, 2, 200)
    numbers = torch.tensor([0.0, 0.124, 0.125, 0.375, -0.125, -1.9, -2.1, 47.4, 47.6, 1e30, -1e30])
    images = numbers.repeat(1, 5, 3, 4)
    source, middle, output = Value(5, 3, 44), Value(5, 3, 44, how), Value(5, 3, 44)
    ops: list[Op] = [Quantize(source, middle), Dequantize(middle, output)]
    steps_ = torch.round(images.double() / 0.25).clamp(2 - 10, 200 - 10)  # ties to even
    assert torch.equal(run(ops, {source: images}, output, isa), (steps_ * 0.25).float())
