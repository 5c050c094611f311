"""Inference on the CPU that is faster the sparser a model is.

`compile` turns a pruned model into one whose convolutions and linear layers skip their zeros. The
kernels are C++, built at first use; without a compiler the model stays dense, and runs.
"""

from starfire_prune.sparse.build import BuildError
from starfire_prune.sparse.compiled import CompiledModel, Segment, compile

__all__ = ["BuildError", "CompiledModel", "Segment", "compile"]
