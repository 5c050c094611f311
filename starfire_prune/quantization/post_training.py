"""Quantization after training: scales are calibrated on images, and the weights rounded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from importlib.metadata import version

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization import torchao
from starfire_prune.quantization.assembling import assemble
from starfire_prune.quantization.checks import check_masks, check_model, checked_batches
from starfire_prune.quantization.exporting import exported_module
from starfire_prune.quantization.origin import Origin, model_on_meta, pruned_weights, set_origin
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import QuantizationError
from starfire_prune.utils.marks import check_finished

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    *,
    reduced_range: bool = False,
    unfinished: bool = False,
) -> fx.GraphModule:
    """A copy of a model whose convolutions and linear layers have int8 weights and uint8 inputs.

    It quantizes as torchao's `X86InductorQuantizer` does. Batch norms are folded into the layers
    before them. Weights are int8 in [-127, 127], with a scale for each output channel and without
    zero points, so pruned weights are exactly zero. Inputs are uint8, with one scale and zero point
    per tensor, found from histograms of the calibration. Biases are float32. The inputs of
    poolings, concatenations and residual additions are quantized as well; other operations compute
    in float32.

    The result runs on torch alone, which computes with the dequantized numbers: it gives the
    answers of the int8 model, not its speed.

    Args:
        model: The model, in any phase of pruning, in single precision and on the CPU. It is not
            changed.
        batches: Batches of images (N, C, H, W) as in an evaluation, or tuples that begin with one;
            some hundred training images in all. All images have the same shape.
        reduced_range: Whether inputs are limited to [0, 127], half the steps. Kernels for CPUs
            without VNNI add two products of uint8 and int8 in 16 bits, which can't overflow then
            (2 · 127 · 127 = 32,258).
        unfinished: Whether the pruning may be unfinished.

    Returns:
        The quantized model, a graph in `torch.ops.quantized_decomposed`. Its state has plain
        names: `layer1.0.conv1.weight` (int8), `.weight_scale`, `.bias`.

    Raises:
        QuantizationError: If the model is not in float32 on the CPU, batches are missing or of
            another kind, or numbers are not finite.
        PruningError: If a pruner of the model has not finished (`Pruner.check_finished`).
        TraceError: If `torch.export` can't trace the model for batches of any size.
        ModuleNotFoundError: If torchao is not installed (the extra `quantize`).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> quantized = quantize(model, [torch.rand(16, 3, 8, 8)])
        >>> quantized.state_dict()["0.weight"].dtype
        torch.int8
    """
    check_finished(model, unfinished=unfinished)
    pt2e = torchao.package()
    dense = dense_copy(model).eval()
    check_model(dense)
    images = checked_batches(batches)
    first = next(images)
    module = exported_module(dense, first)
    _check_answers(dense, module, first)
    settings = torchao.quantizer(trains=False, reduced_range=reduced_range)
    torchao.mark_sources(module)
    prepared = pt2e.prepare_pt2e(copy.deepcopy(module), settings)
    count = _calibrate(prepared, itertools.chain((first,), images))
    quantized = assemble(module, read_scheme(torchao.converted(prepared)))
    versions = {name: version(name) for name in ("torch", "torchao")}
    shape, state = tuple(first.shape[1:]), quantized.state_dict()
    masks = {name: mask for name, mask in pruned_weights(dense).items() if name in state}
    origin = Origin(model_on_meta(dense), masks, shape, count, "post_training", versions)
    check_masks(set_origin(quantized, origin))
    return quantized


@torch.no_grad()
def _check_answers(model: nn.Module, module: fx.GraphModule, images: Tensor) -> None:
    """Check that a model's graph computes what the model does."""
    wanted, got = model(images[:1]), module(images[:1])
    if not isinstance(wanted, Tensor):
        raise QuantizationError(
            f"the model returns {type(wanted).__name__}; only models that return one tensor can be "
            f"quantized"
        )
    if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
        raise QuantizationError(
            f"the graph of {type(model).__name__} that torch.export has traced has other outputs "
            f"than the model; it can't be quantized"
        )


@torch.no_grad()
def _calibrate(prepared: fx.GraphModule, batches: Iterable[Tensor]) -> int:
    """Let a model observe the ranges of its activations, and return the number of images."""
    count = 0
    for images in batches:
        if not bool(prepared(images).isfinite().all()):
            raise QuantizationError(
                "the model's outputs of the calibration contain NaN or infinite numbers"
            )
        count += len(images)
    return count
