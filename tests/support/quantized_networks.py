"""A small pruned network with a residual block, and int8 inference in integers of NumPy."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from starfire_prune import ck_structured

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ResidualNet(nn.Module):
    """A stem, a block whose shortcut is a convolution, average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8)
            self.conv1 = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False)
            self.bn1 = nn.BatchNorm2d(12)
            self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(12)
            self.shortcut = nn.Sequential(
                nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
            )
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(12, 10)
            norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
                assert norm.running_mean is not None
                assert norm.running_var is not None
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)
                nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        images = self.act(self.bn(self.stem(images)))
        features = self.act(self.bn1(self.conv1(images)))
        features = self.bn2(self.conv2(features))
        features += self.shortcut(images)
        output: Tensor = self.head(self.act(features).mean((2, 3)))
        return output


PRUNED = ("conv1", "conv2", "shortcut.0")


def pruned_net() -> ResidualNet:
    """A network in eval mode whose convolutions after the stem have half their kernels."""
    model = ResidualNet().eval()
    for name in PRUNED:
        ck_structured(model.get_submodule(name), amount=0.5)
    return model


def images(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class IntegerNet:
    """Computes what a quantized `ResidualNet` does, in integers except for scales and biases.

    Args:
        module: The quantized network, of which only the state and the numbers that its operations
            `quantize_per_tensor` have are read.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.state: dict[str, Any] = {
            name: value.numpy() for name, value in module.state_dict().items()
        }
        operation: Any = torch.ops.quantized_decomposed.quantize_per_tensor.default
        nodes = module.graph.find_nodes(op="call_function", target=operation)
        # In the order of execution: the network's input, and the outputs of the stem, of conv1, of
        # the shortcut and of the pooling
        self.steps: list[Any] = [node.args[1:5] for node in nodes]

    def __call__(self, batch: Tensor) -> Floats:
        images, stem, inner, shortcut, pooled = self.steps
        x = self.quantized(batch.numpy().astype(np.float64), images)
        x = self.quantized(relu(self.layer("stem", x, images, padding=1)), stem)
        y = self.quantized(relu(self.layer("conv1", x, stem, padding=1, stride=2)), inner)
        skip = self.quantized(self.layer("shortcut.0", x, stem, stride=2), shortcut)
        skipped = (skip - shortcut[1]) * shortcut[0]
        z = relu(self.layer("conv2", y, inner, padding=1) + skipped).mean((2, 3))
        return self.layer("head", self.quantized(z, pooled)[:, :, None, None], pooled)[:, :, 0, 0]

    @staticmethod
    def quantized(x: Floats, step: Any) -> Integers:
        scale, zero_point, low, high = step
        steps: Integers = np.clip(np.rint(x / scale) + zero_point, low, high).astype(np.int64)
        return steps

    def layer(self, name: str, x: Integers, step: Any, padding: int = 0, stride: int = 1) -> Floats:
        """A convolution of integers whose sums are integers; its padding stands for 0.0."""
        scale, zero_point, *_ = step
        weight = self.state[f"{name}.weight"].astype(np.int64)
        weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
        size = weight.shape[2]
        x = np.pad(x - zero_point, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        rows = range(0, x.shape[2] - size + 1, stride)
        columns = range(0, x.shape[3] - size + 1, stride)
        sums = np.zeros((len(x), len(weight), len(rows), len(columns)), np.int64)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                window = x[:, :, row : row + size, column : column + size]
                sums[:, :, i, j] = np.einsum("nchw,kchw->nk", window, weight)
        scales = self.state[f"{name}.weight_scale"].astype(np.float64) * scale
        bias = self.state[f"{name}.bias"].astype(np.float64)
        outputs: Floats = sums * scales[:, None, None] + bias[:, None, None]
        return outputs


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0)
