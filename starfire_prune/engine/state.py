"""The state of a pruner: all that a checkpoint has to hold beside the model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from starfire_prune.engine.settings import Pruning

__all__ = ["Phase", "PrunerState"]

Phase = Literal["dense", "era", "fixed"]

_VERSION = 4


@dataclasses.dataclass(frozen=True)
class PrunerState:
    """Where a pruner stands, as plain numbers, strings and bool tensors.

    Attributes:
        pruning: The settings, as plain data.
        updates_per_epoch: Optimizer steps of an epoch; None if unknown.
        phase: `"dense"`, `"era"` or `"fixed"`.
        epoch: The current epoch, 0-based.
        updates: Updates so far, up to the end of the era.
        epoch_updates: Updates of this epoch so far, up to the end of the era.
        era_updates: Updates of the era so far.
        applied: The progress of the era, in [0, 1], at which each layer's mask was last computed.
        dead_input_zeros: Weights of each layer that were pruned because they only read zeros.
        masks: Bool masks by parameter name, True = kept; empty in the dense phase.
        version: Version of this class.
    """

    pruning: Mapping[str, Any]
    updates_per_epoch: int | None
    phase: Phase = "dense"
    epoch: int = 0
    updates: int = 0
    epoch_updates: int = 0
    era_updates: int = 0
    applied: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dead_input_zeros: Mapping[str, int] = dataclasses.field(default_factory=dict)
    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    version: int = _VERSION

    def to_dict(self) -> dict[str, Any]:
        """The state as a dictionary."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**state, "pruning": copy.deepcopy(dict(self.pruning))}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PrunerState:
        """The state of a dictionary that `to_dict` made.

        Raises:
            ValueError: If it is of another version, not complete or damaged.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"the pruner's state has version {state.get('version')!r}, this package reads "
                f"{_VERSION}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if different := sorted(names.symmetric_difference(state)):
            raise ValueError(
                f"the pruner's state is not complete, or not a pruner's: see {', '.join(different)}"
            )
        loaded = cls(**state)
        loaded._check_values()
        return loaded

    def _check_values(self) -> None:
        def is_count(value: object) -> bool:
            return type(value) is int and value >= 0

        counts = ("epoch", "updates", "epoch_updates", "era_updates")
        wrong = [name for name in counts if not is_count(getattr(self, name))]
        if self.updates_per_epoch is not None and not is_count(self.updates_per_epoch):
            wrong.insert(0, "updates_per_epoch")
        if self.phase not in get_args(Phase):
            wrong.append("phase")
        if wrong:
            value = getattr(self, wrong[0])
            raise ValueError(f"the pruner's state is damaged: its {wrong[0]} is {value!r}")

    def check_fits(
        self, pruning: Pruning, updates_per_epoch: int | None, shapes: Mapping[str, torch.Size]
    ) -> None:
        """Raise an error if a pruner can't continue from this state.

        Args:
            pruning: The pruner's settings.
            updates_per_epoch: The pruner's optimizer steps of an epoch, which may differ under
                `era_updates`.
            shapes: Shapes of the weights that it prunes, by parameter name.

        Raises:
            ValueError: If the state is of other settings or of another model.
        """
        own = pruning.model_dump(mode="json")
        differing = [key for key in own if self.pruning.get(key) != own[key]]
        if pruning.era is not None and self.updates_per_epoch != updates_per_epoch:
            differing.append("updates_per_epoch")
        if differing:
            raise ValueError(
                f"the pruner's state was saved under other settings of {', '.join(differing)}: "
                f"resume with the recipe, data and batch size of the run that saved it"
            )
        if self.phase != "dense":
            self._check_masks(shapes)

    def _check_masks(self, shapes: Mapping[str, torch.Size]) -> None:
        for key, shape in shapes.items():
            mask = self.masks.get(key)
            if not isinstance(mask, Tensor) or mask.shape != shape:
                raise ValueError(
                    f"the pruner's state has no mask of shape {tuple(shape)} for layer "
                    f"{key.removesuffix('weight').removesuffix('.')}: it is of another model"
                )
        unknown = sorted(set(self.masks) - set(shapes))
        if unknown:
            raise ValueError(
                f"the pruner's state has a mask for {unknown[0]}, which this pruner does not "
                f"prune: it is of another model"
            )
