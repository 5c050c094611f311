"""The tables of a report: variants, runs, the paper's numbers, and robustness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from starfire_prune.experiments.results import RunResult, compared_cells, read_result
from starfire_prune.experiments.run_numbers import LAST_EPOCHS, RunNumbers
from starfire_prune.experiments.settings import Column
from starfire_prune.experiments.tables import Run, Table
from starfire_prune.reporting.attacks import accuracy, columns_of
from starfire_prune.reporting.document import Grid
from starfire_prune.reporting.runs import ReportedRun, ReportError, Variant, settings_key
from starfire_prune.reporting.style import Line
from starfire_prune.utils.text import ABSENT, mean_of, number_text, spread_text

__all__ = [
    "Comparison",
    "above_dense",
    "compared",
    "era_text",
    "mean_top1",
    "paper_grid",
    "robustness_grid",
    "runs_grid",
    "variants_grid",
]


_Numbers = Mapping[str, tuple[Callable[[RunNumbers], float | None], int, bool]]
_NUMBERS: Final[_Numbers] = {
    # heading: number, digits, whether a positive number has a sign
    "top-1, last epoch [%]": (lambda run: run.last_top1, 2, False),
    "top-1, best epoch [%]": (lambda run: run.best_top1, 2, False),
    "best epoch": (lambda run: run.best_epoch, 0, False),
    f"gain, last {LAST_EPOCHS} epochs": (lambda run: run.gain, 2, True),
    "sparsity asked [%]": (lambda run: run.asked, 1, False),
    "reached [%]": (lambda run: run.reached, 1, False),
}
_OF_RUNS: Final[_Numbers] = {
    "reached in pruned layers [%]": (lambda run: run.reached_selected, 1, False),
    "top-5, last epoch [%]": (lambda run: run.last_top5, 2, False),
}
_AVERAGED: Final[_Numbers] = {
    "top-1 of the average [%]": (lambda run: run.average_top1, 2, False),
}
_QUANTIZED: Final[_Numbers] = {
    "top-1 before int8 [%]": (lambda run: run.float_top1, 2, False),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs of a table among the reported runs.

    Attributes:
        table: The table with the paper's numbers.
        results: Results of its reported runs, in the table's order.
        places: Resolved folders of reported runs, with the index of the table's run of that name.
            Runs that are not that run are left out if another one is.
        missing: Names of the folders of its runs that are not reported.
        errors: Why a run has the name of one of the table's and isn't that run, a sentence each.
    """

    table: Table
    results: tuple[RunResult, ...]
    places: Mapping[Path, int]
    missing: tuple[str, ...]
    errors: tuple[str, ...]


def compared(table: Table, runs: Sequence[ReportedRun]) -> Comparison:
    """Find the runs of a table, by the names of their folders and their recipes.

    Raises:
        ReportError: If there are several runs of the same name and recipe.
    """
    by_name: dict[str, list[Path]] = {}
    for reported in runs:
        by_name.setdefault(reported.name, []).append(reported.folder.resolve())
    places: dict[Path, int] = {}
    results, errors = [], []
    for place, run in enumerate(table.runs):
        read = {folder: read_result(run, folder.parent) for folder in by_name.get(run.folder, ())}
        sound = [folder for folder, result in read.items() if not result.error]
        _check_single(table, run, sound)
        results += [read[folder] for folder in sound]
        errors += [result.error for result in read.values() if result.error]
        for folder in sound or read:
            places.setdefault(folder, place)
    missing = dict.fromkeys(run.folder for run in table.runs if run.folder not in by_name)
    return Comparison(table, tuple(results), places, tuple(missing), tuple(dict.fromkeys(errors)))


def _check_single(table: Table, run: Run, folders: Sequence[Path]) -> None:
    if len(folders) > 1:
        raise ReportError(
            f"{' and '.join(map(str, folders))} are the same run of {table.name}, {run.folder}: "
            f"leave out all but one"
        )


