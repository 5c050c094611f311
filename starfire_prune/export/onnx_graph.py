"""What is done to an ONNX model's graph: batch norms are folded, notes of its making go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Weights", "fold_batch_norms", "strip_notes"]


Array = npt.NDArray[Any]
_NOTES = ("doc_string", "metadata_props")


class Weights:
    """The initializers of a graph as arrays, by name."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._numpy, self._graph = onnx.numpy_helper, graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def __contains__(self, name: str) -> bool:
        """Whether there is one of that name."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._tensors)

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return sum(len(tensor.raw_data) for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> Array:
        """The array of that name."""
        array: Array = self._numpy.to_array(self._tensors[name])
        return array

    def replace(self, name: str, array: Array) -> None:
        """Give an initializer other values of its shape and type, or add one."""
        if name not in self._tensors:
            self._tensors[name] = self._graph.initializer.add()
        self._tensors[name].CopyFrom(self._numpy.from_array(array, name))

    def keep(self, names: set[str]) -> None:
        """Remove all others."""
        kept = [tensor for tensor in self._graph.initializer if tensor.name in names]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}


def fold_batch_norms(graph: Any, weights: Weights) -> int:
    """Fold each batch norm into the convolution that it alone reads, in place.

    A kernel is multiplied by its channel's `scale / sqrt(variance + epsilon)`: what is zero stays
    so. Those that follow anything else, as in a DenseNet, stay.

    Args:
        graph: of an ONNX model in eval mode.
        weights: of this graph.

    Returns:
        How many were folded.
    """
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    made_by = {name: node for node in graph.node for name in node.output}
    uses = _uses(graph)
    folded = 0
    for norm in norms:
        convolution = made_by.get(norm.input[0])
        if convolution is None or not _is_foldable(convolution, norm, weights, uses):
            continue
        _fold(convolution, norm, weights)
        graph.node.remove(norm)
        folded += 1
    weights.keep(set(_uses(graph)))
    return folded


def strip_notes(part: Any) -> None:
    """Take away the exporter's notes, which hold stack traces with paths of this machine.

    Args:
        part: a model or any part of one; the parts within, such as inner graphs and functions,
            lose their notes too.
    """
    for field, value in part.ListFields():
        if field.name in _NOTES:
            part.ClearField(field.name)
        elif field.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                strip_notes(inner)


def _uses(graph: Any) -> dict[str, int]:
    """How many nodes or outputs read each value, those of inner graphs included."""
    uses: dict[str, int] = {}
    for name in _read(graph):
        uses[name] = uses.get(name, 0) + 1
    return uses


def _read(graph: Any) -> Iterator[str]:
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _read(inner)


def _is_foldable(convolution: Any, norm: Any, weights: Weights, uses: dict[str, int]) -> bool:
    own = (*convolution.input[1:], *norm.input[1:])
    return (
        convolution.op_type == "Conv"
        and uses[norm.input[0]] == 1
        and uses[convolution.input[1]] == 1
        and all(name in weights for name in own)
    )


def _fold(convolution: Any, norm: Any, weights: Weights) -> None:
    weight = weights[convolution.input[1]]
    scale, shift, mean, variance = (weights[name].astype(np.float64) for name in norm.input[1:])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    shape = (-1, *(1,) * (weight.ndim - 1))
    bias = weights[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else 0.0
    scaled = np.where(weight == 0, 0.0, weight * factor.reshape(shape)).astype(weight.dtype)
    weights.replace(convolution.input[1], scaled)
    name = f"{convolution.input[1].removesuffix('.weight')}.folded_bias"
    weights.replace(name, ((bias - mean) * factor + shift).astype(weight.dtype))
    del convolution.input[2:]
    convolution.input.append(name)
    convolution.output[0] = norm.output[0]
