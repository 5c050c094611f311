"""The section of a report on layers and masks, read from the exported weights of runs."""

from __future__ import annotations

from collections.abc import Sequence

from starfire_prune.engine.sparsity import LayerSparsity, Sparsity
from starfire_prune.reporting.document import Picture, Section
from starfire_prune.reporting.figures import bars
from starfire_prune.reporting.grids import era_text
from starfire_prune.reporting.labels import file_name, numbered, settings_text
from starfire_prune.reporting.mask_figures import masks_picture
from starfire_prune.reporting.runs import ReportedRun, ReportError, Variant
from starfire_prune.utils.text import first_few

__all__ = ["chosen_layer", "layers_section"]


def layers_section(variants: Sequence[Variant], layer: str | None = None) -> Section | None:
    """The sparsity of each layer and the masks, for one run of each variant that prunes.

    Args:
        variants: The variants; those without a finished run are left out.
        layer: Name of the convolution whose masks are shown; default: the middle one.

    Returns:
        The section; None if no variant is left.

    Raises:
        ReportError: If a run that would be shown does not prune the convolution `layer`.
    """
    pictures: list[Picture] = []
    for variant in variants:
        run = next((run for run in variant.runs if run.sparsity is not None), None)
        if not variant.is_dense and run is not None and run.sparsity is not None:
            masks = _masks(variant, run, run.sparsity, chosen_layer(run, layer))
            pictures += [_layers(variant, run, run.sparsity), masks]
    if not pictures:
        return None
    text = (
        "The run with the lowest seed of each variant that prunes, read from its exported weights."
        if any(len(variant.runs) > 1 for variant in variants)
        else "Read from the exported weights."
    )
    return Section("Layers and masks", text, pictures=tuple(numbered(pictures)))


def chosen_layer(run: ReportedRun, name: str | None = None) -> LayerSparsity | None:
    """The convolution whose masks are shown: by default the middle pruned one larger than 1×1.

    Raises:
        ReportError: If no convolution that the run prunes has this name.
    """
    layers = run.sparsity.layers if run.sparsity is not None else ()
    convs = [layer for layer in layers if layer.selected and layer.kind == "conv"]
    by_name = {layer.name: layer for layer in convs}
    if name in by_name:
        return by_name[name]
    if name is not None:
        raise ReportError(
            f"--layer (={name}) is not a convolution that {run.folder} prunes; it prunes "
            f"{first_few([*by_name], 8)}"
        )
    larger = [layer for layer in convs if any(side > 1 for side in layer.shape[2:])] or convs
    return larger[len(larger) // 2] if larger else None


def _layers(variant: Variant, run: ReportedRun, sparsity: Sparsity) -> Picture:
    layers = [layer for layer in sparsity.layers if layer.selected]
    low = min(layers, key=lambda layer: layer.sparsity)
    high = max(layers, key=lambda layer: layer.sparsity)
    text = (
        f"{len(layers)} pruned layers, from {low.sparsity:.1%} ({low.name}) to {high.sparsity:.1%} "
        f"({high.name})"
    )
    dense = len(sparsity.layers) - len(layers)
    rest = f"; {dense} more are not pruned" if dense else ""
    return Picture(
        f"layers-{file_name(variant.name)}",
        f"{variant.name}: sparsity of the layers",
        f"As in the paper's Figure 5: {text}{rest}. Settings: {_run_text(run)}.",
        f"Bars of the sparsity of each layer: {text}.",
        bars(layers, run.numbers.asked),
    )


def _masks(
    variant: Variant, run: ReportedRun, sparsity: Sparsity, conv: LayerSparsity | None
) -> Picture:
    linears = [layer for layer in sparsity.layers if layer.selected and layer.kind == "linear"]
    linear = linears[-1] if linears else None
    parts = []
    if conv is not None:
        parts.append(
            f"{conv.name}, of shape {'×'.join(map(str, conv.shape))}, has {conv.sparsity:.1%} "
            f"zeros and {conv.pruned_kernels:,} of {conv.shape[0] * conv.shape[1]:,} kernels pruned"
        )
    if linear is not None:
        parts.append(f"{linear.name} has {linear.sparsity:.1%} zeros")
    text = "; ".join(parts)
    return Picture(
        f"masks-{file_name(variant.name)}",
        f"{variant.name}: masks",
        f"As in the paper's Figure 2; blue weights are kept. On the right each pixel is a kernel: "
        f"the stronger its blue, the more weights it keeps. {text}. Settings: {_run_text(run)}."
        if conv is not None
        else f"Blue weights are kept. {text}. Settings: {_run_text(run)}.",
        f"Masks: {text}.",
        masks_picture(
            None if conv is None else run.mask(conv.name),
            None if linear is None else run.mask(linear.name),
        ),
    )


def _run_text(run: ReportedRun) -> str:
    """The settings of a run and its pruning."""
    pruning = run.recipe.pruning
    what = "dense" if pruning == "none" else f"{pruning.method} to {100 * pruning.amount:g} %"
    return f"{what} in epochs {era_text(pruning)}, {settings_text([Variant('', (run,))])}"
