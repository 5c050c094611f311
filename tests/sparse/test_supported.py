"""Which operations run natively, by which names, and which run on torch."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import sparse
from tests.support.sparse_networks import NARROW, difference, images, sparse_network

pytestmark = pytest.mark.usefixtures("native_kernels")
Function = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
TOLERANCE = 1e-4  # of the largest output
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


class Calls(nn.Module):
    """Functions of convolutions of the images, one each."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functions = functions
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1) for _ in functions])

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        pairs = zip(self.layers, self.functions.items(), strict=True)
        return {name: function(layer(x)) for layer, (name, function) in pairs}


CHANNELS = torch.linspace(-1, 2, 8)
EIGHT, FOUR = torch.linspace(0, 2, 8), torch.linspace(0, 1, 4)
POINTS, WINDOWS = (torch.linspace(-1, 1, 16 * n * n).view(4, 4, n, n) for n in (1, 3))
FROM_JOINED = POINTS.repeat(1, 3, 1, 1)
FOUR_BY_EIGHT = torch.linspace(-1, 1, 32).view(4, 8)
BIAS = torch.linspace(1, 0, 8).view(1, -1, 1, 1)
NATIVE: dict[str, Function] = {
    "bounds that are whole numbers": lambda y: y.clamp(0, 1),
    "only an upper bound": lambda y: y.clamp(max=1),
    "only a lower bound": lambda y: y.clamp_min(-0.5),
    "an upper bound by its own name": lambda y: torch.clamp_max(y, max=0.5),
    "bounds by another name": lambda y: y.clip(-0.5, 0.5),
    "a lower bound above the upper one": lambda y: y.clamp(0.5, -0.5),
    "default bounds of hardtanh": functional.hardtanh,
    "default bounds of relu6": lambda y: functional.relu6(y + y + y + y + y + y),
    "bounds of bounds": lambda y: functional.hardtanh(y).relu(),
    "a value read by its third name too": lambda y: (y.clone().clone().relu(), y),
    "a value added to itself": lambda y: y + y,
    "a value joined to its own activation": lambda y: torch.cat([y, y.relu()], 1),
    "a value returned twice": lambda y: (y, y),
    "the mean as an image and as a vector": lambda y: (y.mean((-2, -1)), y.mean((2, 3), True)),
    "the mean over columns and rows": lambda y: y.mean((3, 2)),
    "one pixel of each channel": lambda y: functional.adaptive_avg_pool2d(y, 1),
    "means of as many windows": lambda y: functional.adaptive_avg_pool2d(y, (16, 8)),
    "as many windows as pixels": lambda y: (functional.adaptive_avg_pool2d(y, 32).relu(), y),
    "features of all pixels": lambda y: y.flatten(1).relu(),
    "pooling that looks beyond the image": lambda y: functional.max_pool2d(y, 3, 2, ceil_mode=True),
    "pooling whose taps are apart": lambda y: functional.max_pool2d(y, 3, 2, 1, 2),
    "means of windows": lambda y: functional.avg_pool2d(y, (3, 2)),
    "a number added": lambda y: (y + 1, 2 - y),
    "products with numbers and constants": lambda y: 3 * y / 2 * CHANNELS.view(-1, 1, 1),
    "sums with constants": lambda y: (CHANNELS[:, None, None] - y).relu() + 0.5 * y,
    "a product of two images": lambda y: (y * y.relu(), y * y),
    "a product with numbers for each channel": lambda y: y.mean((2, 3), True) * y,
    "a product of vectors": lambda y: y.mean((2, 3)) * y.mean((2, 3)).relu(),
    "a gated sum": lambda y: (y * y.mean((2, 3), True) + y).relu(),
    "a sum and a product in one": lambda y: torch.addcmul(BIAS, CHANNELS.view(1, -1, 1, 1), y),
    "a gate of linear layers": lambda y: y * y.mean((2, 3)).sigmoid().view(-1, 8, 1, 1),
    "activations of convolutions": lambda y: functional.gelu(y),
    "activations of activations": lambda y: functional.hardswish(functional.silu(y)).relu(),
    "activations of vectors": lambda y: torch.sigmoid(y.mean((2, 3))),
    "activations of pooled images": lambda y: functional.hardsigmoid(functional.max_pool2d(y, 3)),
    "halves of the channels": lambda y: tuple(y.chunk(2, 1)),
    "parts joined in another order": lambda y: torch.cat([y[:, 3:], y.relu(), y[:, :3]], 1),
    "parts joined as they were": lambda y: (
        torch.cat([*torch.split(y.relu(), [2, 1, 5], 1), y], 1) + 1
    ),
    "a join of joins": lambda y: torch.cat([torch.cat([y.relu(), y.sigmoid()], 1), y.relu()], 1),
    "parts added to convolutions": lambda y: torch.cat(
        [
            functional.conv2d(y[:, :4], POINTS) + y[:, 4:],
            functional.conv2d(y[:, 4:], POINTS).relu() + y[:, :4],
        ],
        1,
    ),
    "parts added to larger convolutions": lambda y: functional.conv2d(
        torch.cat(
            [
                functional.conv2d(y[:, :4], WINDOWS, padding=1) + y[:, 4:],
                y[:, :4].relu() + y[:, 4:],
                y[:, :4],
            ],
            1,
        ),
        FROM_JOINED,
    ),
    "a part read as an image": lambda y: functional.max_pool2d(y[:, -4:-1], 3, 1, 1),
    "a part as features": lambda y: y[:, 2:5].flatten(1),
    "a part of a join as features": lambda y: (lambda z: torch.cat([z, z + 1], 1).flatten(1))(y),
    "larger images": lambda y: functional.interpolate(y, scale_factor=(2, 3)),
    "larger images of a given size": lambda y: functional.interpolate(y, (64, 32)).relu(),
    "a layer norm over channels": lambda y: functional.layer_norm(
        y.permute(0, 2, 3, 1), (8,), CHANNELS, EIGHT
    ).permute(0, 3, 1, 2),
    "linear layers of pixels": lambda y: functional.gelu(
        functional.linear(y.permute(0, 2, 3, 1), FOUR_BY_EIGHT, FOUR)
    ).permute(0, 3, 1, 2),
    "norms of channels": lambda y: torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True),
    "gelu by tanh": lambda y: functional.gelu(y, approximate="tanh"),
}
ON_TORCH: dict[str, Function] = {
    "a sum with a factor": lambda y: torch.add(y, y.relu(), alpha=2),
    "sums with a constant image": lambda y: y + torch.ones(8, 32, 32),
    "products with numbers for each pixel": lambda y: y * y.mean((2, 3), True)[:, :1],
    "a number divided": lambda y: 1 / (y * y + 1),
    "every other channel": lambda y: y[:, ::2],
    "rows": lambda y: y[:, :, 3:9],
    "larger images by other means": lambda y: functional.interpolate(
        y, scale_factor=2, mode="bilinear"
    ),
    "images larger by a part": lambda y: functional.interpolate(y, scale_factor=1.5),
    "channels last": lambda y: y.permute(0, 2, 3, 1),
    "a layer norm over images": lambda y: functional.layer_norm(y, y.shape[1:]),
    "sums of absolute values": lambda y: torch.linalg.vector_norm(y, 1, (2, 3), keepdim=True),
    "batches joined": lambda y: torch.cat([y, y], 0),
    "means with padding": lambda y: functional.avg_pool2d(y, 3, 2, 1),
    "means at the edge": lambda y: functional.avg_pool2d(y, 3, 2, ceil_mode=True),
    "means of channels": lambda y: y.mean(1),
    "means in double precision": lambda y: y.mean((2, 3), dtype=torch.float64),
    "pixels to batches": lambda y: y.view(-1, 8 * 32),
    "bounds that are tensors": lambda y: torch.clamp_min(y, y),
    "means of unequal windows": lambda y: functional.adaptive_avg_pool2d(y, (5, 32)),
    "means of rows": lambda y: y.mean((3,)),
    "two pixels of each channel": lambda y: functional.adaptive_avg_pool2d(y, 2),
}


