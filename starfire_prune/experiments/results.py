"""The results of a table's runs, read from their folders and set beside the paper's numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from starfire_prune.experiments.run_numbers import RunNumbers, percent_of, run_numbers
from starfire_prune.experiments.settings import Column
from starfire_prune.experiments.tables import Run, Table
from starfire_prune.recipe.compare import differing_keys, resume_differences
from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import QUANTIZATION_PHASE, RunError, exported_file, read_metrics
from starfire_prune.utils.settings import RecipeError
from starfire_prune.utils.text import first_line, format_columns, mean_of, number_text, spread_text

__all__ = ["RunResult", "compared_cells", "format_results", "read_result"]


Metrics = Mapping[int, Mapping[str, Any]]
_KEYS: Final = {"top1": "top1", "top5": "top5", "sparsity": "sparsity_network"}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The contents of a run's folder.

    Attributes:
        run: The run whose folder it is.
        metrics: The lines of `metrics.jsonl`, by the number of epochs done at that time.
        finished: Whether all epochs are done and the weights are exported.
        error: Why the folder can't be read as this run's, in a sentence; empty if it can.
    """

    run: Run
    metrics: Metrics = dataclasses.field(default_factory=dict)
    finished: bool = False
    error: str = ""

    @functools.cached_property
    def numbers(self) -> RunNumbers:
        """The numbers that its metrics give."""
        pruning = self.run.recipe.pruning
        amount = 0.0 if pruning == "none" else pruning.amount
        return run_numbers(list(self.metrics.values()), amount)

    @property
    def epochs(self) -> int:
        """The number of epochs done."""
        return self.numbers.epochs

    @property
    def sparsity(self) -> float | None:
        """Percentage of zeros in all convolution and linear weights, once it is final."""
        last = self.metrics.get(self.epochs, {})
        is_final = (
            last.get("phase") in ("fixed", QUANTIZATION_PHASE)
            or self.epochs == self.run.recipe.total_epochs
        )
        return self.numbers.reached if is_final else None

    def value(self, column: Column) -> float | None:
        """The number that the table shows in `column`; None if the run has not come that far.

        Accuracies and sparsity are in percent, gains in percentage points.
        """
        if column.metric == "best_epoch":
            return self._best_epoch()
        value = self._metric(column.metric, column.epoch)
        if column.since is None or value is None:
            return value
        earlier = self._metric(column.metric, column.since)
        return None if earlier is None else value - earlier

    def _metric(self, name: str, epoch: int | str) -> float | None:
        if epoch == "last":
            epoch = self.run.recipe.total_epochs
        elif epoch == "best":
            epoch = self._best_epoch() or 0
        return percent_of(self.metrics.get(int(epoch), {}), _KEYS[name])

    def _best_epoch(self) -> int | None:
        """The first of the epochs with the best top-1, if all are done."""
        is_done = self.epochs == self.run.recipe.total_epochs
        return self.numbers.best_epoch if is_done else None


def read_result(run: Run, output: Path) -> RunResult:
    """Read the folder of a run.

    Args:
        run: A run of a table.
        output: The folder that contains the folders of the table's runs.

    Returns:
        The result. It has no metrics and is not finished if there is no such folder, or if the
        folder is damaged or another recipe's run, which `error` reports.

    Example:
        >>> from starfire_prune.experiments.tables import load_table
        >>> table = load_table("recipes/tables/quickstart.yaml")
        >>> read_result(table.runs[0], Path("no/such/folder")).finished
        False
    """
    folder = output / run.folder
    if not (folder / "recipe.yaml").is_file():
        return RunResult(run)
    try:
        differing = _differing(load_recipe(folder / "recipe.yaml"), run.recipe)
        metrics = {row["epoch"] + 1: row for row in read_metrics(folder)}
    except (RecipeError, RunError, OSError) as error:
        return RunResult(run, error=first_line(error))
    if differing:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in differing)
        return RunResult(run, error=f"{folder} holds the run of another recipe ({listed})")
    return RunResult(run, metrics, exported_file(folder).is_file())


def format_results(table: Table, results: Sequence[RunResult]) -> str:
    """The table of results: a line for each run, with mean and deviation over its seeds.

    Args:
        table: The table whose columns are shown.
        results: Results of runs of the table; those of a name may be any of its seeds.

    Returns:
        Lines: the title, the header, the runs, and the errors of folders. `-` stands for a
        number that a run does not have yet; the paper's numbers are beside the columns for which
        it has some.

    Example:
        >>> from starfire_prune.experiments.tables import load_table
        >>> table = load_table("recipes/tables/quickstart.yaml")
        >>> ck = read_result(table.runs[1], Path("no/such/folder"))
        >>> print(format_results(table, [ck]).splitlines()[-1])
        ck     0/10                60.0            -         -
    """
    compared = {name for result in results for name in result.run.paper}
    header = ["run", "epochs", "sparsity asked [%]", "reached [%]"]
    for column in table.columns:
        unit = "" if column.metric == "best_epoch" else " [%]"
        paper = ("paper", "difference") if column.name in compared else ()
        header += [column.name + unit, *paper]
    by_name: dict[str, list[RunResult]] = {}
    for result in results:
        by_name.setdefault(result.run.name, []).append(result)
    rows = [
        [name, *_run_cells(seeds), *_column_cells(table.columns, seeds, compared)]
        for name, seeds in by_name.items()
    ]
    errors = [f"{result.run.folder}: {result.error}" for result in results if result.error]
    return "\n".join([table.title, "", format_columns(header, rows), *errors])


def _differing(saved: Recipe, recipe: Recipe) -> list[tuple[str, object, object]]:
    """The keys in which a folder's recipe differs, with both values; `data.root` counts.

    A `data` key counts as equal where the new value has a variable that is not set.
    """
    trains = resume_differences(saved, recipe)
    return [
        (key, old, new)
        for key, (old, new) in differing_keys(saved, recipe).items()
        if (key in trains or key == "data.root")
        and not (key.startswith("data.") and isinstance(new, str) and "${" in new)
    ]


def _run_cells(results: Sequence[RunResult]) -> list[str]:
    done = sum(result.epochs for result in results)
    epochs = sum(result.run.recipe.total_epochs for result in results)
    reached = mean_of(result.sparsity for result in results)
    return [f"{done}/{epochs}", number_text(results[0].numbers.asked, 1), number_text(reached, 1)]


def _column_cells(
    columns: Iterable[Column], results: Sequence[RunResult], compared: set[str]
) -> list[str]:
    cells = []
    for column in columns:
        digits = 0 if column.metric == "best_epoch" and len(results) == 1 else 2
        of_column = compared_cells(results, column, digits)
        cells += of_column if column.name in compared else of_column[:1]
    return cells


def compared_cells(results: Sequence[RunResult], column: Column, digits: int) -> list[str]:
    """The mean over the results of a run's seeds, the paper's number, and their difference."""
    values = [result.value(column) for result in results]
    mean, paper = mean_of(values), results[0].run.paper.get(column.name)
    above = None if mean is None or paper is None else mean - paper
    return [
        spread_text(values, len(results), digits),
        number_text(paper, digits),
        number_text(above, digits, sign=True),
    ]
