"""The report of runs: summary, tables beside the paper's, curves, layers and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from starfire_prune.experiments.tables import Table
from starfire_prune.recipe.sections import Recipe
from starfire_prune.reporting.document import Report, Section, csv_text, markdown_text
from starfire_prune.reporting.grids import (
    Comparison,
    above_dense,
    compared,
    mean_top1,
    paper_grid,
    runs_grid,
    variants_grid,
)
from starfire_prune.reporting.html import html_text
from starfire_prune.reporting.labels import data_text, settings_text
from starfire_prune.reporting.layer_section import layers_section
from starfire_prune.reporting.runs import ReportedRun, Variant, variants_of
from starfire_prune.reporting.sections import accuracy_section, robustness_section, sparsity_section
from starfire_prune.reporting.style import lines_of
from starfire_prune.utils.files import replaced_folder, write_text
from starfire_prune.utils.text import first_few, number_text, spread_text

__all__ = ["build_report", "write_report"]


PICTURES: Final = "report_pictures"
"""Name of the folder with the pictures of a report."""


def build_report(
    runs: Sequence[ReportedRun], table: Table | None = None, layer: str | None = None
) -> Report:
    """Build the report of runs, with its pictures.

    Args:
        runs: The runs. Those of `table` are shown in its order, then dense ones, then the rest.
        table: A table with the paper's numbers for its runs.
        layer: Name of the convolution whose masks are shown; default: the middle one.

    Raises:
        ReportError: If a run that prunes does not prune `layer`, or a run of `table` is given
            twice.
    """
    comparison = None if table is None else compared(table, runs)
    variants = _ordered(variants_of(runs), comparison)
    lines = dict(
        zip(
            (variant.name for variant in variants),
            lines_of([variant.method for variant in variants]),
            strict=True,
        )
    )
    grid = runs_grid(variants, comparison)
    layers = layers_section(variants, layer)  # first, as it checks the layer's name
    sections = [
        Section("Results", grids=(variants_grid(variants, lines),)),
        _paper_section(comparison),
        accuracy_section(variants, lines),
        sparsity_section(variants, lines),
        robustness_section(variants, lines),
        layers,
        Section("Each run", grids=(grid,), collapsed=True),
    ]
    return Report(
        title=_title(variants, comparison),
        summary=tuple(_summary(variants)),
        caveats=tuple(_caveats(variants, comparison)),
        sections=tuple(section for section in sections if section is not None),
        runs=grid,
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html`, `report.md`, `report.csv` and the folder `report_pictures`.

    The folder replaces the one of an earlier report, with all that it contains.

    Returns:
        The path of the HTML page.

    Raises:
        OSError: If a file can't be written.
    """
    with replaced_folder(folder / PICTURES) as pictures:
        for picture in report.pictures:
            (pictures / f"{picture.name}.png").write_bytes(picture.images.light)
    write_text(folder / "report.csv", csv_text(report.runs))
    write_text(folder / "report.md", markdown_text(report, PICTURES))
    page = folder / "report.html"
    write_text(page, html_text(report))
    return page


def _ordered(variants: Iterable[Variant], comparison: Comparison | None) -> list[Variant]:
    """The variants of a table in its order, then dense ones, then the rest in their order."""
    places = comparison.places if comparison else {}

    def place(variant: Variant) -> tuple[float, bool]:
        indices = (places.get(run.folder.resolve(), math.inf) for run in variant.runs)
        return min(indices), not variant.is_dense

    return sorted(variants, key=place)


def _paper_section(comparison: Comparison | None) -> Section | None:
    grid = None if comparison is None else paper_grid(comparison)
    return None if grid is None else Section("Comparison with the paper", grids=(grid,))


# Texts


def _title(variants: Sequence[Variant], comparison: Comparison | None) -> str:
    if comparison is not None and comparison.results:
        return comparison.table.title
    if len(variants) == 1:
        return f"{variants[0].name}: {settings_text(variants)}"
    models = dict.fromkeys(variant.recipe.model.name for variant in variants)
    data = dict.fromkeys(variant.recipe.data.name for variant in variants)
    return f"{len(variants)} ways of training {', '.join(models)} on {', '.join(data)}"


def _summary(variants: Sequence[Variant]) -> Iterator[str]:
    count = sum(len(variant.runs) for variant in variants)
    kinds = f" of {len(variants)} variants" if len(variants) > 1 else ""
    yield f"{count} run{'s' * (count > 1)}{kinds}: {settings_text(variants)}."
    dense = [variant for variant in variants if variant.is_dense]
    if len(dense) == 1:
        yield f"Dense training ends at {_top1(dense[0])} % top-1."
    pruned = [
        variant for variant in variants if not variant.is_dense and mean_top1(variant) is not None
    ]
    if pruned:
        yield from _best_and_worst(pruned, variants)
        yield _furthest_from_target(pruned)


