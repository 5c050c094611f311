"""Checks of what is quantized, and of the result: pruned weights are zero in int8 too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization.origin import origin_of
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.utils.errors import PruningError, QuantizationError

__all__ = ["LayerZeros", "check_masks", "check_model", "checked_batches"]


@dataclasses.dataclass(frozen=True)
class LayerZeros:
    """The zeros of a quantized layer.

    Attributes:
        pruned: Number of weights that the mask prunes; all of them are zero.
        zeros: Number of int8 weights that are zero: the pruned ones, and small ones by rounding.
        total: Number of weights.
    """

    pruned: int
    zeros: int
    total: int


def check_masks(
    module: fx.GraphModule, masks: Mapping[str, Tensor] | None = None
) -> dict[str, LayerZeros]:
    """Count the zeros of a quantized model's layers, and check that pruned weights are among them.

    Args:
        module: A quantized model.
        masks: Masks of pruned weights by parameter name, bool, True = kept; by default those of
            the model that was quantized.

    Returns:
        The numbers by the name of the parameter, of all quantized layers.

    Raises:
        PruningError: If a pruned weight is not zero, with the layer and their number.
        QuantizationError: If a mask is of a weight that the model does not have.
    """
    masks = origin_of(module).masks if masks is None else masks
    weights = {name: weight.values for name, weight in read_scheme(module).weights.items()}
    state = module.state_dict()
    counts = {}
    for name in dict.fromkeys((*weights, *masks)):
        values, mask = weights.get(name, state.get(name)), masks.get(name)
        if values is None or (mask is not None and mask.shape != values.shape):
            raise QuantizationError(
                f"a mask is of {name}, which the model does not have in this shape"
            )
        if mask is not None and (alive := int(torch.count_nonzero(values[~mask]))):
            raise PruningError(f"{name}: {alive} pruned weights are not zero after quantization")
        if name in weights:
            pruned = 0 if mask is None else mask.numel() - int(mask.sum())
            zeros = values.numel() - int(torch.count_nonzero(values))
            counts[name] = LayerZeros(pruned, zeros, values.numel())
    return counts


def check_model(model: nn.Module) -> None:
    """Raise QuantizationError unless all floats of a model are finite float32 on the CPU."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if tensor.device.type != "cpu":
            raise QuantizationError(
                f"{name} is on {tensor.device}: quantize the model on the CPU (`model.cpu()`)"
            )
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise QuantizationError(
                f"{name} is {tensor.dtype}: quantize the model in single precision "
                f"(`model.float()`)"
            )
        if not bool(tensor.isfinite().all()):
            raise QuantizationError(f"{name} contains NaN or infinite numbers")


def checked_batches(batches: Iterable[object]) -> Iterator[Tensor]:
    """The images of batches, one by one.

    Args:
        batches: Tensors of images, or tuples and lists whose first item is such a tensor.

    Raises:
        QuantizationError: If there is no image, or a batch can't be used; it gives the batch.
    """
    shape: tuple[int, ...] | None = None
    for index, batch in enumerate(batches):
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if problem := _problem(images, shape):
            raise QuantizationError(f"batch {index} of `batches` {problem}")
        if isinstance(images, Tensor) and len(images):
            shape = tuple(images.shape[1:])
            yield images
    if shape is None:
        raise QuantizationError(
            "`batches` has no images: quantization needs some hundred to find the ranges of "
            "activations"
        )


def _problem(images: object, shape: tuple[int, ...] | None) -> str | None:
    """What is wrong with a batch, as the predicate of a sentence."""
    if not isinstance(images, Tensor) or images.dim() < 2:
        kind = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else None
        return f"is {kind or type(images).__name__}, not a tensor of images (N, C, H, W)"
    if shape is not None and tuple(images.shape[1:]) != shape:
        return f"has images of shape {tuple(images.shape[1:])}, unlike {shape} before"
    if images.device.type != "cpu" or images.dtype != torch.float32:
        return f"is {images.dtype} on {images.device}; images must be torch.float32 on the CPU"
    if not bool(images.isfinite().all()):
        return "contains NaN or infinite numbers"
    return None
