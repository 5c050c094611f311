"""Networks of many families run in one call, with the outputs of the model."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from starfire_prune import sparse
from tests.support.detector import SmallDetector
from tests.support.native import ISAS
from tests.support.sparse_networks import sparse_network

pytestmark = pytest.mark.usefixtures("native_kernels")
TOLERANCE = 1e-4  # of the largest output

ATTO = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}


def named(name: str, **options: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **options)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobilenetv3": (named("mobilenetv3_small_050"), (3, 3, 65, 49)),
    "efficientnet": (named("efficientnet_b0"), (1, 3, 33, 47)),
    "regnet": (named("regnety_002"), (2, 3, 49, 33)),
    "ghostnet": (named("ghostnet_050"), (2, 3, 33, 65)),
    "convnext": (named("convnext_atto", **ATTO), (3, 3, 67, 45)),
    "convnext, channels last": (named("convnext_tiny", **ATTO), (1, 3, 45, 67)),
    "convnextv2": (named("convnextv2_atto", **ATTO), (2, 3, 41, 37)),
    "convnextv2, channels last": (named("convnextv2_tiny", **ATTO), (2, 3, 41, 37)),
    "detector": (SmallDetector, (3, 3, 36, 44)),
}
LARGE = ("efficientnet", "ghostnet", "regnet")
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in FAMILIES]


def network(build: Callable[[], nn.Module]) -> nn.Module:
    """A sparse network whose layer norms and layer scales are as after some training."""
    model = sparse_network(build, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "gamma" in name or "grn" in name:
                parameter.copy_(0.7 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CASES)
def test_networks_run_in_one_call_with_the_models_outputs(name):
    build, shape = FAMILIES[name]
    model, images = network(build), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compiled = sparse.compile(model, images)
    assert compiled.torch_operations == []
    assert len(compiled.segments) == 1
    for isa in ISAS:
        compiled.segments[0].isa = isa
        for output, expected in zip(outputs(compiled, images), outputs(model, images), strict=True):
            assert expected.std() > 0.01
            difference = float((output - expected).abs().max())
            assert difference < TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_passes_through_splits_joins_and_norms(batch):
    for name in ("detector", "convnextv2"):
        build, shape = FAMILIES[name]
        model = network(build)
        compiled = sparse.compile(model, torch.randn(shape))
        images = torch.randn(batch, *shape[1:])
        for output, expected in zip(outputs(compiled, images), outputs(model, images), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
