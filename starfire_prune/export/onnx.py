"""ONNX files that keep a model's zeros and are checked against torch in ONNX Runtime.

Batch norms are folded here, on request, by scaling kernels, so that zeros remain zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from starfire_prune.export.onnx_graph import (
    Array,
    Weights,
    fold_batch_norms,
    remove_false_biases,
    spell_out_constants,
    strip_debug_data,
)
from starfire_prune.export.onnx_model import INPUT, exported_model, name_outputs
from starfire_prune.quantization.origin import is_quantized
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import ExportError
from starfire_prune.utils.files import checked_file, move_file
from starfire_prune.utils.marks import check_finished, is_finished
from starfire_prune.utils.modules import effective_weight, prunable_layers, weight_key
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.outputs import compare_outputs, rounding

__all__ = ["EXTERNAL_FROM_BYTES", "OnnxReport", "data_files", "export_onnx"]


EXTERNAL_FROM_BYTES = 2**31 - 2**26  # protobuf's limit, less room for the graph
_TOLERANCE = 1e-3  # of the largest output; a wrong graph differs by far more than rounding
_ROUNDINGS = 10  # of torch itself, for models that amplify rounding
_QUANTIZED_TOLERANCE = 0.2  # a sum that is rounded to the other step moves all that follows
_BATCHES = (1, 3)  # neither is the example's
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """What was written and how it was checked.

    Attributes:
        opset: Version of the operator set.
        size_bytes: Size of all files together.
        external: The second file, which holds the weights; None if one file holds everything.
        batch_norms: Number of folded batch norms, and of all that the graph had.
        deviation: Largest difference of ONNX Runtime's outputs from torch's, on normally
            distributed images in batches of 1 and 3.
        largest: Largest absolute output of torch.
        layers: Numbers of zeros and of weights of each convolution and linear layer in the file.
        unchecked: Layers whose weight is not one tensor of the file, for example shared ones.
        outputs: Names of the outputs, in their order.
    """

    opset: int
    size_bytes: int
    external: Path | None
    batch_norms: tuple[int, int]
    deviation: float
    largest: float
    layers: Mapping[str, tuple[int, int]]
    unchecked: tuple[str, ...]
    outputs: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"OnnxReport({len(self.layers)} layers, sparsity={self.sparsity:.4f}, "
            f"size_bytes={self.size_bytes}, opset={self.opset}, deviation={self.deviation:.1e})"
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros in all layers that were checked, in [0, 1]."""
        total = sum(weights for _, weights in self.layers.values())
        return sum(zeros for zeros, _ in self.layers.values()) / total if total else 0.0


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: tuple[int, ...],
    *,
    fold_bn: bool = False,
    metadata: Mapping[str, Any] | None = None,
    external_from_bytes: int = EXTERNAL_FROM_BYTES,
    unfinished: bool = False,
) -> OnnxReport:
    """Write a model as an ONNX file with batches of any size.

    The input `images` has the shape `(batch, *input_size)`. An output that is a tensor is called
    `logits`; tensors in a dict or a dataclass are called by their keys, and those in a tuple are
    `output_0`, `output_1`, …. Two checks are made before the file appears: each weight that is zero
    in the model is zero in the file, and ONNX Runtime's outputs are those of torch.

    Args:
        model: A float32 model in any phase of pruning; it is not changed, and exported in eval
            mode. A quantized model becomes an ONNX model of `QuantizeLinear` and
            `DequantizeLinear`, which is compared with ONNX Runtime without its optimizations.
        path: Path of the file.
        input_size: Channels, height and width of the images; for videos there are more numbers.
        fold_bn: Whether batch norms are folded into the convolutions before them.
        metadata: Plain values for the file's metadata by name, each stored as JSON.
        external_from_bytes: With at least this many bytes of weights, they are written to a second
            file, since an ONNX file holds at most 2 GiB. It is `PATH.data`, and must remain beside
            `PATH`. If `path` is replaced and has a `PATH.data`, it is `PATH.data2`, and the old one
            is removed at the end.
        unfinished: Whether the pruning may be unfinished, which the metadata then say.

    Raises:
        PruningError: If a pruner of the model has not finished (`Pruner.check_finished`).
        ModuleNotFoundError: If onnx, onnxscript or onnxruntime is not installed.
        ExportError: If the model returns something other than tensors, if torch can't export it
            (the message names a layer or a part that is possible, where it can), or if the exported
            model differs.
        CheckpointError: If the file can't be written.

    Example:
        >>> size = (3, 224, 224)
        >>> export_onnx(model, "model.onnx", size, fold_bn=True).deviation  # doctest: +SKIP
        1.4e-06
    """
    onnx, _, runtime = (import_optional(name, "onnx", "export to ONNX") for name in _PACKAGES)
    check_finished(model, unfinished=unfinished)
    if not is_finished(model):
        metadata = {**(metadata or {}), "starfire_prune.pruning": {"finished": False}}
    path = Path(path)
    model = dense_copy(model).eval()
    outputs = name_outputs(model, input_size)
    proto = exported_model(model, input_size, outputs)
    weights = Weights(onnx, proto.graph)
    remove_false_biases(proto.graph, weights)
    spell_out_constants(onnx, proto)
    norms = _count_norms(proto.graph)
    folded = fold_batch_norms(proto.graph, weights) if fold_bn else 0
    strip_debug_data(proto)
    for name, value in (metadata or {}).items():
        proto.metadata_props.add(key=name, value=json.dumps(value))
    layers, unchecked = _checked_zeros(model, weights)
    data = _free_data_file(onnx, path) if weights.size_bytes >= external_from_bytes else None
    with checked_file(path, _saved(onnx, proto, path, data)) as file:
        deviation, largest = _checked_outputs(runtime, model, file, input_size, outputs)
        parts = (file,) if data is None else (file, file.with_name(data.name))
        size_bytes = sum(part.stat().st_size for part in parts)
    return OnnxReport(
        opset=next(each.version for each in proto.opset_import if not each.domain),
        size_bytes=size_bytes,
        external=data,
        batch_norms=(folded, norms),
        deviation=deviation,
        largest=largest,
        layers=layers,
        unchecked=unchecked,
        outputs=outputs,
    )


