"""What `starfire evaluate` does: it checks its options, measures and prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from starfire_prune.cli.common import options_given
from starfire_prune.cli.shipped import find_recipe
from starfire_prune.evaluation import evaluate
from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.results import (
    Evaluation,
    check_keeps,
    evaluation_file,
    format_evaluation,
    trained_top1,
    write_evaluation,
)
from starfire_prune.evaluation.spaces import SpaceName, check_epsilon
from starfire_prune.runs.folder import int8_file
from starfire_prune.runs.weights import WeightsWithRecipe, find_weights
from starfire_prune.utils.files import write_text

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and store the results in the folders of runs and the file `--json`."""
    attacks = _attacks(arguments)
    _check_effect(arguments)
    recipe = None if arguments.recipe is None else find_recipe(arguments.recipe)
    given = arguments.overrides, arguments.data
    weights = [find_weights(path, recipe, *given) for path in arguments.runs]
    for trained in weights:
        check_keeps(trained)
    source = arguments.source and find_weights(arguments.source, recipe, needs_data=False)
    device = evaluate.chosen_device(arguments.device)
    contents = []
    for number, trained in enumerate(weights):
        evaluation = evaluate.evaluate_weights(
            trained,
            attacks,
            source=source,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=device,
        )
        contents.append({"name": trained.name, **evaluation.model_dump(mode="json")})
        heading = trained.folder or trained.weights
        print(f"\n{heading}" if number else heading, format_evaluation(evaluation), sep="\n")
        if trained.folder is not None and trained.keeps_evaluation:
            write_evaluation(trained.folder, evaluation)
        for line in _remarks(trained, evaluation):
            print(line, flush=True)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(contents, indent=1) + "\n")


def _attacks(arguments: argparse.Namespace) -> list[Attack]:
    space: SpaceName = arguments.space or "pixel"
    seed = None if arguments.no_random_start else arguments.seed or 0
    of_pgd = (arguments.steps, arguments.step_size, arguments.restarts, seed)
    for option in ("fgsm", "pgd"):
        for epsilon in getattr(arguments, option):
            try:
                check_epsilon(epsilon, space)
            except ValueError as error:
                raise ValueError(f"--{option}: {error}") from None
    return [
        *(Attack("fgsm", epsilon, space) for epsilon in dict.fromkeys(arguments.fgsm)),
        *(Attack("pgd", epsilon, space, *of_pgd) for epsilon in dict.fromkeys(arguments.pgd)),
    ]


def _check_effect(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that have no effect."""
    given = options_given(arguments)
    of_pgd = ("steps", "step_size", "restarts", "seed", "no_random_start")
    needs = {**dict.fromkeys(of_pgd, ("pgd",)), **dict.fromkeys(("space", "source"), _ATTACKS)}
    for name, any_of in needs.items():
        if name in given and not set(any_of) & set(given):
            wanted = " or ".join(f"--{option}" for option in any_of)
            raise ValueError(f"{given[name]} has no effect without {wanted}")
    if "seed" in given and "no_random_start" in given:
        raise ValueError("--seed has no effect with --no-random-start: leave one of them out")
    paths = [*arguments.runs, *([arguments.source] if arguments.source else [])]
    if "recipe" in given and all(path.is_dir() for path in paths):
        raise ValueError("--recipe has no effect: runs have their own; change keys of it by --set")


_ATTACKS = ("fgsm", "pgd")


def _remarks(trained: WeightsWithRecipe, evaluation: Evaluation) -> Iterator[str]:
    clean = evaluation.results[0]
    own = trained_top1(trained) if clean.images == evaluation.images else None
    if own is not None and abs(own - clean.top1) > 1e-9:
        yield (
            f"the run itself ended with a top-1 of {own:.2%} in metrics.jsonl: another device, "
            f"other versions, or other files in the data"
        )
    if trained.folder is not None and trained.recipe.quantization is not None:
        yield (
            f"these are the float weights; for those of {int8_file(trained.folder)}: starfire "
            f"quantize {trained.folder}"
        )
    asked = trained.recipe.training.mixed_precision
    if asked != "no" and clean.attack.precision != asked:
        yield f"training.mixed_precision (={asked}) is not for this device: clean images in fp32"
    if trained.folder is not None and trained.keeps_evaluation:
        yield f"kept in {evaluation_file(trained.folder)}"
    elif trained.folder is not None:
        verb = "is" if len(trained.other_settings) == 1 else "are"
        others = ", ".join(trained.other_settings)
        yield f"not kept in the run's folder: {others} {verb} not the run's"
