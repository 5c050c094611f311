"""`starfire evaluate`: the accuracy of trained weights, clean and attacked."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from starfire_prune.cli.common import Command, add_overrides, name_argument, path_argument
from starfire_prune.cli.shipped import find_recipe

if TYPE_CHECKING:
    from starfire_prune.evaluation.attacks import Attack
    from starfire_prune.evaluation.results import Evaluation
    from starfire_prune.evaluation.spaces import SpaceName
    from starfire_prune.runs.weights import WeightsWithRecipe

__all__ = ["COMMAND"]

STEPS, RESTARTS, SEED = 10, 1, 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=path_argument,
        nargs="+",
        metavar="RUN_OR_MODEL",
        help="folder of a finished run, or a safetensors file with --recipe",
    )
    _add_attacks(parser.add_argument_group("attacks"))
    _add_inputs(parser.add_argument_group("models and data"))
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="such as cpu or cuda:1; default: a GPU if there is one",
    )
    parser.add_argument(
        "--json", type=path_argument, metavar="PATH", help="also write the results to this file"
    )


def _add_attacks(group: argparse._ArgumentGroup) -> None:
    for option, text in (("--fgsm", "FGSM, such as 0 1/255 2/255 4/255"), ("--pgd", "PGD")):
        group.add_argument(
            option, type=_number, nargs="+", default=[], metavar="EPS", help=f"epsilons of {text}"
        )
    group.add_argument("--steps", type=int, metavar="N", help=f"steps of PGD; default: {STEPS}")
    group.add_argument(
        "--step-size",
        type=_number,
        metavar="SIZE",
        help="step size of PGD; default: 2.5 · epsilon / steps",
    )
    group.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help=f"random starts of PGD; the most harmful one counts; default: {RESTARTS}",
    )
    group.add_argument(
        "--no-random-start", action="store_true", help="start PGD from the images themselves"
    )
    group.add_argument("--seed", type=int, metavar="N", help=f"seed of the starts; default: {SEED}")
    group.add_argument(
        "--space",
        choices=("pixel", "normalised"),
        help="unit of epsilon: pixels in [0, 1], or the normalised numbers that the model reads; "
        "default: pixel",
    )
    group.add_argument(
        "--source",
        type=path_argument,
        metavar="RUN_OR_MODEL",
        help="attack by the gradients of this model instead (a transfer attack)",
    )


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe",
        type=name_argument,
        metavar="FILE",
        help="recipe of the safetensors files; runs have their own",
    )
    add_overrides(group, "override a key of the recipes, such as data.workers=0")
    group.add_argument(
        "--data",
        type=path_argument,
        metavar="FOLDER",
        help="folder of the images; replaces data.root",
    )
    group.add_argument(
        "--limit",
        type=_count,
        metavar="N",
        help="evaluate N evenly spaced images (of shards the first N); default: all",
    )
    group.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="images per batch; default: the recipe's for evaluation",
    )


# What to evaluate


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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for settings out of range or without effect."""
    from starfire_prune.evaluation.attacks import check_pgd
    from starfire_prune.evaluation.spaces import NORMALISED, PIXELS, check_epsilon

    space = NORMALISED if arguments.space == "normalised" else PIXELS
    for option in ("fgsm", "pgd"):
        for epsilon in getattr(arguments, option):
            try:
                check_epsilon(epsilon, space)
            except ValueError as error:
                raise ValueError(f"--{option}: {error}") from None
    check_pgd(*_pgd_settings(arguments))
    _check_effect(arguments)


def _check_effect(arguments: argparse.Namespace) -> None:
    given = [
        name
        for name, value in vars(arguments).items()
        if value is not None and value is not False and value != []
    ]
    of_pgd = ("steps", "step_size", "restarts", "seed", "no_random_start")
    needs = {**dict.fromkeys(of_pgd, ("pgd",)), **dict.fromkeys(("space", "source"), _ATTACKS)}
    for name, any_of in needs.items():
        if name in given and not set(any_of) & set(given):
            wanted = " or ".join(f"--{option}" for option in any_of)
            raise ValueError(f"--{name.replace('_', '-')} has no effect without {wanted}")
    if "seed" in given and "no_random_start" in given:
        raise ValueError("--seed has no effect with --no-random-start: leave one of them out")
    paths = [*arguments.runs, *([arguments.source] if arguments.source else [])]
    if "recipe" in given and all(path.is_dir() for path in paths):
        raise ValueError("--recipe has no effect: runs have their own; change keys of it by --set")


