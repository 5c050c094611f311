"""Inference on the CPU that gets faster with a model's sparsity.

`compile` turns a pruned model into one whose convolutions and linear layers skip their zeros. The
kernels are C++ and are built at first use; without a compiler the model runs on torch, as dense.
"""

from starfire_prune.sparse.compiler import compile
from starfire_prune.sparse.module import CompiledModel, Segment
from starfire_prune.sparse.ops import load_kernels
from starfire_prune.utils.errors import BuildError

__all__ = ["BuildError", "CompiledModel", "Segment", "compile", "load_kernels"]
