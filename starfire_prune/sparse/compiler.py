"""`compile`: turns a model into one for inference whose sparse layers skip their zeros."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from starfire_prune.sparse.lowering import Lowering
from starfire_prune.sparse.module import CompiledModel, Segment
from starfire_prune.sparse.nodes import shape_of
from starfire_prune.sparse.ops import load_kernels
from starfire_prune.sparse.quantized import Constant, constants_of
from starfire_prune.sparse.rewriting import rewrite
from starfire_prune.sparse.scheduling import schedule
from starfire_prune.sparse.supported import is_supported
from starfire_prune.structure.exporting import exported_program
from starfire_prune.structure.graph import dense_copy, place_of, without_autocast
from starfire_prune.utils.errors import BuildError, TraceError
from starfire_prune.utils.marks import check_finished
from starfire_prune.utils.modules import unwrap

__all__ = ["compile"]


aten = torch.ops.aten
_AS_STRIDED = aten.as_strided.default


def compile(
    model: nn.Module, example_input: Tensor | tuple[Any, ...], *, unfinished: bool = False
) -> CompiledModel:
    """A copy of a sparse model for inference on the CPU, whose kernels skip zero weights.

    Supported are convolutions and linear layers with the batch norms, activations, additions,
    products, concatenations, pooling and means around them, in single precision; a network of these
    runs in one native call. Other operations, such as softmax, are left to torch, between several
    native calls: see `torch_operations`, `segments` and `reason` of the result.
    Outputs equal those of the model in eval mode up to rounding.

    A quantized model (`starfire_prune.quantization.quantize`) multiplies integers: of int8 weights
    and bytes, exactly, with int32 sums. Results that are rounded to bytes may differ by one step
    from those of the quantized model on torch, which rounds between its operations too.

    The kernels are built at first use. This needs a C++ compiler (`CXX`, or one in the `PATH`) and
    some seconds. The library is kept in `STARFIRE_SPARSE_CACHE`, by default in the user's cache. If
    the build fails, the model runs on torch, with one warning.

    Args:
        model: The model, in any phase of pruning and in single precision. It is not changed.
        example_input: A batch, or the tuple of the model's arguments. The compiled model accepts
            inputs of these shapes, also as keywords; if it is completely native, with any batch
            size.
        unfinished: Whether the pruning may be unfinished.

    Returns:
        A module for inference. Later changes to `model` don't affect it.

    Raises:
        PruningError: If a pruner of the model has not finished (`Pruner.check_finished`).
        TraceError: If `torch.export` can't trace the model; the message names a part of it that can
            be compiled, if there is one. Also if the model uses `as_strided`.

    Example:
        >>> from starfire_prune import ck_structured, sparse
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        >>> _ = ck_structured(model[0], amount=0.75)
        >>> images = torch.rand(1, 8, 16, 16)
        >>> compiled = sparse.compile(model, images)
        >>> torch.allclose(compiled(images), model(images), atol=1e-5)
        True
        >>> len(compiled.segments), compiled.torch_operations
        (1, [])
    """
    check_finished(model, unfinished=unfinished)
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    graph, names = _export(model, example), _argument_names(model)
    try:
        load_kernels()
    except BuildError as error:
        warnings.warn(f"the model runs on torch, as dense: {error}", RuntimeWarning, stacklevel=2)
        return CompiledModel(_free_of_strides(graph), example, str(error), names)
    try:
        network = _free_of_strides(_with_segments(graph))
    except _BytesBetweenSegmentsError as error:
        warnings.warn(f"the model runs on torch: {error}", RuntimeWarning, stacklevel=2)
        graph = _free_of_strides(_export(model, example))
        return CompiledModel(graph, example, str(error), names)
    return CompiledModel(network, example, names=names)


class _BytesBetweenSegmentsError(Exception):
    """A native part of the model would have to read or return bytes."""


def _argument_names(model: nn.Module) -> list[str]:
    """The names of the arguments of a model's forward pass that may be given by position."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _export(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The model's graph in eval mode, with its parameters as attributes."""
    with without_autocast(), torch.no_grad():
        exported = exported_program(dense_copy(model).eval(), example)
        graph = exported.run_decompositions({}).module()
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":  # CompiledModel checks inputs
            graph.graph.erase_node(node)
        elif node.target is _AS_STRIDED:
            raise TraceError(
                f"`{node.target}` in {place_of(node)} reads its input by the strides that it has "
                f"in torch, which differ in a compiled model: use reshape, permute or indexing "
                f"instead, or compile the parts of the model before and after it"
            )
    graph.recompile()
    return graph


def _free_of_strides(graph: fx.GraphModule) -> fx.GraphModule:
    """Let views copy where they must: tensors have other strides than in the trace.

    Kernels write their outputs in row-major order, and inputs may be in any memory format.
    """
    for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    graph.recompile()
    return graph


class _SupportedOperators(OperatorSupportBase):
    """Reports to torch's partitioner what the kernels support, on batches of one size."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._constants = constants_of(graph)
        shapes = (shape_of(node) for node in graph.graph.find_nodes(op="placeholder"))
        self._batch = next((shape[0] for shape in shapes if len(shape) in (2, 4)), None)

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        """Whether a node can be part of a segment."""
        return is_supported(node, self._constants) and all(
            shape_of(each)[:1] in ((), (self._batch,))
            for each in (node, *node.all_input_nodes)
            if each not in self._constants
        )


