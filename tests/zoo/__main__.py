"""Measure what works with which model, and write docs/compatibility.md.

    python -m tests.zoo [MODEL …] [--cells CELL …] [--processes 2] [--page] [--choose]

Without names all models of the zoo are measured: about twenty minutes on two cores. `--page` writes
the page from the results that are there; `--choose` chooses the models again, for a new timm.
"""

from __future__ import annotations

import argparse
import sys

from tests.zoo.cells import CELLS
from tests.zoo.models import ZOO, choose
from tests.zoo.page import PAGE, page
from tests.zoo.results import measure_all, read_results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*ZOO, []], metavar="MODEL")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--choose", action="store_true", help="choose the models, measure nothing")
    options = parser.parse_args()
    if options.choose:
        choose(_print)
        return
    if not options.page:
        measure_all(options.models or list(ZOO), options.cells, options.processes, _print)
    PAGE.write_text(page(read_results()), encoding="utf-8")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