def mean_top1(variant: Variant) -> float | None:
    """Mean top-1 in percent after the last epoch, of the finished runs if there are any."""
    return mean_of(run.numbers.last_top1 for run in variant.counted)


def above_dense(variant: Variant, variants: Sequence[Variant]) -> float | None:
    """The mean top-1 less that of the dense variant with the same other settings, in points.

    None if there is no such dense variant, or this is it.
    """
    key = settings_key(variant.recipe, pruning=False)
    mean = mean_top1(variant)
    for other in variants:
        is_dense = other.is_dense and settings_key(other.recipe, pruning=False) == key
        if is_dense and other is not variant and mean is not None:
            dense = mean_top1(other)
            return None if dense is None else mean - dense
    return None


def variants_grid(variants: Sequence[Variant], lines: Mapping[str, Line]) -> Grid:
    """The table of variants, with means over their seeds."""
    header = ["variant", *_NUMBERS, "method", "era", "epochs", "runs"]
    at = header.index("top-1, last epoch [%]") + 1
    header.insert(at, "to dense")
    rows = []
    for variant in variants:
        numbers = [run.numbers for run in variant.counted]
        cells = [
            spread_text([value(run) for run in numbers], len(variant.runs), digits, sign=sign)
            for value, digits, sign in _NUMBERS.values()
        ]
        name, *kind = _variant_cells(variant)
        row = [name, *cells, *kind, _epochs(variant), str(len(variant.runs))]
        row.insert(at, number_text(above_dense(variant, variants), sign=True))
        rows.append(_asked_once(row, header, variant))
    caption = (
        "Means ± standard deviations over the seeds. Sparsity is the share of zeros in all "
        "convolution and linear weights. Epochs count from 1."
    )
    swatches = tuple(_swatch(lines[variant.name]) for variant in variants)
    left = (0, header.index("method"), header.index("era"))
    return Grid(caption, tuple(header), tuple(map(tuple, rows)), left, swatches)


def runs_grid(variants: Sequence[Variant], comparison: Comparison | None = None) -> Grid:
    """The table of runs, with the paper's numbers and accuracies under attack."""
    runs = [run.numbers for variant in variants for run in variant.runs]
    averaged = any(run.average_top1 is not None for run in runs)
    quantized = any(run.float_top1 is not None for run in runs)
    rare = {**(_AVERAGED if averaged else {}), **(_QUANTIZED if quantized else {})}
    numbers = {**_NUMBERS, **_OF_RUNS, **rare}
    attacks = columns_of(run.evaluation for variant in variants for run in variant.runs)
    columns = _paper_columns(comparison) if comparison else []
    header = [
        *("run", "variant", "method", "era", "seed", "model", "data", "epochs done", "epochs"),
        *numbers,
        *(f"{column.name}{suffix}" for column in columns for suffix in (", table", ", paper")),
        *(name for name, _, _ in attacks),
    ]
    rows = []
    for variant in variants:
        for run in variant.runs:
            recipe = run.recipe
            rows.append(
                (
                    *(str(run.folder), *_variant_cells(variant), str(recipe.seed)),
                    *(recipe.model.name, recipe.data.name),
                    *(str(run.numbers.epochs), str(recipe.total_epochs)),
                    *(
                        number_text(value(run.numbers), digits, sign=sign)
                        for value, digits, sign in numbers.values()
                    ),
                    *_paper_cells(run, comparison, columns),
                    *(
                        number_text(accuracy(run.evaluation, attack, epsilon))
                        for _, attack, epsilon in attacks
                    ),
                )
            )
    caption = f"Each of the {len(rows)} runs" if len(rows) > 1 else "The run"
    return Grid(caption, tuple(header), tuple(rows), (0, 1, 2, 3, 5, 6))


