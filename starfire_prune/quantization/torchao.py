"""torchao's quantization of exported graphs (PT2E), with the settings that this package uses."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization.names import is_batch_norm
from starfire_prune.quantization.scheme import LARGEST_WEIGHT
from starfire_prune.utils.optional import import_optional

__all__ = ["batch_norm", "converted", "mark_sources", "package", "quantizer"]


_PT2E = "torchao.quantization.pt2e"
_SOURCES: Final[Mapping[str, Any]] = {
    "aten::conv1d": nn.Conv1d,
    "aten::conv2d": nn.Conv2d,
    "aten::linear": nn.Linear,
    "aten::batch_norm": nn.BatchNorm2d,
    "aten::add": operator.add,
    "aten::relu": nn.ReLU,
    "aten::hardtanh": nn.Hardtanh,
    "aten::relu6": nn.ReLU6,
    "aten::hardswish": nn.Hardswish,
    "aten::silu": nn.SiLU,
    "aten::leaky_relu": nn.LeakyReLU,
    "aten::tanh": nn.Tanh,
    "aten::gelu": nn.GELU,
}


def package(module: str = "quantize_pt2e") -> Any:
    """A module of torchao's PT2E; without a name the package itself.

    Raises:
        ModuleNotFoundError: If torchao is missing, with the command that installs it.
    """
    with _without_notices():
        return import_optional(f"{_PT2E}.{module}".rstrip("."), "quantize", "quantization")


def quantizer(*, trains: bool, reduced_range: bool) -> Any:
    """The quantizer of convolutions, linear layers and additions, as x86 kernels compute them.

    Activations are uint8 with one scale per tensor, weights int8 in [-127, 127] with one scale per
    output channel. torchao's own settings allow -128, and no scale below 2**-12, which would round
    the weights of some channels to few values.

    Args:
        trains: Whether the model is trained with quantization.
        reduced_range: Whether activations are limited to [0, 127].
    """
    observers, fakes = package("observer"), package("fake_quantize")
    kinds, x86 = package("quantizer"), package("quantizer.x86_inductor_quantizer")
    if trains:
        activation = fakes.FusedMovingAvgObsFakeQuantize
        # Not the fused one, which divides by 127.5 where conversion divides by 127
        weight = fakes.FakeQuantize.with_args(
            observer=observers.MovingAveragePerChannelMinMaxObserver
        )
    else:
        activation, weight = observers.HistogramObserver, observers.PerChannelMinMaxObserver
    activations = kinds.QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=127 if reduced_range else 255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=activation,
    )
    weights = kinds.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-LARGEST_WEIGHT,
        quant_max=LARGEST_WEIGHT,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=weight,
    )
    config = x86.QuantizationConfig(activations, activations, weights, None, trains)
    return x86.X86InductorQuantizer().set_global(config)


def converted(prepared: fx.GraphModule) -> fx.GraphModule:
    """The quantized graph of a model that was calibrated after training; the model is changed.

    Where batch norms are left, which no layer precedes, torchao would look for those of training.
    That traces a hundred patterns in half a minute, so such batch norms are hidden from it.
    """
    for node in prepared.graph.nodes:
        if is_batch_norm(node):
            node.target = batch_norm
    prepared.recompile()
    return package().convert_pt2e(prepared, fold_quantize=False)  # type: ignore[no-any-return]


def batch_norm(*arguments: Any) -> Tensor:
    """`aten.batch_norm` under another target, but of the same name."""
    normalized: Tensor = torch.ops.aten.batch_norm.default(*arguments)
    return normalized


def mark_sources(module: fx.GraphModule) -> None:
    """Note for each operation which module it could come from, as torchao's quantizer looks for it.

    It joins the calls of one module, such as an activation that a block calls twice, and then does
    not know where they end. Here each operation is a call of its own.
    """
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        source = _SOURCES.get("" if schema is None else schema.name.rstrip("_"), node.target)
        if source is operator.add and not all(isinstance(read, fx.Node) for read in node.args[:2]):
            source = node.target  # a number that is added is not quantized
        node.meta["source_fn_stack"] = [(node.name, source)]


@contextmanager
def _without_notices() -> Iterator[None]:
    """Ignore warnings at torchao's import, which are about parts of it that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
