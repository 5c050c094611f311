"""What goes wrong with pruning while a model trains, as errors that a caller can tell apart."""

__all__ = ["PruningError", "RanksError"]


class PruningError(RuntimeError):
    """Pruning that does not hold: a pruned weight came back, or a layer would have none left."""


class RanksError(RuntimeError):
    """Ranks of a distributed run that should have the same and don't."""
