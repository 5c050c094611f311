"""Inputs that sparse inference refuses, however it is called, and values at the edge."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import sparse
from starfire_prune.sparse import BuildError, load_kernels, program_format
from starfire_prune.sparse.ops import sparse_inference
from starfire_prune.utils.errors import TraceError

pytestmark = pytest.mark.usefixtures("native_kernels")

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = IMAGES[..., :8, :8]


class Net(nn.Module):
    """A convolution, followed by a function."""

    def __init__(self, function: Callable[..., Tensor] = lambda x: x) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Any, *others: Any) -> Tensor:
        images = images[0] if isinstance(images, list) else images
        return self.function(self.convolution(images), *others)


def same(function: Callable[[Tensor], Tensor], images: Tensor = IMAGES) -> bool:
    model = Net(function)
    compiled = sparse.compile(model, images)
    assert compiled.segments
    with torch.no_grad():
        return torch.allclose(compiled(images), model(images), atol=1e-5, equal_nan=True)


# Inputs


def test_images_of_another_size_are_refused_in_a_list():
    compiled = sparse.compile(Net(), ([IMAGES],))
    assert torch.equal(compiled([IMAGES]), compiled([IMAGES]))
    with pytest.raises(ValueError, match=r"input 0 has the shape \(1, 3, 8, 8\), but the model"):
        compiled([SMALL])
    with pytest.raises(TypeError, match="there must be 1 inputs, as in the example, not 2"):
        compiled([IMAGES, IMAGES])


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
@pytest.mark.parametrize("way", ["segment", "trace", "operation"])
def test_images_of_another_size_are_refused_below_the_model(way):
    compiled = sparse.compile(Net(), IMAGES)
    segment = compiled.segments[0]
    call: Any = {
        "segment": segment,
        "trace": torch.jit.trace(compiled, IMAGES) if way == "trace" else None,  # type: ignore[no-untyped-call]
        "operation": lambda x: sparse_inference(
            [x], segment.program, segment.constants, segment.output_shapes
        ),
    }[way]
    call(IMAGES)
    with pytest.raises(
        (ValueError, RuntimeError), match="do not have the shapes that the model is"
    ):
        call(SMALL)


def test_another_number_of_inputs_than_the_programs_is_refused():
    segment = sparse.compile(Net(), IMAGES).segments[0]
    with pytest.raises(ValueError, match="do not have the shapes that the model is compiled for"):
        sparse_inference(
            [IMAGES, IMAGES], segment.program, segment.constants, segment.output_shapes
        )


def test_inputs_that_are_not_tensors_must_equal_the_examples():
    model = Net(lambda x, doubles: x * 2 if doubles else x)
    compiled = sparse.compile(model, (IMAGES, True))
    assert torch.allclose(compiled(IMAGES, True), model(IMAGES, True), atol=1e-5)
    with pytest.raises(ValueError, match=r"input 1 \(=False\) must be True, as in the example"):
        compiled(IMAGES, False)


def test_a_model_that_was_moved_is_refused():
    compiled = sparse.compile(Net(), IMAGES)
    compiled.to("meta")
    with pytest.raises(ValueError, match=r"of Long on meta\) is not a program of these kern"):
        compiled(IMAGES)


def test_autocast_changes_nothing():
    model = Net(lambda x: functional.conv2d(functional.silu(x), torch.ones(4, 4, 1, 1)))
    compiled = sparse.compile(model, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(IMAGES)
    assert output.dtype == torch.float32
    assert torch.equal(output, compiled(IMAGES))


def test_views_of_outputs_in_another_memory_format_copy():
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert same(lambda x: x.permute(0, 2, 3, 1).view(1, 32, -1), images)


def test_operations_that_depend_on_strides_are_refused():
    model = nn.Sequential(Net(lambda x: x.as_strided((1, 16), (4096, 1))))
    text = "`aten.as_strided.default` in 0 reads its input by the strides that it has in torch, "
    with pytest.raises(TraceError, match=text):
        sparse.compile(model, IMAGES)


# Values


@pytest.mark.parametrize(
    "other", [lambda x: x > 0, lambda x: x.sign().int(), lambda x: x.half() * 0]
)
def test_sums_with_other_dtypes_run_on_torch(other):
    assert same(lambda x: x + other(x))


@pytest.mark.parametrize("bounds", [(-1e40, 1e40), (None, 1e308)])
def test_bounds_beyond_float32_are_infinite(bounds):
    bounded = sparse.compile(Net(lambda x: x.clamp(*bounds)), IMAGES)
    assert bounded.segments
    assert torch.equal(bounded(IMAGES), sparse.compile(Net(), IMAGES)(IMAGES))


@pytest.mark.parametrize("bounds", [(0.5, -0.5), (0, -1), (-0.1, 0.2)])
def test_any_bounds_are_those_of_torch(bounds):
    assert same(lambda x: functional.max_pool2d(x.clamp(*bounds), 3, 1, 1))


@pytest.mark.parametrize("place", [0, 1, 9, 17])
def test_max_pooling_passes_nans_on(place):
    images = torch.randn(1, 3, 12, 12)
    images[..., place % 12, place % 5] = torch.nan
    assert same(lambda x: functional.max_pool2d(x, 3, 2, 1), images)


def test_images_too_large_for_32_bits_run_on_torch(monkeypatch):
    monkeypatch.setattr("starfire_prune.sparse.supported.MAX_IMAGE_FLOATS", 100)
    assert sparse.compile(Net(), IMAGES).segments == []


@pytest.mark.parametrize(("limit", "segments"), [(14 * 16 * 3, 1), (14 * 16 * 3 - 1, 0)])
def test_the_padding_counts_to_the_size_of_an_image(monkeypatch, limit, segments):
    monkeypatch.setattr("starfire_prune.sparse.supported.MAX_IMAGE_FLOATS", limit)
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    assert len(sparse.compile(convolution, torch.rand(1, 3, 12, 12)).segments) == segments


# The operation


def test_the_operation_follows_torchs_rules():
    segment = sparse.compile(Net(), IMAGES).segments[0]
    arguments = ([IMAGES], segment.program, segment.constants, segment.output_shapes)
    torch.library.opcheck(torch.ops.starfire_prune.sparse_inference.default, arguments)


def test_incomplete_output_shapes_are_refused():
    segment = sparse.compile(Net(), IMAGES).segments[0]
    with pytest.raises(ValueError, match="output_shapes are incomplete"):
        sparse_inference([IMAGES], segment.program, segment.constants, [4, 4])


# The format that C++ and Python share


def test_both_languages_have_the_same_format():
    assert torch.ops.starfire_prune.program_format() == program_format.FORMAT


@pytest.mark.parametrize("name", ["MAX_ROWS", "sizeof(Spatial)", "offsetof(RegisterTile, start)"])
def test_a_library_of_another_format_is_not_loaded(monkeypatch, name):
    monkeypatch.setitem(program_format.FORMAT, name, 99)
    load_kernels.cache_clear()
    with pytest.raises(BuildError) as info:
        load_kernels()
    native = torch.ops.starfire_prune.program_format()[name]
    assert f"{name} is {native} in the native kernels and 99 in Python" in str(info.value)


def test_constants_that_one_language_lacks_are_an_error():
    with pytest.raises(BuildError, match="AVERAGE is None in the native kernels and 0"):
        program_format.check_format({})
