"""`compile`: a model for inference whose sparse layers run on kernels that skip the zeros."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.utils._pytree import tree_flatten

from starfire_prune.model_graph import dense_copy, without_autocast
from starfire_prune.sparse.arenas import Arenas
from starfire_prune.sparse.build import BuildError, native
from starfire_prune.sparse.operator import new_arena, sparse_inference
from starfire_prune.sparse.planner import plan
from starfire_prune.sparse.reading import Reader, is_readable, shape_of

__all__ = ["CompiledModel", "Segment", "compile"]

NOTHING_KNOWN = (
    "the kernels know none of the model's operations: these are convolutions, linear layers and "
    "what goes with them, in torch.float32"
)


class Segment(nn.Module):
    """A part of a model, or all of it, that the native kernels run in one call.

    Threads may call it at once: each call has an arena of its own.

    Args:
        program: the words of the program.
        constants: its weights and indices.
        sizes: of each output, the number of dimensions and each but the first.
    """

    program: Tensor
    constants: Tensor

    def __init__(self, program: Tensor, constants: Tensor, sizes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("program", program)
        self.register_buffer("constants", constants)
        self.sizes = list(sizes)
        self.isa = 0  # the best one
        self._arenas = Arenas()

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs, one by itself or a list of them."""
        fixed = (self.program, self.constants, self.sizes)
        if _is_traced():
            outputs = sparse_inference(list(inputs), *fixed, None, self.isa)
        else:
            batch = inputs[0].shape[0]
            arena = self._arenas.take(batch)
            arena = new_arena(self.program, batch) if arena is None else arena
            outputs = sparse_inference(list(inputs), *fixed, arena, self.isa)
            self._arenas.give(batch, arena)
        return outputs[0] if len(outputs) == 1 else outputs


def _is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit runs this, which know nothing of arenas."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    exporting = getattr(torch.compiler, "is_exporting", None)  # not in torch 2.6
    return exporting is not None and exporting()


class CompiledModel(nn.Module):
    """What `compile` makes of a model.

    Attributes:
        network: the rewritten graph, whose segments are the native kernels' and whose other
            operations are torch's.
        reason: why no part of it is native, and what to do about it; None where some is.
    """

    def __init__(
        self, network: fx.GraphModule, example: Sequence[Any], reason: str | None = None
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.reason = reason or (None if self.segments else NOTHING_KNOWN)
        leaves, self._structure = tree_flatten(tuple(example))
        self._expected = [_Expected.of(value) for value in leaves]
        self._any_batch = not self.torch_operations and bool(self.segments)
        self.training = False

    @property
    def segments(self) -> list[Segment]:
        """The native parts, in the order of execution."""
        return [module for module in self.network.modules() if isinstance(module, Segment)]

    @property
    def torch_operations(self) -> list[str]:
        """The operations that are torch's, in the order of execution."""
        return [
            str(node.target)
            for node in self.network.graph.nodes
            if node.op in ("call_function", "call_method") and node.target is not operator.getitem
        ]

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs.

        Raises:
            TypeError: for inputs of another number, type or device than the example's.
            ValueError: for inputs of another shape, or other values of what is no tensor.
        """
        self._check(inputs)
        if _is_traced():
            return self.network(*inputs)
        with without_autocast(), torch.no_grad():
            return self.network(*inputs)

    def train(self, mode: bool = True) -> CompiledModel:
        """Stay in eval mode.

        Raises:
            ValueError: for training, which compiled models can't.
        """
        if mode:
            raise ValueError("mode (=True) can't be: a compiled model is for inference alone")
        return self

    def _check(self, inputs: Sequence[Any]) -> None:
        leaves, structure = tree_flatten(tuple(inputs))
        if len(leaves) != len(self._expected) or structure != self._structure:
            wanted = len(self._expected)
            raise TypeError(f"inputs must be {wanted}, as in the example, but were {len(leaves)}")
        batches = []
        for index, (given, expected) in enumerate(zip(leaves, self._expected, strict=True)):
            expected.check(index, given, self._any_batch)
            if isinstance(given, Tensor):
                batches.append(given.shape[0] if given.ndim else 1)
        if self._any_batch and any(batch != batches[0] for batch in batches):
            raise ValueError(f"inputs must be batches of one size, but are of {batches}")


@dataclasses.dataclass(frozen=True)
class _Constant:
    """An argument of the example that is no tensor: torch.export has made it part of the model."""

    value: Any

    def check(self, index: int, given: Any, any_batch: bool) -> None:
        """Refuse another value."""
        if isinstance(given, Tensor) or given != self.value:
            raise ValueError(
                f"input {index} (={given!r}) must be {self.value!r}, as in the example: compile "
                "the model for other values by themselves"
            )


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What a tensor of the example was like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> _Expected | _Constant:
        """Of a tensor or another argument."""
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.dtype)
        return _Constant(value)

    def check(self, index: int, given: Any, any_batch: bool) -> None:
        """Refuse what the compiled model can't take."""
        if not isinstance(given, Tensor):
            kind = type(given).__name__
            raise TypeError(f"input {index} must be a tensor, as in the example, but is a {kind}")
        if given.device.type != "cpu" or given.dtype != self.dtype:
            raise TypeError(
                f"input {index} must be {self.dtype} on the CPU, as in the example, "
                f"but is {given.dtype} on {given.device}"
            )
        shape, skipped = tuple(given.shape), int(any_batch)
        alike = len(shape) == len(self.shape) and shape[skipped:] == self.shape[skipped:]
        if not alike or (0 in shape and 0 not in self.shape):
            wanted = f"(N, {str(self.shape[1:])[1:]}" if any_batch else str(self.shape)
            raise ValueError(
                f"input {index} has the shape {shape}, but the model is compiled for {wanted}; "
                "compile it for other shapes by themselves"
            )


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
