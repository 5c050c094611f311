"""The pruning era: after each update, the masks are brought to the schedule's amounts."""

from __future__ import annotations

from collections.abc import Iterable

from starfire_prune.engine.plain_keys import add_plain_keys
from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.engine.zero_inputs import ZeroInputs, reads_any
from starfire_prune.methods.base import MaskMethod, find_hook

__all__ = ["Era"]

Counts = tuple[tuple[int, int], ...]


class Era:
    """Brings the masks of layers to their amounts as the era proceeds.

    Args:
        layers: The layers that are pruned.
        resolution: The rise of a layer's sparsity that is worth a new mask, in [0, 1).
        zero_inputs: Finds the channels that are always zero, for the layers whose methods use them.

    Attributes:
        applied: The progress of the era, in [0, 1], at which each layer's mask was last computed,
            by the layer's name.
    """

    def __init__(
        self, layers: Iterable[PrunedLayer], resolution: float, zero_inputs: ZeroInputs | None
    ) -> None:
        layers = list(layers)
        self.applied: dict[str, float] = {}
        self._resolution = resolution
        self._zero_inputs = zero_inputs
        self._layers = [layer for layer in layers if not layer.method.reads_zero_inputs]
        self._readers = [layer for layer in layers if layer.method.reads_zero_inputs]
        self._counts: dict[str, tuple[float, Counts]] = {}  # of each layer, at a progress

    def update_masks(self, progress: float) -> list[str]:
        """Bring every layer whose counts have risen enough to its amount at `progress`.

        Returns:
            The names of the layers whose masks were computed again.

        Raises:
            ValueError: For weights that are NaN or infinite, with the layer's name.
        """
        changed = [layer.name for layer in self._layers if self._update(layer, progress)]
        if self._readers:  # after the layers whose channels die
            changed += self._update_readers(progress, bool(changed))
        return changed

    def _update_readers(self, progress: float, others_changed: bool) -> list[str]:
        """Update the layers whose methods use the channels that are always zero."""
        is_first = any(layer.name not in self.applied for layer in self._readers)
        may_differ = others_changed or is_first or progress == 1.0
        found = self._zero_inputs.find() if self._zero_inputs and may_differ else {}
        changed = []
        for layer in self._readers:
            zeros = found.get(layer.name)
            if zeros is not None:
                layer = layer.with_zero_inputs(zeros)
            if self._update(layer, progress, force=reads_any(layer.module, zeros)):
                changed.append(layer.name)
        return changed

    def _update(self, layer: PrunedLayer, progress: float, *, force: bool = False) -> bool:
        """Compute a layer's mask again if it is due; whether it was."""
        method = layer.method_at(progress)
        if not force and not self._is_due(layer, method, progress):
            return False
        try:
            if find_hook(layer.module, "weight")[1] is None:
                method.register(layer.module, "weight")
            add_plain_keys(layer.module)
            method.tighten(layer.module, "weight")
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from None
        self.applied[layer.name] = progress
        return True

    def _is_due(self, layer: PrunedLayer, method: MaskMethod, progress: float) -> bool:
        """Masks are monotone: between two rises of a count the present mask is still exact."""
        if layer.name not in self.applied or progress == 1.0:
            return True
        before, now = self._applied_counts(layer), method.counts(layer.shape)
        if len(before) != len(now):  # another stage of the method
            return True
        risen = [
            (pruned - pruned_before) / units
            for (pruned, units), (pruned_before, _) in zip(now, before, strict=True)
        ]
        return max(risen, default=0.0) > 0 and max(risen) >= self._resolution

    def _applied_counts(self, layer: PrunedLayer) -> Counts:
        """The counts of a layer's present mask."""
        progress, counts = self._counts.get(layer.name, (None, ()))
        if progress != self.applied[layer.name] or layer.method.reads_zero_inputs:
            progress = self.applied[layer.name]
            counts = layer.method_at(progress).counts(layer.shape)
            self._counts[layer.name] = progress, counts
        return counts
