"""The results of a table's runs, read from their folders and set beside the paper's numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from starfire_prune.experiments.settings import Column
from starfire_prune.experiments.tables import Run, Table
from starfire_prune.recipe.compare import differing_keys, training_differences
from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import RunError, exported_file, read_metrics
from starfire_prune.utils.settings import RecipeError
from starfire_prune.utils.text import ABSENT, format_columns, spread_text

__all__ = ["RunResult", "format_results", "read_result"]


Metrics = Mapping[int, Mapping[str, Any]]
_KEYS: Final = {"top1": "top1", "top5": "top5", "sparsity": "sparsity_network"}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What the folder of a run holds.

    Attributes:
        run: whose folder it is.
        metrics: the lines of `metrics.jsonl`, by the number of epochs that were done then.
        finished: whether the run is through and its weights are exported.
        problem: why the folder can't be read as this run's, in a sentence; empty if it can.
    """

    run: Run
    metrics: Metrics = dataclasses.field(default_factory=dict)
    finished: bool = False
    problem: str = ""

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return max(self.metrics, default=0)

    @property
    def amount(self) -> float:
        """The sparsity asked for, in [0, 1]."""
        pruning = self.run.recipe.pruning
        return 0.0 if pruning == "none" else pruning.amount

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among all convolution and linear weights, in [0, 1], once it is final."""
        last = self.metrics.get(self.epochs, {})
        if last.get("phase") == "fixed" or self.epochs == self.run.recipe.epochs:
            return _number(last.get(_KEYS["sparsity"]))
        return None

    def value(self, column: Column) -> float | None:
        """The number that the table gives in `column`; None if the run is not that far.

        Accuracies and sparsity are in percent, gains in points of it.
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
            epoch = self.run.recipe.epochs
        elif epoch == "best":
            epoch = self._best_epoch() or 0
        share = _number(self.metrics.get(int(epoch), {}).get(_KEYS[name]))
        return None if share is None else 100 * share

    def _best_epoch(self) -> int | None:
        """The first of the epochs with the best top-1, if all are done."""
        top1 = {epoch: _number(row.get("top1")) for epoch, row in sorted(self.metrics.items())}
        known = {epoch: value for epoch, value in top1.items() if value is not None}
        if self.epochs < self.run.recipe.epochs or not known:
            return None
        return max(known, key=lambda epoch: known[epoch])


def read_result(run: Run, output: Path) -> RunResult:
    """Reads the folder of a run.

    Args:
        run: of a table.
        output: the folder in which the table's runs have their folders.

    Returns:
        The result: without metrics and finished if nothing is there, or if what is there is the
        run of another recipe or damaged, which `problem` then tells.

    Example:
        >>> table = load_table("recipes/tables/quickstart.yaml")
        >>> read_result(table.runs[0], Path("runs/tables/quickstart")).finished
        True
    """
    folder = output / run.folder
    if not (folder / "recipe.yaml").is_file():
        return RunResult(run)
    try:
        differing = _differing(load_recipe(folder / "recipe.yaml"), run.recipe)
        metrics = {row["epoch"] + 1: row for row in read_metrics(folder)}
    except (RecipeError, RunError, OSError) as error:
        return RunResult(run, problem=str(error).splitlines()[0])
    if differing:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in differing)
        return RunResult(run, problem=f"{folder} holds the run of another recipe ({listed})")
    return RunResult(run, metrics, exported_file(folder).is_file())


def format_results(table: Table, results: Sequence[RunResult]) -> str:
    """The table of results: a line for each name of a run, the mean and deviation over its seeds.

    Args:
        table: whose columns are shown.
        results: of runs of the table; those of a name may be any of its seeds.

    Returns:
        Lines: title, heading, the runs, and what is wrong with folders. `-` is where a run is not
        yet; the paper's numbers stand beside those columns for which it has some.

    Example:
        >>> output = Path("runs/tables/quickstart")
        >>> print(format_results(table, [read_result(run, output) for run in table.runs]))
    """
    compared = {name for result in results for name in result.run.paper}
    header = ["run", "epochs", "sparsity asked [%]", "reached [%]"]
    for column in table.columns:
        unit = "" if column.metric == "best_epoch" else " [%]"
        header += [
            column.name + unit,
            *(("paper", "difference") if column.name in compared else ()),
        ]
    by_name: dict[str, list[RunResult]] = {}
    for result in results:
        by_name.setdefault(result.run.name, []).append(result)
    rows = [
        [name, *_run_cells(seeds), *_column_cells(table.columns, seeds, compared)]
        for name, seeds in by_name.items()
    ]
    problems = [f"{result.run.folder}: {result.problem}" for result in results if result.problem]
    return "\n".join([table.title, "", format_columns(header, rows), *problems])


def _number(value: object) -> float | None:
    """A metric; None for what was not finite or is not there."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _differing(saved: Recipe, recipe: Recipe) -> list[tuple[str, object, object]]:
    """Where a folder's recipe is another, or its data lie elsewhere and may be others.

    Data behind a variable that is not set are the same.
    """
    trains = training_differences(saved, recipe)
    return [
        (key, old, new)
        for key, (old, new) in differing_keys(saved, recipe).items()
        if (key in trains or key == "data.root")
        and not (key.startswith("data.") and isinstance(new, str) and "${" in new)
    ]


def _run_cells(results: Sequence[RunResult]) -> list[str]:
    done, asked = (
        f"{sum(result.epochs for result in results)}/"
        f"{sum(result.run.recipe.epochs for result in results)}",
        f"{100 * results[0].amount:.1f}",
    )
    reached = [100 * s for result in results if (s := result.sparsity) is not None]
    return [done, asked, f"{statistics.mean(reached):.1f}" if reached else ABSENT]


def _column_cells(
    columns: Iterable[Column], results: Sequence[RunResult], compared: set[str]
) -> list[str]:
    cells = []
    for column in columns:
        values = [value for result in results if (value := result.value(column)) is not None]
        digits = 0 if column.metric == "best_epoch" and len(results) == 1 else 2
        cells.append(spread_text(values, len(results), digits))
        if column.name in compared:
            cells += _paper_cells(values, results[0].run.paper.get(column.name), digits)
    return cells


def _paper_cells(values: Sequence[float], paper: float | None, digits: int) -> list[str]:
    """The paper's number, and how far the mean is above it."""
    if paper is None:
        return [ABSENT, ABSENT]
    above = f"{statistics.mean(values) - paper:+.{digits}f}" if values else ABSENT
    return [f"{paper:.{digits}f}", above]