def paper_grid(comparison: Comparison) -> Grid | None:
    """The paper's numbers beside the measured ones; None if it has none of these runs."""
    columns = _paper_columns(comparison)
    if not columns:
        return None
    by_name: dict[str, list[RunResult]] = {}
    for result in comparison.results:
        if result.run.paper:
            by_name.setdefault(result.run.name, []).append(result)
    header = ["run"]
    for column in columns:
        header += [_column_name(column), "paper", "difference"]
    rows = [
        (
            name,
            *(
                cell
                for column in columns
                for cell in compared_cells(results, column, _digits(column))
            ),
        )
        for name, results in by_name.items()
    ]
    caption = f"{comparison.table.title}: measured, the paper's number, and the difference."
    return Grid(caption, tuple(header), tuple(rows))


def robustness_grid(variants: Sequence[Variant], lines: Mapping[str, Line]) -> Grid:
    """Top-1 of variants under each attack with which any of their runs was evaluated."""
    evaluated = [variant for variant in variants if any(run.evaluation for run in variant.runs)]
    columns = columns_of(run.evaluation for variant in evaluated for run in variant.runs)
    rows = [
        (
            variant.name,
            *(
                spread_text(
                    [accuracy(run.evaluation, attack, epsilon) for run in variant.runs],
                    len(variant.runs),
                )
                for _, attack, epsilon in columns
            ),
        )
        for variant in evaluated
    ]
    caption = "Top-1 on clean and on attacked images: means ± standard deviations over the seeds."
    header = ("variant", *(name for name, _, _ in columns))
    return Grid(
        caption, header, tuple(rows), swatches=tuple(_swatch(lines[row[0]]) for row in rows)
    )


def era_text(recipe_pruning: object) -> str:
    """The epochs or updates, from 1, in which a recipe prunes."""
    era, updates = (getattr(recipe_pruning, key, None) for key in ("era", "era_updates"))
    if updates is not None:
        return f"updates {updates[0] + 1:,}–{updates[1]:,}"
    return ABSENT if era is None else f"{era[0] + 1}–{era[1]}"


def _variant_cells(variant: Variant) -> tuple[str, str, str]:
    return variant.name, variant.method, era_text(variant.recipe.pruning)


def _epochs(variant: Variant) -> str:
    """The epochs of a variant, with the epochs done in its unfinished runs."""
    behind = [str(run.numbers.epochs) for run in variant.runs if not run.finished]
    done = f" ({', '.join(behind)} done)" if behind else ""
    return f"{variant.recipe.total_epochs}{done}"


def _asked_once(row: list[str], header: Sequence[str], variant: Variant) -> list[str]:
    """The row with the sparsity asked for, which all runs share, instead of its mean."""
    row[header.index("sparsity asked [%]")] = number_text(variant.runs[0].numbers.asked, 1)
    return row


def _swatch(line: Line) -> tuple[str | None, tuple[float, ...]]:
    return line.colour, line.dashes


def _paper_columns(comparison: Comparison) -> list[Column]:
    given = {name for result in comparison.results for name in result.run.paper}
    return [column for column in comparison.table.columns if column.name in given]


def _column_name(column: Column) -> str:
    return column.name if column.metric == "best_epoch" else f"{column.name} [%]"


def _digits(column: Column) -> int:
    return 0 if column.metric == "best_epoch" else 2


def _paper_cells(
    run: ReportedRun, comparison: Comparison | None, columns: Sequence[Column]
) -> list[str]:
    """The numbers of a run in the table's columns, each with the paper's."""
    results: Sequence[RunResult] = ()
    if comparison is not None and run.folder.resolve() in comparison.places:
        results = [result for result in comparison.results if result.run.folder == run.name]
    cells = []
    for column in columns:
        found = [result for result in results if column.name in result.run.paper]
        measured = found[0].value(column) if found else None
        paper = found[0].run.paper[column.name] if found else None
        cells += [number_text(measured, _digits(column)), number_text(paper, _digits(column))]
    return cells
