"""The part of a report on layers and masks of single runs, read from their exported weights."""

from __future__ import annotations

from collections.abc import Sequence

from starfire_prune.engine.sparsity import LayerSparsity, Sparsity
from starfire_prune.reporting.document import Picture, Section
from starfire_prune.reporting.figures import bars
from starfire_prune.reporting.labels import file_name, numbered, settings_text, titled_picture
from starfire_prune.reporting.mask_figures import masks_picture
from starfire_prune.reporting.runs import ReportedRun, Variant
from starfire_prune.reporting.tables import era_text

__all__ = ["chosen_layer", "layers_section"]


def layers_section(variants: Sequence[Variant], layer: str | None = None) -> Section | None:
    """Sparsity of each layer, and the masks, of a run of each variant that prunes.

    Args:
        variants: of which those are shown that have a finished run.
        layer: the convolution whose masks are shown; by default the middle one.

    Returns:
        The section; None where no variant is shown.
    """
    pictures: list[Picture] = []
    for own in variants:
        run = next((run for run in own.runs if run.sparsity is not None), None)
        if own.method != "dense" and run is not None and run.sparsity is not None:
            pictures.append(_layers(own, run, run.sparsity))
            pictures.append(_masks(own, run, run.sparsity, layer))
    if not pictures:
        return None
    text = (
        "The run with the lowest seed of each variant that prunes, read from its exported weights."
        if any(len(own.runs) > 1 for own in variants)
        else "Read from the exported weights."
    )
    return Section("Layers and masks", text, pictures=tuple(numbered(pictures)))


def chosen_layer(sparsity: Sparsity, name: str | None = None) -> LayerSparsity | None:
    """The convolution whose masks are shown: the middle one of those pruned, larger than a point.

    Raises:
        KeyError: if none of that name is pruned; the message names those that are.
    """
    convs = [own for own in sparsity.layers if own.selected and own.kind == "conv"]
    if name is not None:
        for own in convs:
            if own.name == name:
                return own
        raise KeyError(name)
    larger = [own for own in convs if any(side > 1 for side in own.shape[2:])] or convs
    return larger[len(larger) // 2] if larger else None


def _layers(variant: Variant, run: ReportedRun, sparsity: Sparsity) -> Picture:
    layers = [own for own in sparsity.layers if own.selected]
    low = min(layers, key=lambda own: own.sparsity)
    high = max(layers, key=lambda own: own.sparsity)
    told = (
        f"{len(layers)} pruned layers, from {low.sparsity:.1%} ({low.name}) to {high.sparsity:.1%} "
        f"({high.name})"
    )
    dense = len(sparsity.layers) - len(layers)
    rest = f"; {dense} more are left dense" if dense else ""
    return titled_picture(
        f"layers-{file_name(variant.name)}",
        f"{variant.name}: sparsity of its layers",
        f"As in the paper's Figure 5: {told}{rest}. Settings: {_run_text(run)}.",
        f"Bars of sparsity a layer: {told}.",
        bars(layers, run.numbers.asked),
    )


def _masks(variant: Variant, run: ReportedRun, sparsity: Sparsity, name: str | None) -> Picture:
    conv = chosen_layer(sparsity, name)
    linears = [own for own in sparsity.layers if own.selected and own.kind == "linear"]
    linear = linears[-1] if linears else None
    parts = []
    if conv is not None:
        parts.append(
            f"{conv.name}, of shape {'×'.join(map(str, conv.shape))}, has {conv.sparsity:.1%} "
            f"zeros and {conv.pruned_kernels:,} of {conv.shape[0] * conv.shape[1]:,} kernels "
            f"pruned"
        )
    if linear is not None:
        parts.append(f"{linear.name} has {linear.sparsity:.1%} zeros")
    told = "; ".join(parts)
    return titled_picture(
        f"masks-{file_name(variant.name)}",
        f"{variant.name}: its masks",
        f"As in the paper's Figure 2; blue weights are kept. On the right a pixel is a kernel, the "
        f"fainter the fewer of its weights are kept: {told}. Settings: {_run_text(run)}."
        if conv is not None
        else f"Blue weights are kept: {told}. Settings: {_run_text(run)}.",
        f"Masks: {told}.",
        masks_picture(
            None if conv is None else run.mask(conv.name),
            None if linear is None else run.mask(linear.name),
        ),
    )


def _run_text(run: ReportedRun) -> str:
    """The settings of a run and of its pruning."""
    pruning = run.recipe.pruning
    what = "dense" if pruning == "none" else f"{pruning.method} to {100 * pruning.amount:g} %"
    return f"{what} in epochs {era_text(pruning)}, {settings_text([Variant('', (run,))])}"
