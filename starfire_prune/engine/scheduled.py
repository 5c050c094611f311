"""What a pruner says of its progress: phase, epoch, target sparsity and whether it is finished."""

from __future__ import annotations

from starfire_prune.engine.progress import Progress
from starfire_prune.engine.state import Phase
from starfire_prune.utils.errors import PruningError

__all__ = ["Scheduled"]


class Scheduled:
    """The part of a `Pruner` that only depends on what has been counted."""

    _progress: Progress

    @property
    def updates_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None if unknown."""
        return self._progress.updates_per_epoch

    @property
    def phase(self) -> Phase:
        """`"dense"`, `"era"` or `"fixed"`."""
        return self._progress.state.phase

    @property
    def epoch(self) -> int:
        """The current epoch, 0-based."""
        return self._progress.state.epoch

    @property
    def target_sparsity(self) -> float:
        """The sparsity wanted at this update, in [0, 1]; overrides and `fc` have their own."""
        return self._progress.target_sparsity

    @property
    def finished(self) -> bool:
        """Whether the masks have reached their target and are frozen."""
        return self.phase == "fixed"

    def check_finished(self) -> None:
        """Verify that the era has ended; call it after training, before the model is passed on.

        `save_pruned`, exports, compaction and `sparse.compile` call it for the models that a pruner
        prunes or mirrors, and for copies of these. `unfinished=True` allows them an unfinished one.

        Raises:
            PruningError: If `finished` is False, with what has been counted, possible causes such
                as a forgotten `end_epoch`, and the ways out.
        """
        if text := self.unfinished_text():
            raise PruningError(text)

    def unfinished_text(self) -> str | None:
        """The message of `check_finished`; None if the pruning is finished."""
        return self._progress.unfinished_text()

    def skip_dense(self, epochs: int, updates: int | None = None) -> None:
        """Start after `epochs` dense epochs, for example when continuing from dense weights.

        Args:
            epochs: Number of epochs to skip.
            updates: Number of their updates; default: `epochs * updates_per_epoch`.

        Raises:
            ValueError: If the era begins before them.
            RuntimeError: If an epoch has begun already.
        """
        self._progress.skip_dense(epochs, updates)
