"""`starfire report`: write a report of runs as a web page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starfire_prune.cli.common import Command, add_output, name_argument, path_argument
from starfire_prune.cli.shipped import find_table, tables

if TYPE_CHECKING:
    from starfire_prune.experiments.tables import Table

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="*", type=path_argument, metavar="RUN", help="folder of a run")
    text = (
        "YAML file or shipped name of the table that the runs belong to, for the paper's numbers; "
        "default: the shipped table T for runs in a folder T; without RUN, all runs of the table "
        "that exist are reported"
    )
    add("--table", type=name_argument, help=text)
    text = "folder for report.html, report.md, report.csv and the pictures; default: report"
    add_output(parser, "FOLDER", text, Path("report"))
    add(
        "--unfinished",
        action="store_true",
        help="also report unfinished runs, and those whose pruning is unfinished",
    )
    text = "convolution whose masks are shown; default: the middle one"
    add("--layer", metavar="NAME", help=text)


def _table_file(name: str | None, runs: Sequence[Path]) -> Path | None:
    """The table that is named, or the shipped one whose name the folder of all runs has."""
    if name is not None:
        return find_table(name)
    parents = {run.resolve().parent.name for run in runs}
    return tables().get(parents.pop()) if len(parents) == 1 else None


def _folders_of(table: Table | None) -> list[Path]:
    """The folders of a table's runs that are there."""
    if table is None:
        raise ValueError("name the folders of runs, such as runs/quickstart, or a --table")
    output = Path("runs") / "tables" / table.trained_in
    folders = [output / run.folder for run in table.runs]
    found = [folder for folder in folders if (folder / "recipe.yaml").is_file()]
    if not found:
        raise ValueError(
            f"{output} holds no run of {table.name}: train some by starfire sweep, or name folders"
        )
    return found


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Each folder once, by whichever name."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.experiments.tables import load_table
    from starfire_prune.reporting.report import build_report, write_report
    from starfire_prune.reporting.runs import read_run

    try:
        path = _table_file(arguments.table, arguments.runs)
        table = None if path is None else load_table(path, keep_unset=True)
        folders = arguments.runs or _folders_of(table)
        runs = [read_run(folder, unfinished=arguments.unfinished) for folder in _distinct(folders)]
        page = write_report(build_report(runs, table, arguments.layer), arguments.output)
    except OSError as error:
        place = error.filename or arguments.output
        raise ValueError(f"{place}: {error.strerror or error}") from error
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}: {page}")


COMMAND: Final = Command(
    summary="Write a report of runs as a web page",
    details="Such as: starfire report runs/ck runs/dense",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="{output} may hold parts of two reports",
)
