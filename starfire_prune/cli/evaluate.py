"""`starfire evaluate`: the accuracy of trained weights, clean and attacked."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from typing import Final

from starfire_prune.cli.common import (
    Command,
    Options,
    add_overrides,
    count_argument,
    name_argument,
    path_argument,
)

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add, where = parser.add_argument, "RUN_OR_MODEL"
    text = "folder of a finished run, or a safetensors file with --recipe"
    add("runs", type=path_argument, nargs="+", metavar=where, help=text)
    _add_attacks(parser.add_argument_group("attacks"), where)
    _add_inputs(parser.add_argument_group("models and data"))
    add("--device", metavar="NAME", help="such as cpu or cuda:1; default: a GPU if there is one")
    add("--json", type=path_argument, metavar="PATH", help="also write the results to this file")


def _add_attacks(options: Options, where: str) -> None:
    add = options.add_argument
    for option, text in (("--fgsm", "FGSM, such as 0 1/255 2/255 4/255"), ("--pgd", "PGD")):
        text = f"epsilons of {text}"
        add(option, type=_number, nargs="+", default=[], metavar="EPS", help=text)
    add("--steps", type=int, metavar="N", help="steps of PGD; default: 10")
    text = "step size of PGD; default: 2.5 · epsilon / steps"
    add("--step-size", type=_number, metavar="SIZE", help=text)
    text = "random starts of PGD; the most harmful one counts; default: 1"
    add("--restarts", type=int, metavar="N", help=text)
    text = "start PGD from the images themselves"
    add("--no-random-start", action="store_true", help=text)
    add("--seed", type=int, metavar="N", help="seed of the starts; default: 0")
    text = "unit of epsilon: pixels in [0, 1], or the normalised numbers that the model reads"
    add("--space", choices=("pixel", "normalised"), help=f"{text}; default: pixel")
    text = "attack by the gradients of this model instead (a transfer attack)"
    add("--source", type=path_argument, metavar=where, help=text)


def _add_inputs(options: Options) -> None:
    add = options.add_argument
    text = "recipe of the safetensors files; runs have their own"
    add("--recipe", type=name_argument, metavar="FILE", help=text)
    add_overrides(options, "override a key of the recipes, such as data.workers=0")
    text = "folder of the images; replaces data.root"
    add("--data", type=path_argument, metavar="FOLDER", help=text)
    text = "evaluate N evenly spaced images (of shards the first N); default: all"
    add("--limit", type=count_argument, metavar="N", help=text)
    text = "images per batch; default: the recipe's for evaluation"
    add("--batch-size", type=count_argument, metavar="N", help=text)


def _number(text: str) -> float:
    try:  # no Fraction of an exponent: it would work out all the digits
        number = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = f"{text[:40]}…" if len(text) > 40 else text
        raise argparse.ArgumentTypeError(
            f"{shown!r} is not a number such as 0.03 or 4/255 (runs come before the options)"
        )
    return number


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.cli.run_evaluate import run

    run(arguments)


COMMAND: Final = Command(
    summary="Measure the accuracy of trained weights, clean and attacked",
    details="Such as: starfire evaluate runs/quickstart --fgsm 1/255 4/255\n"
    "The results of a run are saved in its folder, as evaluation.json.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="runs whose results were printed keep them",
)
