"""Small compiled models, as programs, that have every operation."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from starfire_prune import ck_structured, sparse
from starfire_prune.quantization import quantize
from starfire_prune.serialization.program import stored_program
from starfire_prune.sparse import emit_bytes, pack_spatial
from starfire_prune.sparse.module import CompiledModel
from tests.support.program_files import Content


class Floats(nn.Module):
    """Convolutions of several sizes, poolings, an addition, a gate and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.one, self.other = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.average = nn.AvgPool2d(2)
        self.layer_norm = nn.LayerNorm(24)
        self.gate, self.wide = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 70, 1)
        self.dense, self.head = nn.Linear(70, 30), nn.Linear(30, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(torch.relu(self.stem(images)))
        y = torch.relu(self.other(torch.relu(self.one(x))) + x)
        z = torch.cat([self.depthwise(y), torch.relu(self.norm(y))], 1)
        z = self.average(z)
        z = z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        z = self.layer_norm(nn.functional.interpolate(z, scale_factor=2.0).permute(0, 2, 3, 1))
        z = z.permute(0, 3, 1, 2)
        features = nn.functional.silu(self.wide(z)).mean((2, 3))
        return self.head(torch.relu(self.dense(features))), z


class Bytes(nn.Module):
    """A network for int8 with a residual block, max-pooling and a strided 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.one, self.other = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 24, 1)
        self.down = nn.Conv2d(24, 20, 1, stride=2)
        self.head = nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(images)))
        y = torch.relu(self.other(torch.relu(self.one(x))) + self.shortcut(x))
        output: Tensor = self.head(torch.relu(self.down(y)).mean((2, 3)))
        return output


def pruned(model: nn.Module, amount: float = 0.6) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
            ck_structured(module, amount=amount)
    return model.eval()


def float_model(size: int = 37) -> tuple[CompiledModel, Tensor]:
    """A compiled model of floats with an example of its input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = pruned(Floats()), torch.randn(2, 3, size, size - 4)
    with torch.no_grad():  # a linear layer that is stored as sparse
        weight = model.get_parameter("dense.weight")
        weight.mul_(torch.rand(weight.shape) < 0.3)
    return sparse.compile(model, images), images


def byte_model(store: Callable[..., object] | None = None) -> tuple[CompiledModel, Tensor]:
    """A compiled int8 model, whose convolutions `store` packs if it is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = pruned(Bytes()), torch.randn(2, 3, 33, 30)
    quantized = quantize(model, [images])
    with mock.patch.object(
        emit_bytes, "pack_byte_spatial", store or pack_spatial.pack_byte_spatial
    ):
        return sparse.compile(quantized, images), images


MODELS: dict[str, Callable[[], tuple[CompiledModel, Tensor]]] = {
    "floats": float_model,
    "wide images": lambda: float_model(150),
    "bytes": byte_model,
    "bytes with shared taps": lambda: byte_model(pack_spatial.shared),
    "bytes with merged quads": lambda: byte_model(pack_spatial.merged),
    "bytes with rectangles": lambda: byte_model(pack_spatial.as_rectangles),
}


def content_of(compiled: CompiledModel) -> Content:
    """What the file of a compiled model holds."""
    stored = stored_program(compiled)
    texts = [
        ";".join(" ".join([name, *map(str, shape)]) for name, shape in side)
        for side in (stored.inputs, stored.outputs)
    ]
    return Content(stored.program, stored.constants, *texts)
