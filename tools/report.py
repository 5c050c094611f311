"""Write a report of runs as a web page: python tools/report.py runs/ck runs/dense."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starfire_prune.experiments.tables import Table

TABLES = Path(__file__).resolve().parent.parent / "recipes" / "tables"


def main() -> int:
    """Parse the command line and report; errors of users are one sentence and exit status 2."""
    arguments = _parser().parse_args()
    try:
        from starfire_prune.reporting.report import build_report, write_report
        from starfire_prune.reporting.runs import read_run

        table = _table(arguments.table, arguments.runs)
        folders = arguments.runs or _folders_of(table)
        runs = [read_run(folder, unfinished=arguments.unfinished) for folder in _distinct(folders)]
        page = write_report(build_report(runs, table, arguments.layer), arguments.output)
    except ModuleNotFoundError as error:
        return _fail(f"{error}: pip install 'starfire-prune[train]'")
    except OSError as error:
        return _fail(f"{error.filename or arguments.output}: {error.strerror or error}")
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(f"interrupted; {arguments.output} may hold parts of two reports", status=130)
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}: {page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=_path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--table",
        type=_path,
        help="YAML file of the table that the runs are of, for the paper's numbers; by default "
        "recipes/tables/T.yaml for runs in a folder T; without RUN: all of its runs that are there",
    )
    parser.add_argument(
        "--output",
        type=_path,
        default=Path("report"),
        metavar="FOLDER",
        help="folder for report.html, report.md, report.csv and the pictures; default: report",
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="also take runs that aren't finished, as far as they are",
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="convolution whose masks are shown; default: the middle one"
    )
    return parser


def _path(text: str) -> Path:
    if not text:  # such as a variable that is not set
        raise argparse.ArgumentTypeError("is empty; name a folder or a file")
    return Path(text)


def _table(path: Path | None, runs: Sequence[Path]) -> Table | None:
    """The table that is named, or the one after which the folder of all runs is."""
    from starfire_prune.experiments.tables import load_table

    if path is None:
        parents = {run.resolve().parent.name for run in runs}
        path = TABLES / f"{parents.pop()}.yaml" if len(parents) == 1 else None
        if path is None or not path.is_file():
            return None
    return load_table(path, keep_unset=True)


def _folders_of(table: Table | None) -> list[Path]:
    """The folders of a table's runs that are there."""
    if table is None:
        raise ValueError("name the folders of runs, such as runs/quickstart, or a --table")
    output = Path("runs") / "tables" / table.trained_in
    folders = [output / run.folder for run in table.runs]
    found = [folder for folder in folders if (folder / "recipe.yaml").is_file()]
    if not found:
        raise ValueError(
            f"{output} holds no run of {table.name}: train some by tools/sweep.py, or name folders"
        )
    return found


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Each folder once, by whichever name."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _fail(message: str, status: int = 2) -> int:
    print(f"report.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
