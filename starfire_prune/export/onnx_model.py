"""The ONNX model that torch's exporter makes of a network, and the names of its outputs.

The graph is that of torch's exporter with constants folded. The exporter's own optimizer is not
used, as it always folds batch norms.
"""

from __future__ import annotations

import dataclasses
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune.structure.exporting import exportable_part, quiet_export
from starfire_prune.structure.graph import place_of, without_autocast
from starfire_prune.utils.errors import ExportError
from starfire_prune.utils.optional import import_optional
from starfire_prune.utils.text import first_line, listed

__all__ = ["INPUT", "exported_model", "name_outputs"]


INPUT = "images"
_OUTPUT = "logits"


def name_outputs(model: nn.Module, input_size: tuple[int, ...]) -> tuple[str, ...]:
    """The names of a model's outputs in an ONNX file, in their order.

    A single tensor is called `logits`. Tensors in dicts, dataclasses and named tuples are called by
    their keys, and those in lists and tuples are numbered, such as `output_0`. From then on a model
    with such outputs returns a tuple of these tensors, which torch's exporter accepts.

    Args:
        model: The model, in eval mode; it gets a forward hook unless it returns a tensor.
        input_size: Channels, height and width of the images.

    Raises:
        ExportError: If the model returns anything other than tensors and None, or does not accept
            the images.
    """
    images = torch.zeros(2, *input_size)
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:  # the model's code raises errors of every kind
        raise ExportError(
            f"{type(model).__name__} does not accept images of shape {tuple(images.shape)}: "
            f"{first_line(error)}"
        ) from error
    if isinstance(output, Tensor):
        return (_OUTPUT,)
    leaves = list(_leaves(output, ""))
    others = [f"{name or 'it'}: {type(leaf).__name__}" for name, leaf in leaves if _is_other(leaf)]
    if others or not _tensors(output):
        found = f"{type(output).__name__} with {listed(others)}" if others else "no tensors"
        raise ExportError(
            f"an ONNX file returns tensors, and {type(model).__name__} returns {found}: wrap it in "
            f"a module that returns a tensor, or tensors in a dict, dataclass, tuple or list"
        )
    # Copies: the exporter loses outputs that are the input, a parameter or another output
    model.register_forward_hook(lambda _module, _inputs, outputs: _copies(outputs))
    return tuple(_distinct([name for name, leaf in leaves if leaf is not None]))


def _leaves(output: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values in an output by their names, of which `name` is the beginning."""
    if isinstance(output, Mapping):
        items = {str(key): value for key, value in output.items()}
    elif dataclasses.is_dataclass(output):
        items = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = dict(zip(output._fields, output, strict=True))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from _leaves(value, f"{name or 'output'}_{index}")
        return
    else:
        yield name, output
        return
    for key, value in items.items():
        yield from _leaves(value, f"{name}.{key}" if name else key)


def _is_other(leaf: Any) -> bool:
    return leaf is not None and not isinstance(leaf, Tensor)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for _, leaf in _leaves(output, "") if isinstance(leaf, Tensor))


def _copies(output: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in _tensors(output))


def _distinct(names: list[str]) -> Iterator[str]:
    """The names, made different from the input's name and from each other."""
    used = {INPUT}
    for name in names:
        distinct = name or _OUTPUT
        while distinct in used:
            distinct += "_"
        used.add(distinct)
        yield distinct


def exported_model(
    model: nn.Module, input_size: tuple[int, ...], outputs: tuple[str, ...] = (_OUTPUT,)
) -> Any:
    """The `ModelProto` of a model, for batches of any size.

    Args:
        model: The model, in eval mode and without hooks that prune it.
        input_size: Channels, height and width of the images.
        outputs: The result of `name_outputs`.

    Raises:
        ExportError: If torch can't export the model.
    """
    optimizer = import_optional("onnxscript.optimizer", "onnx", "export to ONNX")
    images = torch.zeros(2, *input_size)
    try:
        with warnings.catch_warnings(), without_autocast(), quiet_export():
            warnings.simplefilter("ignore")  # the exporter warns about its own code
            program = torch.onnx.export(
                model,
                (images,),
                input_names=[INPUT],
                output_names=list(outputs),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=False,  # it would fold batch norms
                verbose=False,
            )
            graph: Any = program
            optimizer.inline(graph.model)
            optimizer.fold_constants(graph.model)
            optimizer.remove_unused_nodes(graph.model)
            return graph.model_proto
    except Exception as error:  # the model's code and the exporter raise errors of every kind
        versions = " and ".join(f"{name} {version(name)}" for name in ("torch", "onnxscript"))
        place = _place_in_errors(error)
        part = exportable_part(model, (images,), any_batch=True) if place is None else ""
        raise ExportError(
            f"{versions} can't export this model to ONNX{place or ''}: {_first_cause(error)}{part}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from, the first one last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_cause(error: BaseException) -> str:
    """The text of the first error: the exporter wraps it in advice of many lines."""
    *_, first = _causes(error)
    if "SymbolicTensor" in str(first):
        return (
            "one of its attributes, such as `groups`, depends on the batch size, and is a constant "
            "in ONNX; replace that layer by one without such an attribute"
        )
    return textwrap.shorten(str(first), 300) or type(first).__name__


def _place_in_errors(error: BaseException) -> str | None:
    """The operation that the exporter can't translate to ONNX, and its module, if there is one.

    The exporter's errors name the node of a graph, which only the exporter has. So the node is
    found in the functions that raised them.
    """
    for cause in _causes(error):
        trace = cause.__traceback__
        while trace is not None:
            node = trace.tb_frame.f_locals.get("node")
            if isinstance(node, fx.Node) and "nn_module_stack" in node.meta:
                return f", because of {node.target} in {place_of(node)}"
            trace = trace.tb_next
    return None
