"""Sparse networks with dead channels, for tests of inference, constants and compaction."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.vgg import VGG
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from starfire_prune import ck_structured

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative to the largest output


def vgg_with_linear_layers() -> nn.Module:
    """The layers of torchvision's VGG-16-BN, narrow, with linear layers on the flattened image."""
    stages = [(8, 8), (12, 12), (16, 16, 16), (16, 16, 16), (16, 16, 24)]
    cfg: Any = [width for widths in stages for width in (*widths, "M")]
    classifier = [nn.Linear(24 * 4, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10)]
    pool = nn.AdaptiveAvgPool2d((2, 2))
    return nn.Sequential(make_layers(cfg, batch_norm=True), pool, nn.Flatten(), *classifier)


def vgg_with_convolutions() -> nn.Module:
    """timm's VGG, whose fully connected layers are convolutions, narrow."""
    cfg = [8, "M", 12, "M", 16, 16, "M"]
    return VGG(cfg, num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01)  # type: ignore[no-any-return]


def mobilenetv2() -> nn.Module:
    """timm's MobileNetV2 with five blocks, narrow."""
    blocks = [["ds_r1_k3_s1_c8"], ["ir_r2_k3_s2_e6_c12"], ["ir_r2_k3_s2_e6_c16"]]
    return EfficientNet(  # type: ignore[no-any-return]
        decode_arch_def(blocks),
        num_classes=10,
        num_features=64,
        stem_size=16,
        norm_layer=nn.BatchNorm2d,
        act_layer=nn.ReLU6,
    )


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **options)


SHORT = (1, 1, 1, 1)
NARROW: dict[str, Callable[[], nn.Module]] = {
    "vgg16_bn": vgg_with_linear_layers,
    "vgg_bn of convolutions": vgg_with_convolutions,
    "resnet18": named("resnet18", channels=(8, 16, 24, 32)),
    "resnet50": named("resnet50", channels=(8, 8, 16, 16), layers=SHORT),
    "resnext50": named(
        "resnext50_32x4d", channels=(16, 16, 32, 32), layers=SHORT, cardinality=4, base_width=32
    ),
    "mobilenetv2": mobilenetv2,
    "densenet121": named("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
}
# For parametrize: the others have the operations of these two as well
NARROW_CASES = [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("resnet50", "vgg_bn of convolutions")
    else name
    for name in NARROW
]
FULL: dict[str, Callable[[], nn.Module]] = {
    name: named(name)
    for name in (
        *("vgg16_bn", "resnet18", "resnet50", "mobilenetv2_100", "resnext50_32x4d"),
        *("densenet121", "efficientnet_b0", "convnext_atto", "regnety_002"),
    )
}


def images(dtype: torch.dtype = torch.float32, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Set batch norms as after some training, and weights that keep the scale of activations."""

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.copy_(1 + 0.2 * normal(module.weight))
            module.bias.copy_(0.5 * normal(module.bias))
            module.running_mean.copy_(0.3 * normal(module.running_mean))
            module.running_var.copy_(0.5 + normal(module.running_var).square())
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(normal(module.weight) * (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.copy_(0.3 * normal(module.bias))


@torch.no_grad()
def sparsify(
    model: nn.Module, generator: torch.Generator, amount: float = 0.8, share: float = 0.3
) -> None:
    """Make about a share of each convolution's output channels dead, and prune by CK, with hooks.

    Channels are scaled down, so that CK prunes their kernels first; those of depthwise convolutions
    are set to zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels > 8:
            chosen = torch.rand(module.out_channels, generator=generator) < share
            depthwise = module.groups == module.in_channels
            module.weight[chosen] *= 0.0 if depthwise else 1e-3
            if not depthwise:
                ck_structured(module, amount=amount)


def sparse_network(
    build: Callable[[], nn.Module],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    amount: float = 0.8,
    share: float = 0.3,
) -> nn.Module:
    """The network that `build` makes, pruned with hooks, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    sparsify(model, generator, amount, share)
    return model


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """The largest difference between two models' outputs, relative to the largest output."""
    expected, output = one(inputs), other(inputs)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.01
    return float((expected - output).abs().max() / expected.abs().max())
