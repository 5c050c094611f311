"""Counting of updates and epochs: where the schedule of a pruning stands."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any, cast

from starfire_prune.engine.settings import Pruning
from starfire_prune.engine.state import PrunerState
from starfire_prune.utils.errors import PruningError

__all__ = ["Progress", "era_in_updates"]

_LOGGER = logging.getLogger(__name__)


def era_in_updates(pruning: Pruning, updates_per_epoch: int) -> tuple[int, int]:
    """The first update of the era, 0-based, and the first one after it.

    Args:
        pruning: The settings.
        updates_per_epoch: Optimizer steps of an epoch.

    Example:
        >>> from starfire_prune.engine.settings import parse_pruning
        >>> era_in_updates(parse_pruning({"method": "ck", "amount": 0.6, "era": [2, 4]}), 10)
        (20, 40)
    """
    if pruning.era is None:
        return cast(tuple[int, int], pruning.era_updates)
    return pruning.era[0] * updates_per_epoch, pruning.era[1] * updates_per_epoch


class Progress:
    """Counts updates and epochs, and says where the schedule of the era stands.

    An era `[a, b]` of epochs has `T = (b - a) * updates_per_epoch` updates. The schedule never runs
    ahead of the epoch: until the end of epoch `a + k` at most `(k + 1) * updates_per_epoch` of them
    are counted, and further ones don't count. An era `[a, b]` of updates, `era_updates`, has the
    `T = b - a` updates from number a (0-based) on, in whichever epochs they are.

    Args:
        pruning: The settings.
        updates_per_epoch: Optimizer steps of an epoch; None if unknown.

    Attributes:
        state: The phase and all counts, with empty masks.
        is_detached: Whether the pruner is detached from its model.

    Raises:
        TypeError, ValueError: If `updates_per_epoch` is missing or not a number of updates.
    """

    def __init__(self, pruning: Pruning, updates_per_epoch: int | None) -> None:
        if updates_per_epoch is None:
            if pruning.era is not None:
                raise TypeError(
                    "`updates_per_epoch` is missing, by which `pruning.era` counts: give the "
                    "optimizer steps of an epoch, or give the era in updates, as "
                    "`pruning.era_updates`"
                )
        elif isinstance(updates_per_epoch, bool) or not isinstance(updates_per_epoch, int):
            raise TypeError(f"`updates_per_epoch` (={updates_per_epoch!r}) must be an int")
        elif updates_per_epoch < 1:
            raise ValueError(f"`updates_per_epoch` (={updates_per_epoch}) must be at least 1")
        self.pruning, self.updates_per_epoch = pruning, updates_per_epoch
        self.state = PrunerState(pruning.model_dump(mode="json"), updates_per_epoch)
        self.is_detached = self._has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        memo[id(self)] = twin = copy.copy(self)  # the settings and the state can't change
        return twin

    # --- counting --------------------------------------------------------------------------------

    def set(self, **changes: Any) -> None:
        """Change the phase or counts."""
        self.state = dataclasses.replace(self.state, **changes)

    def load(self, state: PrunerState) -> None:
        """Continue from the phase and counts of a state."""
        number = self.updates_per_epoch
        self.state = dataclasses.replace(state, updates_per_epoch=number, masks={}, applied={})

    def count_update(self) -> bool:
        """Count an update before the fixed phase; whether it belongs to the era.

        Raises:
            PruningError: If the pruner is detached from its model.
        """
        self.check_attached()
        state = self.state
        updates, epoch_updates = state.updates + 1, state.epoch_updates + 1
        era_updates = self._era_updates(updates)
        self.set(updates=updates, epoch_updates=epoch_updates, era_updates=era_updates)
        self._warn_of_surplus()
        return era_updates > 0

    def _era_updates(self, updates: int) -> int:
        """How many of the era's updates are done, after a further update."""
        state, era = self.state, self.pruning.era
        if era is None:
            return max(0, updates - self._era[0])
        if state.epoch < era[0]:
            return 0
        return min(
            state.era_updates + 1, (state.epoch - era[0] + 1) * (self.updates_per_epoch or 0)
        )

    def end_epoch(self, epoch: int) -> bool:
        """Check that an epoch that ends is the current one; whether it ends the era.

        Raises:
            ValueError: If it is another.
            PruningError: If the pruner is detached from its model.
        """
        self.check_attached()
        if epoch != self.state.epoch:
            raise ValueError(
                f"`epoch` (={epoch}) is not the current epoch, {self.state.epoch}: call end_epoch "
                f"once an epoch, and load_state_dict when resuming"
            )
        era = self.pruning.era
        return self.state.phase != "fixed" and era is not None and epoch == era[1] - 1

    def skip_dense(self, epochs: int, updates: int | None) -> None:
        """Start after `epochs` dense epochs; see `Pruner.skip_dense`."""
        first, skipped = self._era[0], epochs
        if self.pruning.era is None:
            if updates is None and self.updates_per_epoch is not None:
                updates = epochs * self.updates_per_epoch
            if updates is None:
                raise ValueError(
                    "`updates` is missing, by which `pruning.era_updates` counts: give the number "
                    "of updates in the epochs that are skipped"
                )
            skipped = updates
        if not (epochs >= 0 and 0 <= skipped <= first):
            name = "epochs" if self.pruning.era is not None else "updates"
            raise ValueError(f"`{name}` (={skipped}) must be in 0..{first}, where the era begins")
        if self.state.epoch or self.state.updates:
            raise RuntimeError("skip_dense() comes before the first step() and end_epoch()")
        self.set(epoch=epochs, updates=updates or epochs * (self.updates_per_epoch or 0))

    def detach(self) -> None:
        """Note that the pruner is detached from its model."""
        self.is_detached = True

    def check_attached(self) -> None:
        """Raise PruningError if the pruner is detached from its model."""
        if self.is_detached:
            raise PruningError(
                "the pruner is detached from its model since pruner.remove(): pass the model "
                "without it, or build another Pruner"
            )

    def _warn_of_surplus(self) -> None:
        """Log once that an epoch has more updates than `updates_per_epoch`."""
        state, number = self.state, self.updates_per_epoch
        if self.pruning.era is None or number is None or self._has_warned:
            return
        if state.epoch_updates > number:
            self._has_warned = True
            _LOGGER.warning(
                "epoch %d has more updates than `updates_per_epoch` (=%d): those beyond it don't "
                "move the schedule of the pruning. If the epoch has ended, end_epoch(epoch) is "
                "missing; if epochs have more updates, correct `updates_per_epoch`",
                state.epoch,
                number,
            )

    # --- the schedule ----------------------------------------------------------------------------

    @property
    def _era(self) -> tuple[int, int]:
        """The first epoch or update of the era, and the first one after it."""
        return cast(tuple[int, int], self.pruning.era or self.pruning.era_updates)

    @property
    def length(self) -> int:
        """The number of the era's updates."""
        first, end = self._era
        return (end - first) * (1 if self.pruning.era is None else self.updates_per_epoch or 0)

    @property
    def share(self) -> float:
        """The progress of the era, in [0, 1]."""
        return self.state.era_updates / self.length

    @property
    def ends_era(self) -> bool:
        """Whether the last of the era's updates is done."""
        return self.state.era_updates == self.length

    @property
    def target_sparsity(self) -> float:
        """The sparsity wanted at this update, in [0, 1]."""
        if self.state.phase == "dense":
            return 0.0
        if self.state.phase == "fixed":
            return self.pruning.amount
        return self.pruning.mask_method.amount_at(self.share, self.pruning.schedule_function)

    # --- whether it is finished ------------------------------------------------------------------

    def unfinished_text(self) -> str | None:
        """Why the pruning is not finished, and the ways out; None if it is finished."""
        if self.state.phase == "fixed":
            return None
        return (
            f"the pruning is not finished: {self._stand()}; the target sparsity is "
            f"{self.target_sparsity:.2%} now and {self.pruning.amount:.2%} at the end of the era. "
            f"{self._cause()}. Train on until `pruner.finished`; or make permanent what is reached "
            f"by `pruner.remove()`; or pass `unfinished=True` to save or export the model as it is"
        )

    def _stand(self) -> str:
        state = self.state
        done = f"{state.era_updates:,} of its {self.length:,} updates are done"
        if self.pruning.era is None:
            where = f"after {state.updates:,} updates"
            era = f"era_updates {list(self._era)}"
        else:
            where = f"in epoch {state.epoch} after {state.epoch_updates:,} updates of it"
            era = f"era {list(self._era)}"
        return f"it is in the phase {state.phase}, {where}; of {era}, {done}"

    def _cause(self) -> str:
        state, number = self.state, self.updates_per_epoch
        stopped = "training stopped before the end of the era (early stopping, `max_steps`)"
        resumed = (
            "a resumed run did not load the pruner's state by `load_state_dict`, so that this "
            "pruner began again at the first epoch"
        )
        if self.pruning.era is not None and number is not None and state.epoch_updates > number:
            return (
                f"Cause: `end_epoch({state.epoch})` was not called, since epoch {state.epoch} has "
                f"more than the {number:,} updates of `updates_per_epoch`"
            )
        forgotten = "`end_epoch(epoch)` was not called after each epoch, "
        first = forgotten if self.pruning.era is not None else ""
        return f"Possible causes: {first}{stopped}, or {resumed}"