def _with_segments(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with all supported operations replaced by segments."""
    rewrite(graph)
    partitioner = CapabilityBasedPartitioner(
        graph, _SupportedOperators(graph), allows_single_node_partition=True
    )
    fused = partitioner.fuse_partitions(partitioner.propose_partitions())
    constants = constants_of(fused)
    for node in fused.graph.find_nodes(op="call_module"):
        partition = fused.get_submodule(str(node.target))
        if isinstance(partition, fx.GraphModule):
            _replace(fused, node, partition, constants)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    return fx.GraphModule(fused, fused.graph)  # copies only what the graph still refers to


def _replace(
    graph: fx.GraphModule,
    node: fx.Node,
    partition: fx.GraphModule,
    constants: Mapping[fx.Node, Constant],
) -> None:
    """Replace a partition of the graph by a segment."""
    names = partition.graph.find_nodes(op="placeholder")
    arguments: list[Any] = list(node.args)
    pairs = list(zip(names, arguments, strict=True))
    inside = {name: constants[value] for name, value in pairs if value in constants}
    segment = _segment(partition, [name for name in names if name not in inside], inside)
    graph.add_submodule(str(node.target), segment)
    node.args = tuple(value for value in arguments if value not in constants)


def _segment(
    partition: fx.GraphModule, inputs: list[fx.Node], constants: Mapping[fx.Node, Constant]
) -> Segment:
    _check_floats([*inputs, *partition.graph.output_node().all_input_nodes])
    lowering = Lowering(constants)
    values = [lowering.add_input(node) for node in inputs]
    for node in partition.graph.nodes:
        if node.op == "call_function":
            lowering.lower(node)
    results: Any = partition.graph.output_node().args[0]
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    ops = lowering.finished_ops(results)
    program = schedule(ops, values, [lowering.values[node] for node in results])
    shapes = [tuple(node.meta["val"].shape) for node in results]
    output_shapes = [size for shape in shapes for size in (len(shape), *shape[1:])]
    constant_bytes = torch.from_numpy(program.constants.to_array())
    return Segment(torch.from_numpy(program.to_array()), constant_bytes, output_shapes)


def _check_floats(nodes: Iterable[fx.Node]) -> None:
    """Refuse other values than floats as inputs or outputs of a native part."""
    for node in nodes:
        if node.meta["val"].dtype != torch.float32:
            raise _BytesBetweenSegmentsError(
                f"{node.name} is quantized, and a native part of the model would return or read it"
                "; let the model return floats, and leave operations that run on torch in floats"
            )
