"""`starfire train`: train a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from starfire_prune.cli.common import Command, add_overrides, name_argument, path_argument
from starfire_prune.cli.shipped import find_recipe

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        type=name_argument,
        metavar="RECIPE",
        help="YAML file, or the name of a shipped recipe such as quickstart "
        "(`starfire recipes` lists them)",
    )
    add_overrides(parser, "override a key of the recipe, such as pruning.amount=0.7")
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="FOLDER",
        help="folder of the run; default: runs/<name of the recipe>",
    )
    parser.add_argument(
        "--resume", action="store_true", help="refuse to start a run that has no checkpoint yet"
    )
    parser.add_argument(
        "--fork",
        type=path_argument,
        metavar="RUN",
        help="copy the epochs before the era from this run, which may differ in pruning only",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the run and print its plan; train nothing"
    )


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.recipe.load import load_recipe

    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path, arguments.overrides)  # before the slow imports

    from starfire_prune.training.train import train

    train(
        recipe,
        arguments.output or Path("runs") / path.stem,
        resume=arguments.resume,
        fork=arguments.fork,
        dry_run=arguments.dry_run,
    )


COMMAND: Final = Command(
    summary="Train a recipe, or resume its run",
    details="A run that was interrupted resumes from its last checkpoint with the same command.\n"
    "Several processes: accelerate launch -m starfire_prune train RECIPE",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="the same command goes on from the last checkpoint",
)
