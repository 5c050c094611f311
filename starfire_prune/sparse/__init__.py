"""Inference on the CPU that is faster the sparser a model is.

`compile` turns a pruned model into one whose convolutions and linear layers skip their zeros. The
kernels are C++, built at first use; without a compiler the model stays dense, and runs.
"""

from starfire_prune.sparse.build import BuildError
from starfire_prune.sparse.compiler import compile
from starfire_prune.sparse.module import CompiledModel, Segment

__all__ = ["BuildError", "CompiledModel", "Segment", "compile"]
