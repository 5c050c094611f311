"""`starfire train`: train a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from starfire_prune.cli.common import (
    Command,
    add_output,
    add_overrides,
    name_argument,
    path_argument,
)
from starfire_prune.cli.shipped import find_recipe

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "YAML file, or the name of a shipped recipe such as quickstart (`starfire recipes` lists"
    add("recipe", type=name_argument, metavar="RECIPE", help=f"{text} them)")
    add_overrides(parser, "override a key of the recipe, such as pruning.amount=0.7")
    add_output(parser, "FOLDER", "folder of the run; default: runs/<name of the recipe>")
    text = "refuse to start a run that has no checkpoint yet"
    add("--resume", action="store_true", help=text)
    text = "copy the epochs before the era from this run, which may differ in pruning only"
    add("--fork", type=path_argument, metavar="RUN", help=text)
    text = "check the run and print its plan; train nothing"
    add("--dry-run", action="store_true", help=text)


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.recipe.load import load_recipe

    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path, arguments.overrides)  # before the slow imports

    from starfire_prune.training.train import train

    output = arguments.output or Path("runs") / path.stem
    train(recipe, output, resume=arguments.resume, fork=arguments.fork, dry_run=arguments.dry_run)


COMMAND: Final = Command(
    summary="Train a recipe, or resume its run",
    details="A run that was interrupted resumes from its last checkpoint with the same command.\n"
    "Several processes: accelerate launch -m starfire_prune train RECIPE",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="the same command goes on from the last checkpoint",
)
