"""`starfire sweep`: train the runs of a table one after another."""

from __future__ import annotations

import argparse
from typing import Final

from starfire_prune.cli.common import (
    Command,
    add_output,
    add_overrides,
    name_argument,
)

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = (
        "YAML file, or the name of a shipped table such as table1 (`starfire recipes` lists them)"
    )
    add("table", type=name_argument, metavar="TABLE", help=text)
    add_overrides(parser, "override a key in the recipes of all runs")
    text = (
        "folder of the runs' folders; default: runs/tables/<name of the table>, or the name of the"
    )
    add_output(parser, "FOLDER", f"{text} table whose runs it reads")
    text = "only the runs whose name or folder matches, such as 'ck-*-60' (repeatable)"
    add("--only", action="append", default=[], metavar="PATTERN", help=text)
    text = "only the N-th of these runs, from 0 (for job arrays)"
    add("--index", type=int, metavar="N", help=text)
    launcher = "accelerate launch --quiet"
    text = (
        "command that starts `-m starfire_prune train`, such as 'torchrun --nproc_per_node 8'; "
        f"batch sizes are per process; default: {launcher}"
    )
    add("--launcher", default=launcher, metavar="COMMAND", help=text)
    instead = parser.add_mutually_exclusive_group()
    for option, text in (
        ("--list", "list the runs"),
        ("--print-commands", "print the runs' commands"),
        ("--results", "print the results so far"),
    ):
        instead.add_argument(option, action="store_true", help=f"{text}; train nothing")


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.cli.run_sweep import run

    run(arguments)


COMMAND: Final = Command(
    summary="Train the runs of a table one after another, and compare them with the paper's",
    details="Such as: starfire sweep table1 --only 'ck-*-60'\n"
    "Finished runs are skipped, and interrupted ones are resumed.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="no run had begun",
)
