"""Which weights of a model in training only ever read zeros, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starfire_prune.engine.distributed import broadcast_from_first
from starfire_prune.structure.analysis import ChannelAnalysis, over_weight
from starfire_prune.utils.errors import PruningError

if TYPE_CHECKING:
    from starfire_prune.engine.settings import Pruning

__all__ = ["ZeroInputs", "prunes_dead_inputs", "reads_any", "zero_inputs_of"]


def zero_inputs_of(
    model: nn.Module, pruning: Pruning, example_input: Tensor | tuple[Any, ...] | None
) -> ZeroInputs | None:
    """A `ZeroInputs` where `prune_dead_inputs` or the method `dead_inputs` ask for one.

    Raises:
        ValueError: if they do without an `example_input`, or the model can't be exported.
    """
    methods = [override.method for override in pruning.overrides]
    if (
        not pruning.prune_dead_inputs
        and not prunes_dead_inputs(pruning)
        and "dead_inputs" not in methods
    ):
        return None
    if example_input is None:
        raise ValueError(
            "`example_input` (=None) is needed by `prune_dead_inputs: true` and the method "
            "dead_inputs, which look into the model's graph: give a small batch such as "
            "torch.zeros(2, 3, 224, 224)"
        )
    return ZeroInputs(model, example_input)


def prunes_dead_inputs(pruning: Pruning) -> bool:
    """Whether linear layers, and convolutions that stand for them, are pruned by `dead_inputs`."""
    return pruning.fc != "none" and pruning.fc.method == "dead_inputs"


class ZeroInputs:
    """Finds the input channels that are zero while training and in eval mode alike.

    Args:
        model: also wrapped by DDP or `torch.compile`, in any phase of pruning.
        example_input: a small batch, or the tuple of the model's arguments.

    Raises:
        TypeError: if `example_input` is neither a tensor nor a tuple.
        ValueError: if `torch.export` can't export the model in training and in eval mode.
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
            self._analysis.zero_inputs()  # in both modes: what can't be exported is told now
        except Exception as error:  # of many kinds, as the model's code fails or isn't understood
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"`pruning.prune_dead_inputs` and the method dead_inputs need the model's graph, "
                f"which torch.export can't make with this `example_input`: {first}"
            ) from error

    @property
    def fully_connected(self) -> frozenset[str]:
        """The convolutions that stand for linear layers."""
        return self._analysis.fully_connected()

    def reasons(self) -> dict[str, str]:
        """Why a layer has no input that is always zero, by its name; of those that have none."""
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
        """Take the weights that only read zeros out of masks, in place, by the layer's name.

        Until no further channel dies of it. Of a linear layer's weights each output neuron keeps
        one all the same.

        Returns:
            How many weights each layer lost.

        Raises:
            PruningError: if a layer would lose all its weights.
        """
        taken = dict.fromkeys(masks, 0)
        while True:
            found = self.find()
            used = [name for name in masks if name in found]  # not what no forward pass reaches
            numbers = {name: _take(name, masks[name], found[name]) for name in used}
            if not any(numbers.values()):
                return taken
            for name, number in numbers.items():
                taken[name] += number


def _reads(mask: Tensor, zeros: Tensor) -> Tensor:
    """Which kept weights read a zero, bool of the mask's shape.

    Args:
        mask: of a weight `(K, C / groups, …)`, True = kept.
        zeros: bool `(C,)`, the input channels that are zero.
    """
    return over_weight(zeros.to(mask.device), mask) & mask.bool()


def reads_any(module: nn.Module, zeros: Tensor | None) -> bool:
    """Whether a weight that is kept reads one of these zeros."""
    mask = module._buffers.get("weight_mask")
    if zeros is None or mask is None:
        return False  # at first a layer is due anyway
    return bool(_reads(mask, zeros).any())


def _take(name: str, mask: Tensor, zeros: Tensor) -> int:
    useless = _reads(mask, zeros)
    if mask.ndim == 2:
        useless = _all_but_one(useless, mask.bool())
    number = int(torch.count_nonzero(useless))
    if number and number == int(torch.count_nonzero(mask)):
        raise PruningError(
            f"layer {name} would lose all its weights by `prune_dead_inputs`, "
            f"since all its inputs are zero: leave it out by `exclude`, lower the amounts of the "
            f"layers before it, or set `prune_dead_inputs: false`"
        )
    if number:
        mask.masked_fill_(useless, 0)
    return number


def _all_but_one(useless: Tensor, kept: Tensor) -> Tensor:
    """`useless` without the first kept weight of each row that would lose all it has."""
    emptied = (kept.any(1) & ~(kept & ~useless).any(1)).nonzero().squeeze(1)
    useless[emptied, kept[emptied].to(torch.uint8).argmax(1)] = False
    return useless
