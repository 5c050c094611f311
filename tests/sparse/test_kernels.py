"""The native kernels equal torch for every operation and shape, on each instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from starfire_prune.sparse import pack_rectangles as packing
from starfire_prune.sparse.ir import Copy, Linear, Mean, Op, Pooling, Value
from starfire_prune.sparse.layout import Window, padded, plain, tiles
from starfire_prune.sparse.ops import new_workspace, sparse_inference
from starfire_prune.sparse.pack_pointwise import pack_pointwise
from starfire_prune.sparse.pack_rectangles import pack_rectangles, rectangles
from starfire_prune.sparse.scheduling import schedule
from tests.support.convolutions import (
    BLOCK_SIZES,
    Case,
    convolutions,
    masked,
    seeds,
    value_of,
)
from tests.support.native import ISAS, close, run

pytestmark = pytest.mark.usefixtures("native_kernels", "two_threads")
random_shapes = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(case=convolutions())
def test_convolutions_equal_torchs(isa, case):
    expected = case.expected()
    source, output = value_of(case.images), value_of(expected)
    window, ops = case.window(expected), []
    inputs = {source: case.images}
    if window.is_pointwise and window.stride != (1, 1):
        thinned = Value(source.channels, *output.size)
        ops.append(Copy(source, thinned, stride=window.stride))
        source, window = thinned, window._replace(stride=(1, 1))
    op = case.op(source, output, window)
    assert close(run([*ops, op], inputs, output, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(case=convolutions(), low=st.sampled_from([-1.0, 0.0]), high=st.sampled_from([0.5, 6.0]))
def test_additions_and_bounds_are_part_of_a_convolution(isa, case, low, high):
    expected = case.expected()
    added = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    source, residual, output = (value_of(t) for t in (case.images, added, expected))
    window = case.window(expected)
    if window.is_pointwise and window.stride != (1, 1):
        return
    op = case.op(source, output, window, residual=residual, low=low, high=high)
    result = run([op], {source: case.images, residual: added}, output, isa)
    total = expected + added
    assert close(result, total.clamp(low, high), scale=float(total.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@random_shapes
@given(
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 200),
    image=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(list(BLOCK_SIZES)),
    density=st.sampled_from([0.05, 0.2, 1.0]),
    seed=seeds,
)
def test_chains_of_1x1_and_3x3_convolutions_equal_torchs(
    isa, outputs, inputs, image, kind, density, seed
):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, inputs, *image, generator=generator)
    shapes = [(outputs, inputs, 1, 1), (outputs, outputs, 3, 3), (inputs, outputs, 1, 1)]
    weights = [
        masked(torch.randn(shape, generator=generator), kind, density, generator)
        for shape in shapes
    ]
    values, tensors = [value_of(images)], [images.double()]
    ops: list[Op] = []
    for weight in weights:
        padding = (weight.shape[2] // 2,) * 2
        case = Case(tensors[-1], weight, torch.zeros(len(weight)), (1, 1), padding, (1, 1), 1)
        tensors.append(case.expected().double().relu())
        values.append(value_of(tensors[-1]))
        ops.append(case.op(values[-2], values[-1], case.window(tensors[-1]), low=0.0))
    assert close(run(ops, {values[0]: images}, values[-1], isa), tensors[-1].float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("batch", [1, 3, 4, 17, 33])
def test_linear_layers_equal_torchs(isa, density, batch):
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, 75, generator=generator)
    weight = masked(torch.randn(37, 75, generator=generator), "single", density, generator)
    bias = torch.randn(37, generator=generator)
    source, output = Value(75), Value(37)
    op = Linear(source, output, weight=weight.double().numpy(), bias=bias.double().numpy())
    result = run([op], {source: features}, output, isa)
    assert close(result[:, :, 0, 0], functional.linear(features, weight, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 30), (33, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooling_equals_torchs(isa, size, stride):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) - 2
    expected = functional.max_pool2d(images, 3, stride, 1)
    source, output = value_of(images), value_of(expected)
    case = Case(images, torch.zeros(1, 1, 3, 3), images, (stride,) * 2, (1, 1), (1, 1), 1)
    window = case.window(expected)
    op = Pooling(source, output, window=window, fill=-float("inf"), scale=None)
    assert close(run([op], {source: images}, output, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_means_joins_and_rescaling_equal_torchs(isa):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, n, 5, 19, generator=generator) for n in (3, 4))
    scale, shift = (torch.randn(7, generator=generator) for _ in range(2))
    values = [value_of(one), value_of(other)]
    joined, scaled, mean = Value(7, 5, 19), Value(7, 5, 19), Value(7)
    ops: list[Op] = [
        Copy(values[0], joined),
        Copy(values[1], joined, first=3),
        Copy(joined, scaled, scale=scale.numpy(), shift=shift.numpy(), low=0.0),
        Mean(scaled, mean),
    ]
    expected = torch.cat([one, other], 1) * scale[:, None, None] + shift[:, None, None]
    inputs = dict(zip(values, (one, other), strict=True))
    assert close(run(ops, inputs, mean, isa), expected.relu().mean((2, 3), keepdim=True))


def convolution(
    images: Tensor, outputs: int, size: int, padding: tuple[int, int], stride: int = 1
) -> Case:
    """A convolution with a weight and a bias of ones and more."""
    weight = 1 + torch.rand(outputs, images.shape[1], size, size)
    bias = 1 + torch.rand(outputs)
    return Case(images, weight, bias, (stride, stride), padding, (1, 1), 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", ["mean", "linear"])
def test_windows_over_one_pixel_find_it_after_its_padding(isa, stride, batch, kind):
    torch.manual_seed(0)
    images = torch.rand(batch, 3, *((5, 5) if kind == "mean" else (1, 1)))
    source, pixel = value_of(images), Value(3)
    if kind == "mean":
        pixels, first = images.mean((2, 3), keepdim=True), Mean(source, pixel)
    else:
        pointwise = convolution(images, 3, 1, (0, 0))
        pixels = pointwise.expected()
        first = pointwise.op(source, pixel, pointwise.window(pixels))  # type: ignore[assignment]
    case = convolution(pixels, 4, 3, (1, 1), stride)
    output = value_of(case.expected())
    op = case.op(pixel, output, case.window(case.expected()))
    assert close(run([first, op], {source: images}, output, isa), case.expected())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("height", [7, 56, 57])
@pytest.mark.parametrize("size", [1, 3])
def test_rows_that_are_wider_than_their_image_end_in_the_bias(isa, height, size):
    torch.manual_seed(0)
    images = torch.rand(1, 1, height, 2 + size // 2)
    case = convolution(images, 3, size, (size // 2, 2 + size // 2))
    source, output = value_of(images), value_of(case.expected())
    op = case.op(source, output, case.window(case.expected()))
    assert close(run([op], {source: images}, output, isa), case.expected())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("outputs", "image", "stride"),
    [(1, (30, 41), 1), (5, (30, 41), 2), (40, (30, 41), 1), (530, (15, 14), 1), (100, (7, 7), 1)],
)
def test_input_channels_are_cut_into_tiles(isa, outputs, image, stride, monkeypatch):
    monkeypatch.setattr(packing, "L2_LINE_CYCLES", 1000.0)  # so that tiles are cheaper
    monkeypatch.setattr(packing, "L1_BYTES", 2 * 4096)
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, 31, 3, 3, generator=generator)
    case = Case(
        images=torch.randn(2, 31, *image, generator=generator),
        weight=masked(weight, "single", 0.3, generator),
        bias=torch.randn(outputs, generator=generator),
        stride=(stride, stride),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
    )
    expected = case.expected()
    source, output, residual = value_of(case.images), value_of(expected), value_of(expected)
    window = case.window(expected)
    planes = padded(*source.size, window)
    assert pack_rectangles(case.weight.numpy(), 1, planes, window, rows=4).input_tiles > 1
    op = case.op(source, output, window, residual=residual)
    found = run([op], {source: case.images, residual: expected}, output, isa)
    assert close(found, 2 * expected)


@pytest.mark.parametrize("kept", [0.2, 0.4, 0.6, 1.0])
def test_single_weights_cost_no_more_than_complete_kernels_would(kept):
    """In the scheduler's cost model: complete rectangles are always among its choices."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 8, 9, generator=generator) < kept
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    for size, rows in ((56, 14), (14, 14), (7, 4)):
        geometry = padded(size, size, window)
        costs = packing._Costs(geometry, rows, in_l1=False)
        found = rectangles(geometry, window)
        cover = packing._cheapest_cover(found, mask.numpy(), costs)
        assert cover.cycles <= 64 * sum(costs.cycles(rectangle) for rectangle in found) + 1e-9