_ATTACKS = ("fgsm", "pgd")


def _pgd_settings(arguments: argparse.Namespace) -> tuple[int, float | None, int, int | None]:
    """Steps, step size, restarts and seed."""
    steps = STEPS if arguments.steps is None else arguments.steps
    restarts = RESTARTS if arguments.restarts is None else arguments.restarts
    seed = SEED if arguments.seed is None else arguments.seed
    return steps, arguments.step_size, restarts, None if arguments.no_random_start else seed


def _subjects(
    arguments: argparse.Namespace,
) -> tuple[list[WeightsWithRecipe], WeightsWithRecipe | None]:
    from starfire_prune.evaluation.results import check_keeps
    from starfire_prune.runs.weights import find_weights

    recipe = None if arguments.recipe is None else find_recipe(arguments.recipe)
    overrides, data = arguments.overrides, arguments.data
    subjects = [find_weights(path, recipe, overrides, data) for path in arguments.runs]
    for subject in subjects:
        check_keeps(subject)
    if arguments.source is None:
        return subjects, None
    return subjects, find_weights(arguments.source, recipe, needs_data=False)


def _attacks(arguments: argparse.Namespace) -> list[Attack]:
    from starfire_prune.evaluation.attacks import Attack

    space: SpaceName = arguments.space or "pixel"
    settings = _pgd_settings(arguments)
    return [
        *(Attack("fgsm", epsilon, space) for epsilon in dict.fromkeys(arguments.fgsm)),
        *(Attack("pgd", epsilon, space, *settings) for epsilon in dict.fromkeys(arguments.pgd)),
    ]


# Evaluating


def _evaluate(
    arguments: argparse.Namespace,
    subjects: Sequence[WeightsWithRecipe],
    source: WeightsWithRecipe | None,
) -> None:
    from starfire_prune.evaluation.evaluate import chosen_device, evaluate_weights
    from starfire_prune.evaluation.results import format_evaluation, write_evaluation
    from starfire_prune.utils.files import write_text

    device, attacks = chosen_device(arguments.device), _attacks(arguments)
    done: list[tuple[WeightsWithRecipe, Evaluation]] = []
    for number, subject in enumerate(subjects):
        evaluation = evaluate_weights(
            subject,
            attacks,
            source=source,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=device,
        )
        done.append((subject, evaluation))
        heading = subject.folder or subject.weights
        print(f"\n{heading}" if number else heading, format_evaluation(evaluation), sep="\n")
        if subject.folder is not None and subject.keeps_evaluation:
            write_evaluation(subject.folder, evaluation)
        for line in _notes(subject, evaluation):
            print(line, flush=True)
    if arguments.json is not None:
        content = [{"name": subject.name, **each.model_dump(mode="json")} for subject, each in done]
        write_text(arguments.json, json.dumps(content, indent=1) + "\n")


# What is printed


def _notes(subject: WeightsWithRecipe, evaluation: Evaluation) -> Iterator[str]:
    from starfire_prune.evaluation.results import evaluation_file, trained_top1

    clean = evaluation.results[0]
    own = trained_top1(subject) if clean.images == evaluation.images else None
    if own is not None and abs(own - clean.top1) > 1e-9:
        yield (
            f"the run itself ended with a top-1 of {own:.2%} in metrics.jsonl: another device, "
            f"other versions, or other files in the data"
        )
    asked = subject.recipe.training.mixed_precision
    if asked != "no" and clean.attack.precision != asked:
        yield f"training.mixed_precision (={asked}) is not for this device: clean images in fp32"
    if subject.keeps_evaluation and subject.folder is not None:
        yield f"kept in {evaluation_file(subject.folder)}"
    elif subject.folder is not None:
        others = ", ".join(subject.other_settings)
        verb = "is" if len(subject.other_settings) == 1 else "are"
        yield f"not kept in the run's folder: {others} {verb} not the run's"


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    subjects, source = _subjects(arguments)  # before the slow imports
    _evaluate(arguments, subjects, source)


COMMAND: Final = Command(
    summary="Measure the accuracy of trained weights, clean and attacked",
    details="Such as: starfire evaluate runs/quickstart --fgsm 1/255 4/255\n"
    "The results of a run are saved in its folder, as evaluation.json.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="runs whose results were printed keep them",
)
