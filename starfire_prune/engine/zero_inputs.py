"""Input channels that are always zero, and the weights that read them: the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.engine.distributed import broadcast_from_first
from starfire_prune.engine.settings import Pruning
from starfire_prune.methods.registry import method_class
from starfire_prune.structure.analysis import ChannelAnalysis, per_weight
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.text import first_line

__all__ = ["ZeroInputs", "prunes_dead_inputs", "reads_any", "zero_inputs_of"]


def zero_inputs_of(
    model: nn.Module, pruning: Pruning, example_input: Tensor | tuple[Any, ...] | None
) -> ZeroInputs | None:
    """A `ZeroInputs` where `prune_dead_inputs` or the method `dead_inputs` ask for one.

    Raises:
        ValueError: If there is no `example_input`, or the model can't be exported.
    """
    others = [override.method for override in pruning.overrides if override.method is not None]
    reads = any(method_class(method).reads_zero_inputs for method in others)
    if not (pruning.prune_dead_inputs or prunes_dead_inputs(pruning) or reads):
        return None
    if example_input is None:
        raise ValueError(
            "`example_input` (=None) is needed by `prune_dead_inputs: true` and the method "
            "dead_inputs, which look into the model's graph: give a small batch such as "
            "torch.zeros(2, 3, 224, 224)"
        )
    return ZeroInputs(model, example_input)


def prunes_dead_inputs(pruning: Pruning) -> bool:
    """Whether the method of linear layers is `dead_inputs`, or another one that reads zeros."""
    return pruning.fc != "none" and method_class(pruning.fc.method).reads_zero_inputs


class ZeroInputs:
    """Finds the input channels that are zero both in training and in eval mode.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`, in any phase of pruning.
        example_input: A small batch, or the tuple of the model's arguments.

    Raises:
        TypeError: If `example_input` is neither a tensor nor a tuple.
        ValueError: If `torch.export` can't export the model in training and in eval mode.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> None:
        value: object = example_input
        if not isinstance(value, (Tensor, tuple)):
            raise TypeError(
                f"`example_input` must be a tensor such as torch.zeros(2, 3, 224, 224), or the "
                f"tuple of the model's arguments; received {type(value).__name__}"
            )
        self._device = next(model.parameters()).device
        try:
            self._analysis = ChannelAnalysis(model, example_input)
            self._analysis.zero_inputs()  # in both modes, so that a failing export is found now
        except Exception as error:  # of any type: it may come from the model's own code
            raise ValueError(
                f"`pruning.prune_dead_inputs` and the method dead_inputs need the model's graph, "
                f"which torch.export can't make with this `example_input`: {first_line(error)}"
            ) from error

    @property
    def fully_connected(self) -> frozenset[str]:
        """The convolutions that stand for linear layers."""
        return self._analysis.fully_connected()

    def reasons(self) -> dict[str, str]:
        """Why layers have no input that is always zero, by the layer's name."""
        found = self.find()
        other = "none of its constant inputs is zero while training and in eval mode alike"
        return {
            layer.name: layer.reason or other
            for layer in self._analysis.run().layers
            if not found[layer.name].any()
        }

    def find(self) -> dict[str, Tensor]:
        """The zero input channels of each layer, bool `(C,)`, as rank 0 finds them.

        Batch norms' running statistics differ between ranks until the next forward pass.
        """
        found = self._analysis.zero_inputs()
        broadcast_from_first(found.values(), self._device)
        return found

    def prune_readers(self, masks: Mapping[str, Tensor]) -> dict[str, int]:
        """Remove the weights that only read zeros from masks, in place.

        This is repeated until no further channel becomes dead. Each output neuron of a linear layer
        keeps one weight.

        Args:
            masks: Mask of each layer's weight by the layer's name.

        Returns:
            The number of weights that each layer has lost.

        Raises:
            PruningError: If a layer would lose all its weights.
        """
        lost = dict.fromkeys(masks, 0)
        while True:
            found = self.find()
            used = [
                name for name in masks if name in found
            ]  # the others aren't part of a forward pass
            numbers = {name: _prune_readers(name, masks[name], found[name]) for name in used}
            if not any(numbers.values()):
                return lost
            for name, number in numbers.items():
                lost[name] += number


def _reads(mask: Tensor, zeros: Tensor) -> Tensor:
    """The kept weights that read a zero, a bool tensor of the mask's shape.

    Args:
        mask: Mask of a weight of shape `(K, C / groups, …)`, True = kept.
        zeros: Bool tensor `(C,)`, the input channels that are zero.
    """
    return per_weight(zeros.to(mask.device), mask) & mask.bool()


def reads_any(module: nn.Module, zeros: Tensor | None) -> bool:
    """Whether a weight that is kept reads one of these zeros."""
    mask = module._buffers.get("weight_mask")
    if zeros is None or mask is None:
        return False  # a layer without a mask is due anyway
    return bool(_reads(mask, zeros).any())


def _prune_readers(name: str, mask: Tensor, zeros: Tensor) -> int:
    redundant = _reads(mask, zeros)
    if mask.ndim == 2:
        redundant = _all_but_one(redundant, mask.bool())
    number = int(torch.count_nonzero(redundant))
    if number and number == int(torch.count_nonzero(mask)):
        raise PruningError(
            f"layer {name} would lose all its weights by `prune_dead_inputs`, "
            f"since all its inputs are zero: leave it out by `exclude`, lower the amounts of the "
            f"layers before it, or set `prune_dead_inputs: false`"
        )
    if number:
        mask.masked_fill_(redundant, 0)
    return number


def _all_but_one(redundant: Tensor, kept: Tensor) -> Tensor:
    """`redundant` without the first kept weight of each row that would otherwise be emptied."""
    emptied = (kept.any(1) & ~(kept & ~redundant).any(1)).nonzero().squeeze(1)
    redundant[emptied, kept[emptied].to(torch.uint8).argmax(1)] = False
    return redundant
