"""The compiled model: an `nn.Module` whose segments run natively."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from starfire_prune.sparse.ops import load_kernels, new_workspace, sparse_inference
from starfire_prune.sparse.workspace import WorkspacePool
from starfire_prune.structure.graph import without_autocast

__all__ = ["CompiledModel", "ExpectedConstant", "ExpectedTensor", "Segment"]


NOTHING_SUPPORTED = (
    "the kernels support none of the model's operations: they support convolutions and linear "
    "layers, and the operations around them, in torch.float32"
)


class Segment(nn.Module):
    """A part of a model, or all of it, that the native kernels run in one call.

    Several threads may call it at once: each call has its own workspace.

    Args:
        program: The program, `(n,)` in int64.
        constants: Its weights and indices, `(bytes,)` in uint8.
        output_shapes: For each output, the number of dimensions and all sizes but the first.
    """

    program: Tensor
    constants: Tensor

    def __init__(self, program: Tensor, constants: Tensor, output_shapes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("program", program)
        self.register_buffer("constants", constants)
        self.output_shapes = list(output_shapes)
        self.isa = 0  # the widest one
        self._workspaces = WorkspacePool()

    def __setstate__(self, state: dict[str, Any]) -> None:
        load_kernels()  # in the process that unpickles it
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs: one tensor, or a list of several."""
        fixed = (self.program, self.constants, self.output_shapes)
        if _is_traced():
            outputs = sparse_inference(list(inputs), *fixed, None, self.isa)
        else:
            batch = inputs[0].shape[0]
            workspace = self._workspaces.acquire(batch)
            workspace = new_workspace(self.program, batch) if workspace is None else workspace
            outputs = sparse_inference(list(inputs), *fixed, workspace, self.isa)
            self._workspaces.release(batch, workspace)
        return outputs[0] if len(outputs) == 1 else outputs


def _is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit traces this; graphs hold no workspaces."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    exporting = getattr(torch.compiler, "is_exporting", None)  # not in torch 2.6
    return exporting is not None and exporting()


class CompiledModel(nn.Module):
    """The result of `compile`.

    Attributes:
        network: The rewritten graph: segments run natively, other operations on torch.
        reason: Why no part of it is native, and what to do about it; None if some part is.
        names: Names of the model's arguments, by which inputs may be given as keywords.
        expected: What each input must be.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        example: Sequence[Any],
        reason: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.reason = reason or (None if self.segments else NOTHING_SUPPORTED)
        self.names = tuple(names[: len(example)])
        leaves, self._structure = tree_flatten(tuple(example))
        self.expected = [_expected(value) for value in leaves]
        self._any_batch = not self.torch_operations and bool(self.segments)
        self.training = False

    @property
    def segments(self) -> list[Segment]:
        """The native parts, in the order of execution."""
        return [module for module in self.network.modules() if isinstance(module, Segment)]

    @property
    def torch_operations(self) -> list[str]:
        """The operations that run on torch, in the order of execution."""
        return [
            str(node.target)
            for node in self.network.graph.nodes
            if node.op in ("call_function", "call_method") and node.target is not operator.getitem
        ]

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's outputs.

        Raises:
            TypeError: If the number, names, types or device of the inputs differ from the
                example's.
            ValueError: If a shape, or the value of an input that isn't a tensor, differs.
        """
        if keywords:
            inputs = self._in_order(inputs, keywords)
        self._check(inputs)
        if _is_traced():
            return self.network(*inputs)
        with without_autocast(), torch.no_grad():
            return self.network(*inputs)

    def train(self, mode: bool = True) -> CompiledModel:
        """Refuse training mode.

        Raises:
            ValueError: If `mode` is True.
        """
        if mode:
            raise ValueError("mode (=True) is not possible: a compiled model can't be trained")
        return self

    def _in_order(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
        """All inputs in the order of the example."""
        left = self.names[len(inputs) :]
        for name in keywords:
            if name not in left:
                again = "given twice" if name in self.names else "not an input of the example"
                raise TypeError(
                    f"`{name}` is {again}; the inputs are {', '.join(self.names) or 'nameless'}: "
                    f"to add others, compile the model with them in `example_input`"
                )
        missing = [name for name in left if name not in keywords]
        if missing:
            raise TypeError(f"the input {missing[0]} is missing, which the example has")
        return (*inputs, *(keywords[name] for name in left))

    def _check(self, inputs: Sequence[Any]) -> None:
        leaves, structure = tree_flatten(tuple(inputs))
        if len(leaves) != len(self.expected) or structure != self._structure:
            wanted = len(self.expected)
            raise TypeError(f"there must be {wanted} inputs, as in the example, not {len(leaves)}")
        batches = []
        for index, (value, expected) in enumerate(zip(leaves, self.expected, strict=True)):
            expected.check(index, value, self._any_batch)
            if isinstance(value, Tensor):
                batches.append(value.shape[0] if value.ndim else 1)
        if self._any_batch and any(batch != batches[0] for batch in batches):
            raise ValueError(f"inputs must have one batch size, but have {batches}")


@dataclasses.dataclass(frozen=True)
class ExpectedTensor:
    """The shape and dtype of a tensor in the example."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def check(self, index: int, value: Any, any_batch: bool) -> None:
        """Raise an error unless an input fits; `any_batch` allows any batch size."""
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"input {index} must be a tensor, as in the example, not {kind}")
        if value.device.type != "cpu" or value.dtype != self.dtype:
            raise TypeError(
                f"input {index} must be {self.dtype} on the CPU, as in the example, "
                f"but is {value.dtype} on {value.device}"
            )
        shape, skipped = tuple(value.shape), int(any_batch)
        same = len(shape) == len(self.shape) and shape[skipped:] == self.shape[skipped:]
        if not same or (0 in shape and 0 not in self.shape):
            expected = f"(N, {str(self.shape[1:])[1:]}" if any_batch else str(self.shape)
            raise ValueError(
                f"input {index} has the shape {shape}, but the model is compiled for {expected}; "
                "compile it again for other shapes"
            )


@dataclasses.dataclass(frozen=True)
class ExpectedConstant:
    """An argument of the example that isn't a tensor: torch.export made it part of the model."""

    value: Any

    def check(self, index: int, value: Any, any_batch: bool) -> None:
        """Raise an error unless an input has the value of the example."""
        if isinstance(value, Tensor) or value != self.value:
            raise ValueError(
                f"input {index} (={value!r}) must be {self.value!r}, as in the example; "
                "compile the model again for other values"
            )


def _expected(value: Any) -> ExpectedTensor | ExpectedConstant:
    if isinstance(value, Tensor):
        return ExpectedTensor(tuple(value.shape), value.dtype)
    return ExpectedConstant(value)
