"""`compile`: a model for inference whose sparse layers run on kernels that skip the zeros."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from starfire_prune.sparse.build import BuildError, native
from starfire_prune.sparse.lowering import Reader
from starfire_prune.sparse.module import CompiledModel, Segment
from starfire_prune.sparse.schedule import plan
from starfire_prune.sparse.supported import is_readable, shape_of
from starfire_prune.structure.graph import dense_copy, without_autocast

__all__ = ["compile"]


def compile(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> CompiledModel:
    """A copy of a sparse model for inference on the CPU, whose kernels skip zero weights.

    Native are convolutions and linear layers with the batch norms, ReLU and other bounds,
    additions, concatenations, pooling and means around them, in single precision; a network of
    these runs in one call. What the kernels don't know, such as SiLU or products, stays torch's
    in its place, between several calls: see `torch_operations`, `segments` and `reason` of the
    result. Outputs equal the model's in eval mode but for rounding.

    The kernels are built at first use, which takes a C++ compiler (`CXX`, or one in the `PATH`)
    and some seconds, and kept in `STARFIRE_SPARSE_CACHE`, by default the user's cache. If that
    fails, all stays torch's, with one warning.

    Args:
        model: in any phase of pruning, in single precision; it is left as it is.
        example_input: a batch, or the tuple of the model's arguments. The compiled model takes
            inputs of these shapes, and where all of it is native, of any size of the batch.

    Returns:
        A module for inference, which later changes to `model` don't reach.

    Raises:
        torch._dynamo.exc.UserError and others of `torch.export`: if it can't export the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        >>> _ = ck_structured(model[0], amount=0.75)
        >>> images = torch.rand(1, 8, 16, 16)
        >>> compiled = sparse.compile(model, images)
        >>> torch.allclose(compiled(images), model(images), atol=1e-5)
        True
        >>> len(compiled.segments), compiled.torch_operations
        (1, [])
    """
    example = example_input if isinstance(example_input, tuple) else (example_input,)
    graph = _exported(model, example)
    try:
        native()
    except BuildError as error:
        warnings.warn(f"the model stays dense: {error}", RuntimeWarning, stacklevel=2)
        return CompiledModel(graph, example, str(error))
    return CompiledModel(_with_segments(graph), example)


def _exported(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The model's graph in eval mode, with its parameters as attributes."""
    with without_autocast(), torch.no_grad():
        exported = torch.export.export(dense_copy(model).eval(), example, strict=False)
        graph = exported.run_decompositions({}).module()
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":  # checked by ourselves
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


class _Readable(OperatorSupportBase):
    """Tells torch's partitioner what the kernels know, on batches of the model's size alone."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._constants = _constants(graph)
        given = (shape_of(node) for node in graph.graph.find_nodes(op="placeholder"))
        self._batch = next((shape[0] for shape in given if len(shape) in (2, 4)), None)

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        return is_readable(node, self._constants) and all(
            shape_of(each)[:1] in ((), (self._batch,))
            for each in (node, *node.all_input_nodes)
            if each not in self._constants
        )


def _constants(graph: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The tensors that a graph's nodes stand for."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                found[node] = value
    return found


def _with_segments(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with all that the kernels know put into segments."""
    partitioner = CapabilityBasedPartitioner(
        graph, _Readable(graph), allows_single_node_partition=True
    )
    fused = partitioner.fuse_partitions(partitioner.propose_partitions())
    constants = _constants(fused)
    for node in fused.graph.find_nodes(op="call_module"):
        part = fused.get_submodule(str(node.target))
        if isinstance(part, fx.GraphModule):
            _replace(fused, node, part, constants)
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    return fx.GraphModule(fused, fused.graph)  # takes along what the graph still refers to


def _replace(
    graph: fx.GraphModule, node: fx.Node, part: fx.GraphModule, constants: dict[fx.Node, Tensor]
) -> None:
    """Put a segment in the place of a part of the graph."""
    names = part.graph.find_nodes(op="placeholder")
    arguments: list[Any] = list(node.args)
    pairs = list(zip(names, arguments, strict=True))
    inside = {name: constants[value] for name, value in pairs if value in constants}
    segment = _segment(part, [name for name in names if name not in inside], inside)
    graph.add_submodule(str(node.target), segment)
    node.args = tuple(value for value in arguments if value not in constants)


def _segment(
    part: fx.GraphModule, given: list[fx.Node], constants: dict[fx.Node, Tensor]
) -> Segment:
    reader = Reader(constants)
    inputs = [reader.give(node) for node in given]
    for node in part.graph.nodes:
        if node.op == "call_function":
            reader.read(node)
    results: Any = part.graph.output_node().args[0]
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    program = plan(reader.steps, inputs, [reader.values[node] for node in results])
    shapes = [tuple(node.meta["val"].shape) for node in results]
    sizes = [size for shape in shapes for size in (len(shape), *shape[1:])]
    words = torch.from_numpy(program.words())
    return Segment(words, torch.from_numpy(program.constants.joined()), sizes)
