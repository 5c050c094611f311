"""The compiled model: an `nn.Module` whose segments run natively."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from starfire_prune.sparse.ops import new_arena, sparse_inference
from starfire_prune.sparse.workspace import Arenas
from starfire_prune.structure.graph import without_autocast

__all__ = ["CompiledModel", "Constant", "ExpectedInput", "Segment"]


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
        self._expected = [ExpectedInput.of(value) for value in leaves]
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
class ExpectedInput:
    """What a tensor of the example was like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> ExpectedInput | Constant:
        """Of a tensor or another argument."""
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.dtype)
        return Constant(value)

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


@dataclasses.dataclass(frozen=True)
class Constant:
    """An argument of the example that is no tensor: torch.export has made it part of the model."""

    value: Any

    def check(self, index: int, given: Any, any_batch: bool) -> None:
        """Refuse another value."""
        if isinstance(given, Tensor) or given != self.value:
            raise ValueError(
                f"input {index} (={given!r}) must be {self.value!r}, as in the example: compile "
                "the model for other values by themselves"
            )
