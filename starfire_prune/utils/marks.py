"""Marks on pruned layers, by which saves and exports ask whether the pruning is finished.

A `Pruner` leaves a mark on each layer that it prunes, and on those of mirrors. A mark follows its
layer into deep copies, so that a copy made before the end of the era is found too. It refers to
neither pruner nor model, and a pickle of the layer doesn't contain it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import effective_weight, unwrap

__all__ = ["PruningMark", "check_finished", "is_finished", "mark_layers", "unmark"]

_ATTRIBUTE = "_starfire_prune_mark"


class Stage(Protocol):
    """How far a pruning has come."""

    def unfinished_text(self) -> str | None:
        """Why the pruning is not finished, and the ways out; None if it is finished."""


@dataclasses.dataclass(eq=False)
class PruningMark:
    """The mark of a layer.

    Attributes:
        name: Name of the layer in the pruned model.
        stage: How far the pruning has come; its layers share it.
        origin: The mark of the layer that this one's layer is a copy of; None if it is none.
        zeros: Number of weights that the frozen mask prunes; None before the masks are frozen.
        shape: Shape of the frozen mask.
    """

    name: str
    stage: Stage
    origin: PruningMark | None = None
    zeros: int | None = None
    shape: torch.Size | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PruningMark:
        # A pruner that is copied along has the same copy of the stage, and goes on with it
        twin = dataclasses.replace(self, stage=copy.deepcopy(self.stage, memo), origin=self)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # so that a pickled model doesn't need this package

    def error(self, layer: nn.Module) -> str | None:
        """What is wrong with passing on the weights of this layer; None if nothing is."""
        text = self.stage.unfinished_text()
        if text is not None:  # a copy may have got finished weights meanwhile
            return text if self.origin is None else self.origin.error(layer)
        weight = effective_weight(layer)
        if self.zeros is None or weight.is_meta or weight.shape != self.shape:
            return None  # another program has changed the layer
        zeros = int((weight == 0).sum())
        if zeros >= self.zeros:
            return None
        return (
            f"layer {self.name} has {zeros:,} weights that are zero, but its finished pruning has "
            f"{self.zeros:,}: its weights are from before the end of the era, or pruner.step() has "
            f"not followed each optimizer step. Use the weights that the pruner trains, follow "
            f"averages by pruner.mirror(); or pass `unfinished=True` to save or export the model "
            f"as it is"
        )


def mark_layers(
    layers: Iterable[tuple[str, nn.Module]], stage: Stage, masks: Mapping[str, Tensor]
) -> None:
    """Mark layers as pruned, in place of marks by other prunings.

    Args:
        layers: The layers by name.
        stage: How far the pruning has come.
        masks: The frozen masks by the layers' names; empty before the masks are frozen.
    """
    for name, module in layers:
        mark, mask = _mark_of(module), masks.get(name)
        if mark is None or mark.stage is not stage:
            mark = PruningMark(name, stage)
            setattr(module, _ATTRIBUTE, mark)
        mark.zeros = None if mask is None else mask.numel() - int(mask.sum())
        mark.shape = None if mask is None else mask.shape


def unmark(modules: Iterable[nn.Module], *, only_finished: bool = False) -> None:
    """Remove the marks of modules: all of them, or those of finished prunings."""
    for module in modules:
        mark = _mark_of(module)
        if mark is not None and not (only_finished and mark.error(module)):
            delattr(module, _ATTRIBUTE)


def is_finished(model: nn.Module, pruner: Stage | None = None) -> bool:
    """Whether a model's prunings by a Pruner are finished; True if there are none."""
    return next(_errors(model, pruner), None) is None


def check_finished(
    model: nn.Module, pruner: Stage | None = None, *, unfinished: bool = False
) -> None:
    """Raise PruningError, with the ways out, if a Pruner of a model has not finished.

    Args:
        model: Any model, also wrapped by DDP or `torch.compile`; one without a Pruner passes.
        pruner: A pruner of the model, in addition to those that have marked its layers.
        unfinished: Whether the user accepts an unfinished pruning.
    """
    error = None if unfinished else next(_errors(model, pruner), None)
    if error is not None:
        raise PruningError(error)


def _errors(model: nn.Module, pruner: Stage | None) -> Iterator[str]:
    text = None if pruner is None else pruner.unfinished_text()
    if text is not None:
        yield text
    for module in unwrap(model).modules():
        mark = _mark_of(module)
        error = None if mark is None else mark.error(module)
        if error is not None:
            yield error


def _mark_of(module: nn.Module) -> PruningMark | None:
    mark: PruningMark | None = vars(module).get(_ATTRIBUTE)
    return mark