@random_shapes
@given(case=convolutions())
def test_rectangles_cover_each_weight_once(case):
    window = case.window(case.expected())
    geometry = padded(case.images.shape[2], case.images.shape[3], window)
    found = [tap for rectangle in rectangles(geometry, window) for tap in rectangle.taps.flat]
    assert sorted(found) == list(range(case.weight[0, 0].numel()))
    packed = pack_rectangles(case.weight.numpy(), case.groups, geometry, window, rows=14)
    assert np.isclose(np.abs(packed.weights).sum(), case.weight.abs().sum())
    assert (packed.runs["count"] > 0).all()


def test_neighbours_that_share_a_mask_share_an_index_list():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    mask = (torch.rand(4, 64, generator=generator) < 0.2).repeat_interleave(4, 0)
    shared = pack_pointwise((weight * mask).numpy(), tile=112)
    assert (shared.index_lists, shared.outputs_per_list) == (1, 4)
    separately = masked(weight, "single", 0.2, generator)
    separate = pack_pointwise(separately.numpy(), tile=112)
    assert (separate.index_lists, separate.outputs_per_list) == (2, 1)
    kept = int((weight * mask != 0).sum())
    assert len(shared.indices) == kept / 4
    assert len(separate.indices) >= int((separately != 0).sum())


@given(st.integers(1, 300), st.integers(1, 300))
def test_tiles_hold_each_pixel_and_are_of_16(height, width):
    geometry = tiles(height, width)
    assert geometry.tile % 16 == 0
    assert 16 <= geometry.tile <= 112
    assert 0 <= geometry.channel - height * width < geometry.tile + 16 * 7
    assert plain(height, width).channel == height * width


def test_numbers_that_are_not_a_program_are_refused():
    with pytest.raises(
        ValueError, match=r"program \(= 9 numbers of .*\) is not a program of these"
    ):
        new_workspace(torch.zeros(9, dtype=torch.int64), 1)


def test_a_workspace_for_fewer_images_is_refused():
    images = torch.rand(2, 3, 5, 5)
    case = convolution(images, 2, 3, (1, 1))
    source, output = value_of(images), value_of(case.expected())
    op = case.op(source, output, case.window(case.expected()))
    program = torch.from_numpy(schedule([op], [source], [output]).to_array())
    empty = torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"workspace \(= \d+ floats\) is too small for 2 images"):
        sparse_inference([images], program, empty, [4, 2, 5, 5], new_workspace(program, 1))
