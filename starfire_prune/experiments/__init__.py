"""The paper's tables: their runs with recipes, and the results of these runs."""

from starfire_prune.experiments.results import RunResult, format_results, read_result
from starfire_prune.experiments.tables import Run, Table, TableError, load_table

__all__ = [
    "Run",
    "RunResult",
    "Table",
    "TableError",
    "format_results",
    "load_table",
    "read_result",
]
