"""The exceptions that several folders of the package share."""

from __future__ import annotations

__all__ = [
    "BuildError",
    "CheckpointError",
    "CodecError",
    "DamageError",
    "EvaluationError",
    "ExportError",
    "ModelError",
    "PretrainedError",
    "PruningError",
    "QuantizationError",
    "RanksError",
    "TraceError",
]


class BuildError(RuntimeError):
    """The native kernels can't be built or loaded on this machine."""


class PruningError(RuntimeError):
    """A pruned weight is not zero, or pruning would remove all weights of a layer."""


class QuantizationError(ValueError):
    """A model can't be quantized, or the parts of a quantized model don't fit together."""


class RanksError(RuntimeError):
    """Ranks of a distributed run differ in something that must be the same."""


class ModelError(ValueError):
    """A timm model does not exist, or can't be built with the given options."""


class PretrainedError(ValueError):
    """Pretrained weights are not available or don't fit the model."""


class CheckpointError(ValueError):
    """A checkpoint or another file can't be read or written, or does not fit."""


class DamageError(ValueError):
    """The contents of a file are not valid; the message does not name the file."""


class CodecError(ValueError):
    """Stored bytes do not encode a tensor of the stated shape."""


class EvaluationError(ValueError):
    """Weights can't be evaluated, or the file of an evaluation can't be read."""


class ExportError(ValueError):
    """A model or its weights can't be exported."""


class TraceError(RuntimeError):
    """`torch.export` can't trace a model's forward pass."""
