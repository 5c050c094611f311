"""`starfire recipes`: list the shipped recipes, print one or copy it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starfire_prune.cli.common import Command, path_argument
from starfire_prune.cli.shipped import place_of, recipes, referred_files, tables
from starfire_prune.utils.text import did_you_mean

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="recipe or table to print, such as quickstart or tables/quickstart; default: list all",
    )
    parser.add_argument(
        "--copy",
        type=path_argument,
        nargs="?",
        const=Path(),
        metavar="FOLDER",
        help="copy it with the files that it refers to, instead of printing it; "
        "default folder: the current one",
    )


def _run(arguments: argparse.Namespace) -> None:
    if arguments.name is None and arguments.copy is not None:
        raise ValueError("--copy has no effect without the NAME of a recipe before it")
    if arguments.name is None:
        _list("recipes, for starfire train NAME", recipes())
        print()
        _list("tables of runs, for starfire sweep NAME", tables())
    elif arguments.copy is None:
        print(_named(arguments.name).read_text(encoding="utf-8"), end="")
    else:
        _copy(_named(arguments.name), arguments.copy)


def _list(heading: str, paths: Mapping[str, Path]) -> None:
    width = max(map(len, paths))
    print(heading)
    for name, path in paths.items():
        print(f"  {name:<{width}}  {_summary(path)}")


def _summary(path: Path) -> str:
    """The first line of the comment that heads a recipe, or the title of a table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    titles = [line.removeprefix("title: ").strip('"') for line in lines if line.startswith("title")]
    comments = [line.removeprefix("# ") for line in lines[1:] if line.startswith("# ")]
    return (titles or comments)[0]


def _named(name: str) -> Path:
    known = {f"tables/{table}": path for table, path in tables().items()}
    known = {**known, **tables(), **recipes()}
    wanted = name.removesuffix(".yaml")
    if wanted not in known:
        suggestion = did_you_mean(wanted, known) or "; `starfire recipes` lists them"
        raise ValueError(f"no shipped recipe is named {name}{suggestion}")
    return known[wanted]


def _copy(path: Path, folder: Path) -> None:
    """Copy a recipe, and what it refers to, to the same places in another folder."""
    copies = {file: folder / place_of(file) for file in referred_files(path)}
    if copies[path].exists():
        raise ValueError(f"{copies[path]} exists already: choose another folder")
    for source, target in copies.items():
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            print(target)


COMMAND: Final = Command(
    summary="List the shipped recipes and tables, print one or copy it",
    details="",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="some files may not be copied",
)
