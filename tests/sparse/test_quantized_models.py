"""Quantized models compute on bytes, and operations that can't do so read floats."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import ck_structured, sparse
from starfire_prune.quantization import quantize
from starfire_prune.sparse.program_format import (
    HEADER_FIELDS,
    OPERATION_FIELDS,
    SLOT_FIELDS,
    VIEW_FIELDS,
    Opcode,
)
from tests.support.sparse_networks import NARROW

pytestmark = pytest.mark.usefixtures("native_kernels")
quantized = torch.ops.quantized_decomposed  # registered by starfire_prune.quantization


def rounded(x: Tensor, scale: float = 2.0**-5, zero_point: int = 128) -> Tensor:
    """A tensor in uint8 and back, as quantization leaves it in a graph."""
    how = (scale, zero_point, 0, 255, torch.uint8)
    result: Tensor = quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *how), *how)
    return result


class Layer(nn.Module):
    """A convolution with an int8 weight."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int, size: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (outputs, inputs, size, size), generator=generator)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scales", torch.rand(outputs, generator=generator) / 2**11 + 2**-14)
        self.register_buffer("zeros", torch.zeros(outputs, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(outputs, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        how = (0, -127, 127, torch.int8)
        weight = quantized.dequantize_per_channel(self.weight, self.scales, self.zeros, *how)
        return functional.conv2d(x, weight, self.bias, padding=weight.shape[2] // 2)


class Graph(nn.Module):
    """Two layers and a function that joins them."""

    def __init__(self, forward: Callable[[Layer, Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = Layer(6, 6), Layer(6, 6, 1, seed=1)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._forward(self.one, self.other, x)
        return result


GRAPHS: dict[str, Callable[[Layer, Layer, Tensor], Tensor]] = {
    "bytes all the way": lambda one, other, x: rounded(other(rounded(one(rounded(x)).relu()))),
    "results in floats": lambda one, other, x: one(rounded(x)),
    "a sum of bytes": lambda one, other, x: rounded(
        (one(rounded(x)) + rounded(other(rounded(x)))).relu()
    ),
    "a sum of bytes in floats": lambda one, other, x: one(rounded(x)) + rounded(other(rounded(x))),
    "a sum in floats of bytes that are read again": lambda one, other, x: torch.cat(
        [one(rounded(x)) + (added := rounded(other(rounded(x)))), added], 1
    ),
    "a sum with floats": lambda one, other, x: rounded(one(rounded(x)) + other(x)),
    "a sum of two layers in floats": lambda one, other, x: rounded(
        one(rounded(x)) + other(rounded(x))
    ),
    "bytes that are read as floats": lambda one, other, x: torch.cat(
        [rounded(one(rounded(x))), x], 1
    ),
    "an input in floats": lambda one, other, x: rounded(one(x)),
    "bounds": lambda one, other, x: rounded(one(rounded(x)).clamp(-1.0, 2.0)),
    "a maximum of bytes": lambda one, other, x: other(
        rounded(functional.max_pool2d(rounded(one(rounded(x))), 2))
    ),
    "a mean of bytes": lambda one, other, x: rounded(one(rounded(x))).mean((2, 3)),
    "an operation on torch": lambda one, other, x: rounded(other(rounded(one(rounded(x)).sin()))),
    "another step": lambda one, other, x: rounded(rounded(one(rounded(x))), 2.0**-4, 100),
}


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_outputs_are_within_a_step_of_torchs(name):
    model = Graph(GRAPHS[name]).eval()
    images = torch.randn(2, 6, 9, 20, generator=torch.Generator().manual_seed(0))
    compiled = sparse.compile(model, images)
    assert compiled.segments
    expected, outputs = model(images), compiled(images)
    # Where torch's sum in floats falls beside the middle between two steps, the byte differs
    differ = ~torch.isclose(outputs, expected, atol=1e-5, rtol=1e-5)
    assert differ.float().mean() < 0.01
    assert float((outputs - expected).abs().max()) <= 2 * 2.0**-4


class Extreme(nn.Module):
    """A linear layer whose sums are as large as they can be for its number of inputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = Layer(inputs, 2, 1)
        self.layer.weight.copy_(torch.tensor([127, -127]).reshape(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(rounded(x, zero_point=0))
        return result


@pytest.mark.parametrize(
    ("inputs", "in_integers"), [(66_311, True), (66_312, False)]
)  # 66,312 * 127 * 255 > 2**31
@torch.no_grad()
def test_sums_that_exceed_int32_are_computed_in_floats(inputs, in_integers):
    model, images = Extreme(inputs).eval(), torch.full((1, inputs, 1, 1), 255 * 2.0**-5)
    compiled = sparse.compile(model, images)
    assert (Opcode.BYTE_LINEAR in opcodes(compiled)) == in_integers
    assert torch.allclose(compiled(images), model(images), rtol=1e-3)


def opcodes(compiled: sparse.CompiledModel) -> list[Opcode]:
    """The operations of the only native part of a model, in their order."""
    (segment,) = compiled.segments
    program = segment.program.tolist()
    found, at = [], HEADER_FIELDS + SLOT_FIELDS * program[1] + VIEW_FIELDS * program[2]
    while at < len(program):
        found.append(Opcode(program[at]))
        at += 1 + OPERATION_FIELDS[found[-1]]
    return found


def test_a_residual_network_leaves_bytes_only_at_its_end():
    model, images = quantized_network("resnet50")
    compiled = sparse.compile(model, images)
    assert compiled.torch_operations == []
    found = opcodes(compiled)
    first, *layers, linear, copy = found
    assert (first, linear, copy) == (Opcode.QUANTIZE, Opcode.BYTE_LINEAR, Opcode.COPY)
    # The mean is rounded to bytes again
    assert layers[-2:] == [Opcode.BYTE_MEAN, Opcode.QUANTIZE]
    assert {*layers[:-2]} == {
        Opcode.BYTE_COPY,
        Opcode.BYTE_POINTWISE,
        Opcode.BYTE_SPATIAL,
        Opcode.BYTE_POOL,
    }


def quantized_network(name: str, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """A narrow network, pruned and quantized, and images for it."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = NARROW[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3 and module.groups == 1:
            ck_structured(module, amount=0.5, block_size=(1, 4))
    images = torch.randn(batch, 3, 64, 64)
    quantized_model: nn.Module = quantize(model, [images])
    return quantized_model, images


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2",
        "resnet18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnext50", "vgg16_bn")),
    ],
)
@torch.no_grad()
def test_networks_give_the_outputs_of_the_quantized_model(name):
    model, images = quantized_network(name)
    compiled = sparse.compile(model, images)
    assert compiled.torch_operations == []
    expected = model(images)
    # Bytes that differ by one step in a layer move the outputs by a little
    assert float((compiled(images) - expected).abs().max() / expected.abs().max()) < 0.05
    one = compiled(images[:1])
    assert torch.equal(one, compiled(images)[:1])


def test_bytes_that_torch_separates_from_their_readers_are_left_to_torch():
    def forward(one: Layer, other: Layer, x: Tensor) -> Tensor:
        first = rounded(one(rounded(x)))
        total: Tensor = other(first) + other(rounded(first.sin()))
        return total

    model, images = Graph(forward).eval(), torch.randn(1, 6, 9, 9)
    assert torch.allclose(sparse.compile(model, images)(images), model(images), atol=0.1)


def test_a_quantized_model_that_is_pickled_computes_the_same():
    model = Graph(GRAPHS["bytes all the way"]).eval()
    images = torch.randn(2, 6, 9, 20)
    compiled = sparse.compile(model, images)
    again = pickle.loads(pickle.dumps(compiled))
    assert torch.equal(again(images), compiled(images))


def test_a_model_that_returns_bytes_runs_on_torch():
    def forward(one: Layer, other: Layer, x: Tensor) -> Tensor:
        how = (2.0**-5, 128, 0, 255, torch.uint8)
        result: Tensor = quantized.quantize_per_tensor(one(rounded(x)), *how)
        return result

    model, images = Graph(forward).eval(), torch.randn(1, 6, 9, 9)
    with pytest.warns(RuntimeWarning, match=r"^the model runs on torch: quantize_per_tensor.* is"):
        compiled = sparse.compile(model, images)
    assert torch.equal(compiled(images), model(images))
    assert compiled.segments == []
    assert "a native part of the model would return or read it" in str(compiled.reason)
