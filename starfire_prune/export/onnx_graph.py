"""Changes to an ONNX graph: batch norms are folded, and what the exporter gets wrong is mended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "Weights",
    "fold_batch_norms",
    "remove_false_biases",
    "spell_out_constants",
    "strip_debug_data",
]


Array = npt.NDArray[Any]
_DEBUG_FIELDS = ("doc_string", "metadata_props")
_PARTS = ("graph", "node", "functions", "attribute", "g", "graphs")  # fields that contain nodes


class Weights:
    """The initializers of a graph as arrays, by name."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._numpy, self._graph = onnx.numpy_helper, graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def __contains__(self, name: str) -> bool:
        """Whether there is an initializer of that name."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(len(tensor.raw_data) for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> Array:
        """The array of that name."""
        array: Array = self._numpy.to_array(self._tensors[name])
        return array

    def replace(self, name: str, array: Array) -> None:
        """Replace an initializer by one of the same shape and type, or add one."""
        if name not in self._tensors:
            self._tensors[name] = self._graph.initializer.add()
        self._tensors[name].CopyFrom(self._numpy.from_array(array, name))

    def keep(self, names: set[str]) -> None:
        """Remove all initializers with other names."""
        kept = [tensor for tensor in self._graph.initializer if tensor.name in names]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}


def fold_batch_norms(graph: Any, weights: Weights) -> int:
    """Fold batch norms into the convolutions before them, in place.

    A kernel is multiplied by its channel's `scale / sqrt(variance + epsilon)`, so zeros remain
    zeros. A batch norm is kept if it does not directly follow a convolution, as in a DenseNet, or
    something else reads the convolution, too.

    Args:
        graph: Graph of an ONNX model in eval mode.
        weights: The weights of this graph.

    Returns:
        The number of batch norms that were folded.
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


def remove_false_biases(graph: Any, weights: Weights) -> None:
    """Remove biases of zeros that have a wrong shape, in place.

    The exporter gives such a bias, `(out, 2)`, to convolutions in three dimensions without a bias.
    """
    removed = set()
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 2:
            name = node.input[2]
            if name in weights and weights[name].ndim != 1 and not weights[name].any():
                del node.input[2:]
                removed.add(name)
    weights.keep(set(weights) - removed.difference(_uses(graph)))


def spell_out_constants(onnx: Any, part: Any) -> None:
    """Store the numbers and texts of constants as tensors, in place.

    Short forms such as `value_ints` are valid ONNX, but not all of ONNX Runtime's tools read them.

    Args:
        onnx: The module `onnx`.
        part: A model or any part of one, with the graphs inside.
    """
    if getattr(part, "op_type", None) == "Constant":
        for attribute in part.attribute:
            if attribute.name.startswith("value_"):
                tensor = _constant_tensor(onnx, attribute)
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    for field, value in part.ListFields():
        if field.message_type is not None and field.name in _PARTS:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                spell_out_constants(onnx, inner)


def _constant_tensor(onnx: Any, attribute: Any) -> Any:
    """The tensor of an attribute `value_…`."""
    kinds, value = onnx.TensorProto, onnx.helper.get_attribute_value(attribute)
    types = {"int": kinds.INT64, "float": kinds.FLOAT, "string": kinds.STRING}
    kind = types[attribute.name.removeprefix("value_").removesuffix("s")]
    is_list = attribute.name.endswith("s")
    values, dims = (list(value), [len(value)]) if is_list else ([value], [])
    return onnx.helper.make_tensor("", kind, dims, values)


def strip_debug_data(part: Any) -> None:
    """Remove doc strings and metadata, where the exporter writes stack traces with local paths.

    Args:
        part: A model or any part of one; inner parts, such as graphs and functions, are stripped,
            too.
    """
    for field, value in part.ListFields():
        if field.name in _DEBUG_FIELDS:
            part.ClearField(field.name)
        elif field.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                strip_debug_data(inner)


def _uses(graph: Any) -> dict[str, int]:
    """How many nodes and outputs read each value, including those of inner graphs."""
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
