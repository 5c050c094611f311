"""The pruning era: after each update, the masks are brought to the schedule's amounts."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.engine.zero_inputs import ZeroInputs, reads_any
from starfire_prune.methods.base import MaskMethod, find_hook

__all__ = ["update_masks"]


def update_masks(
    layers: Iterable[PrunedLayer],
    progress: float,
    applied: MutableMapping[str, float],
    *,
    resolution: float,
    zero_inputs: ZeroInputs | None,
) -> list[str]:
    """Bring every layer whose counts have risen enough to its amount at `progress`.

    Args:
        layers: The layers that are pruned.
        progress: The progress of the era, in [0, 1].
        applied: The progress at which each layer's mask was last computed; it is updated.
        resolution: The rise of a layer's sparsity that is worth a new mask, in [0, 1).
        zero_inputs: Finds the channels that are always zero, for the layers whose methods use them.

    Returns:
        The names of the layers whose masks were computed again.

    Raises:
        ValueError: For weights that are NaN or infinite, with the layer's name.
    """
    others: list[PrunedLayer] = []
    readers: list[PrunedLayer] = []
    for layer in layers:
        (readers if layer.method.reads_zero_inputs else others).append(layer)
    changed = [layer.name for layer in others if _update(layer, progress, applied, resolution)]
    if not readers:
        return changed
    # After the layers whose channels die
    is_first = any(layer.name not in applied for layer in readers)
    is_due = bool(changed) or is_first or progress == 1.0
    found = zero_inputs.find() if zero_inputs and is_due else {}
    for layer in readers:
        zeros = found.get(layer.name)
        if zeros is not None:
            layer = layer.with_zero_inputs(zeros)
        force = reads_any(layer.module, zeros)
        if _update(layer, progress, applied, resolution, force=force):
            changed.append(layer.name)
    return changed


def _update(
    layer: PrunedLayer,
    progress: float,
    applied: MutableMapping[str, float],
    resolution: float,
    *,
    force: bool = False,
) -> bool:
    """Compute a layer's mask again if it is due; whether it was."""
    method = layer.method_at(progress)
    if not force and not _is_due(layer, method, progress, applied.get(layer.name), resolution):
        return False
    try:
        if find_hook(layer.module, "weight")[1] is None:
            method.register(layer.module, "weight")
        method.tighten(layer.module, "weight")
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: {error}") from None
    applied[layer.name] = progress
    return True


def _is_due(
    layer: PrunedLayer,
    method: MaskMethod,
    progress: float,
    applied: float | None,
    resolution: float,
) -> bool:
    """Masks are monotone: between two rises of a count the present mask is still exact."""
    if applied is None or progress == 1.0:
        return True
    before, now = layer.method_at(applied).counts(layer.shape), method.counts(layer.shape)
    if len(before) != len(now):  # another stage of the method
        return True
    risen = [
        (pruned - pruned_before) / units
        for (pruned, units), (pruned_before, _) in zip(now, before, strict=True)
    ]
    return max(risen, default=0.0) > 0 and max(risen) >= resolution