def _best_and_worst(pruned: Sequence[Variant], variants: Sequence[Variant]) -> Iterator[str]:
    """The pruned variants with the highest and the lowest mean, if all have the same data."""
    if len({data_text(variant.recipe) for variant in variants}) > 1:
        return
    ranked = sorted(pruned, key=lambda variant: mean_top1(variant) or 0.0)
    best, worst = ranked[-1], ranked[0]
    if best is worst:
        yield f"Pruned training ends at {_top1(best)} % top-1{_to_dense(best, variants)}."
        return
    yield (
        f"The highest of the pruned variants is {best.name}, at {_top1(best)} % top-1"
        f"{_to_dense(best, variants)}."
    )
    yield f"The lowest is {worst.name}, at {_top1(worst)} %{_to_dense(worst, variants)}."


def _furthest_from_target(pruned: Sequence[Variant]) -> str:
    gaps = [
        (abs(run.numbers.reached - run.numbers.asked), run)
        for variant in pruned
        for run in variant.counted
        if run.numbers.reached is not None
    ]
    gap, run = max(gaps, key=lambda pair: pair[0], default=(0.0, None))
    if run is None or gap <= 1.0:
        return "All sparse runs have reached the sparsity asked for within 1 point."
    return (
        f"{run.name} is furthest from the sparsity asked for: "
        f"{number_text(run.numbers.asked, 1)} % asked, {number_text(run.numbers.reached, 1)} % "
        f"reached."
    )


def _top1(variant: Variant) -> str:
    return spread_text([run.numbers.last_top1 for run in variant.counted], len(variant.runs))


def _to_dense(variant: Variant, variants: Sequence[Variant]) -> str:
    above = above_dense(variant, variants)
    return "" if above is None else f" ({number_text(above, sign=True)} points to dense)"


def _named(variants: Sequence[Variant], belongs: Callable[[ReportedRun], bool]) -> list[str]:
    """The names of the runs of which something is true."""
    return [run.name for variant in variants for run in variant.runs if belongs(run)]


def _caveats(variants: Sequence[Variant], comparison: Comparison | None) -> Iterator[str]:
    """Sentences on what limits a comparison of the runs."""
    yield from _unlike("data sets", variants, data_text, ": their accuracies can't be compared")
    yield from _unlike("models", variants, lambda recipe: recipe.model.name)
    yield from _unlike("numbers of epochs", variants, lambda recipe: str(recipe.total_epochs))
    behind = [
        f"{run.name} ({run.numbers.epochs} of {run.recipe.total_epochs} epochs)"
        for variant in variants
        for run in variant.runs
        if not run.finished
    ]
    if behind:
        yield (
            f"Not finished: {first_few(behind, 8)}. They count in means only if no run of their "
            f"variant is finished, with the epochs that are done."
        )
    unpruned = _named(variants, lambda run: not run.is_pruned)
    if unpruned:
        yield (
            f"The pruning is not finished: {first_few(unpruned, 8)}. Their weights have not "
            f"reached the sparsity asked for."
        )
    averaged = _named(variants, lambda run: run.numbers.average_top1 is not None)
    if averaged:
        yield (
            f"Exported with a moving average of the weights: {first_few(averaged, 8)}. Its top-1 "
            f"is in the table of runs; curves and means are of the trained weights."
        )
    quantized = _named(variants, lambda run: run.numbers.float_top1 is not None)
    if quantized:
        yield (
            f"The last epochs are measured in int8, after training with its rounding: "
            f"{first_few(quantized, 8)}. Their top-1 before is in the table of runs."
        )
    yield from _copies(variants)
    if comparison is not None:
        if comparison.missing:
            yield f"Runs of the table that are not reported: {first_few(comparison.missing, 8)}."
        for error in comparison.errors:
            yield f"Not compared with the paper: {error}."


def _copies(variants: Sequence[Variant]) -> Iterator[str]:
    """A sentence on each seed with which a variant has several runs."""
    for variant in variants:
        by_seed: dict[int, list[str]] = {}
        for run in variant.runs:
            by_seed.setdefault(run.recipe.seed, []).append(str(run.folder))
        for seed, folders in by_seed.items():
            if len(folders) > 1:
                yield (
                    f"The same settings and the same seed {seed} have {first_few(folders, 8)}. If "
                    f"they are copies, means count one run several times, and deviations are too "
                    f"small."
                )


def _unlike(
    what: str, variants: Sequence[Variant], key: Callable[[Recipe], str], consequence: str = ""
) -> Iterator[str]:
    """A sentence on which variants have which value, if they differ in it."""
    groups: dict[str, list[str]] = {}
    for variant in variants:
        groups.setdefault(key(variant.recipe), []).append(variant.name)
    if len(groups) > 1:
        values = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
        yield f"The runs have different {what}{consequence} ({values})."
