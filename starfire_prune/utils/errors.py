"""The exceptions of this package."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CodecError",
    "DamageError",
    "EvaluationError",
    "ExportError",
    "ModelError",
    "PretrainedError",
    "PruningError",
    "RanksError",
]


class CodecError(ValueError):
    """Stored bytes that are no tensor of the shape they claim."""


class PruningError(RuntimeError):
    """Pruning that does not hold: a pruned weight came back, or a layer would have none left."""


class RanksError(RuntimeError):
    """Ranks of a distributed run that should have the same and don't."""


class EvaluationError(ValueError):
    """An evaluation that can't be made or read; the message says why and what to do."""


class ExportError(ValueError):
    """What can't be exported; the message says why and what to do."""


class CheckpointError(ValueError):
    """A checkpoint or file of weights that can't be read or written, or does not fit."""


class ModelError(ValueError):
    """A timm model that doesn't exist, or can't be built with the options given."""


class PretrainedError(ValueError):
    """Weights to start from that can't be had or don't fit; the message says why in a sentence."""


class DamageError(ValueError):
    """What is wrong with a file's contents, without the file's name."""