@pytest.fixture(scope="module")
def native_calls() -> tuple[Calls, sparse.CompiledModel]:
    model = Calls(NATIVE).eval()
    return model, sparse.compile(model, images())


@pytest.fixture(scope="module")
def torch_calls() -> tuple[Calls, sparse.CompiledModel]:
    model = Calls(ON_TORCH).eval()
    return model, sparse.compile(model, images())


@pytest.mark.parametrize("name", NATIVE)
def test_supported_operations_equal_torch(native_calls, name):
    model, compiled = native_calls
    with torch.no_grad():
        close(compiled(images())[name], model(images())[name])
    assert compiled.torch_operations == []


@pytest.mark.parametrize("name", ON_TORCH)
def test_unsupported_operations_run_on_torch(torch_calls, name):
    model, compiled = torch_calls
    with torch.no_grad():
        close(compiled(images())[name], model(images())[name])
    assert len(compiled.torch_operations) >= len(ON_TORCH)


class InvertedResidual(nn.Module):
    """MobileNetV2's block, with its bounds called as functions."""

    def __init__(self) -> None:
        super().__init__()
        wide, deep, narrow = (8, 32, 1), (32, 32, 3, 1, 1, 1, 32), (32, 8, 1)
        self.layers = nn.ModuleList([nn.Conv2d(*sizes) for sizes in (wide, deep, narrow)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (32, 32, 8)])

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.norms[0](self.layers[0](x)))
        y = functional.relu6(self.norms[1](self.layers[1](y)), inplace=True)
        z: Tensor = self.norms[2](self.layers[2](y))
        return x + z


def mobilenetv2_of_functions() -> nn.Module:
    stem, blocks = nn.Conv2d(3, 8, 3, 2, 1), [InvertedResidual() for _ in range(2)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize("build", [mobilenetv2_of_functions, NARROW["vgg16_bn"]])
def test_networks_of_bounds_and_means_run_in_one_call(build):
    model = sparse_network(build, dtype=torch.float32)
    compiled = sparse.compile(model, images(size=64))
    assert compiled.torch_operations == []
    assert len(compiled.segments) == 1
    assert difference(model, compiled, images(size=64)) < TOLERANCE


def gated_network(activation: type[nn.Module]) -> nn.Module:
    """timm's EfficientNet or MobileNetV3, narrow, with three blocks that gate their channels."""
    blocks = [["ds_r1_k3_s1_c8_se0.25"], ["ir_r2_k5_s2_e4_c12_se0.25"]]
    gate = partial(
        SqueezeExcite, gate_layer=nn.Hardsigmoid if activation is nn.Hardswish else nn.Sigmoid
    )
    return EfficientNet(  # type: ignore[no-any-return]
        decode_arch_def(blocks),
        num_classes=10,
        num_features=32,
        stem_size=16,
        norm_layer=nn.BatchNorm2d,
        act_layer=activation,
        se_layer=gate,
    )


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish])
def test_networks_of_gated_blocks_run_in_one_call(activation):
    model = sparse_network(partial(gated_network, activation), dtype=torch.float32)
    compiled = sparse.compile(model, images())
    assert compiled.torch_operations == []
    assert len(compiled.segments) == 1
    assert difference(model, compiled, images()) < TOLERANCE