def _count_norms(graph: Any) -> int:
    return sum(node.op_type == "BatchNormalization" for node in graph.node)


# Checking


def _checked_zeros(
    model: nn.Module, weights: Weights
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """The numbers of zeros and weights of each layer in the file, and the layers not found there.

    Raises:
        ExportError: If a weight is zero in the model but not in the file.
    """
    layers: dict[str, tuple[int, int]] = {}
    unchecked = []
    for layer, module in prunable_layers(model).items():
        weight = effective_weight(module).cpu().numpy()
        array = _array_of(weight_key(layer), weight, weights)
        if array is None:
            unchecked.append(layer)
            continue
        if (array[weight == 0] != 0).any():
            raise ExportError(
                f"{layer}: weights that are zero in the model are not zero in the file"
            )
        layers[layer] = int((array == 0).sum()), array.size
    return layers, tuple(unchecked)


def _array_of(name: str, weight: Array, weights: Weights) -> Array | None:
    """The weight in the file, in the model's layout, found by its name or by its values."""
    if name in weights and weights[name].shape == weight.shape:
        return weights[name]
    for other in weights:
        array = weights[other]
        for candidate in (array, array.T):
            if candidate.shape == weight.shape and np.array_equal(candidate, weight):
                return candidate
    return None


@torch.no_grad()
def _checked_outputs(
    runtime: Any,
    model: nn.Module,
    file: Path,
    input_size: tuple[int, ...],
    names: tuple[str, ...],
) -> tuple[float, float]:
    """The largest difference of ONNX Runtime's outputs from torch's, and torch's largest output.

    Raises:
        ExportError: If they differ by more than rounding, or ONNX Runtime can't run the file.
    """
    quantized = is_quantized(model)
    session = _session(runtime, file, optimizes=not quantized)
    generator = torch.Generator().manual_seed(0)
    expected: list[Any] = []
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for batch in _BATCHES:
        images = torch.randn(batch, *input_size, generator=generator)
        inputs.append(images)
        expected.append(model(images))
        try:
            arrays = session.run(list(names), {INPUT: images.numpy()})
        except Exception as error:  # ONNX Runtime has many error classes
            raise ExportError(f"ONNX Runtime can't run the exported model: {error}") from error
        outputs += map(torch.from_numpy, arrays)
    tolerance = _QUANTIZED_TOLERANCE if quantized else _TOLERANCE
    try:
        return compare_outputs(expected, outputs, tolerance)
    except ValueError as error:
        if not quantized:
            with contextlib.suppress(ValueError):
                return compare_outputs(expected, outputs, _ROUNDINGS * rounding(model, inputs))
        raise ExportError(
            f"ONNX Runtime's outputs {error} in torch: torch's exporter gets this model wrong"
        ) from error


def _session(runtime: Any, file: Path, *, optimizes: bool = True) -> Any:
    options = runtime.SessionOptions()
    if not optimizes:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has many error classes
        raise ExportError(f"ONNX Runtime can't load the exported model: {error}") from error


# Writing


def data_files(path: Path) -> tuple[Path, Path]:
    """The two files of which one may hold the weights of an ONNX file."""
    return path.with_name(f"{path.name}.data"), path.with_name(f"{path.name}.data2")


def _used_data_file(onnx: Any, path: Path) -> Path | None:
    """The one of the two that the ONNX file at `path` refers to, or None."""
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # it does not exist, or is not an ONNX file
        return None
    held = {each.value for tensor in graph.initializer for each in tensor.external_data}
    return next((file for file in data_files(path) if file.name in held), None)


def _free_data_file(onnx: Any, path: Path) -> Path:
    """The first of the two that the ONNX file at `path` does not refer to."""
    used = _used_data_file(onnx, path)
    return next(file for file in data_files(path) if file != used)


@contextmanager
def _saved(onnx: Any, proto: Any, path: Path, data: Path | None) -> Iterator[Path]:
    """Write a model to a folder beside `path`, and move it to `path` after a successful block.

    A second file with the weights is moved first, so that at any time `path` is the complete old
    model or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    used = _used_data_file(onnx, path)
    folder = path.with_name(f".{path.name}.parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        file = folder / path.name
        options = {} if data is None else {"save_as_external_data": True, "location": data.name}
        onnx.save_model(proto, str(file), **options)
        _check(onnx, file)
        yield file
        if data is not None:
            move_file(folder / data.name, data)
        move_file(file, path)
        if used is not None:
            used.unlink(missing_ok=True)  # the old model's
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(onnx: Any, file: Path) -> None:
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error
