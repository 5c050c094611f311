"""Accuracy under attack over several runs: their `evaluation.json` files side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final

from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.results import Evaluation, Result
from starfire_prune.evaluation.spaces import epsilon_text
from starfire_prune.reporting.curves import Curve

__all__ = [
    "SPACES",
    "accuracy",
    "attack_curve",
    "attacks_of",
    "columns_of",
    "results_under",
]


SPACES: Final = {"pixel": "pixels in [0, 1]", "normalised": "normalised pixels"}
"""What epsilon is measured in, by the name of the space."""


def attacks_of(evaluations: Iterable[Evaluation | None]) -> list[Attack]:
    """The attacks in any of the evaluations, all of them with epsilon 0.

    Clean images come first, then attacks on the model itself, then transferred ones. Where PGD has
    the default step size for each epsilon, `step_size` is None.
    """
    found = {_attacks(result)[0]: None for one in evaluations if one for result in one.results}
    return sorted(found, key=_place)


def columns_of(evaluations: Iterable[Evaluation | None]) -> list[tuple[str, Attack, float]]:
    """The columns of a table of accuracies under attack: heading, attack, epsilon."""
    evaluations = list(evaluations)
    columns = []
    for attack in attacks_of(evaluations):
        results = [result for one in evaluations for result in results_under(one, attack)]
        for epsilon in sorted({result.attack.epsilon for result in results}):
            if attack.name == "none":
                columns.append((f"{attack.label} [%]", attack, epsilon))
            elif epsilon:  # at 0 an attack doesn't change the images
                at = epsilon_text(epsilon, attack.space)
                columns.append((f"{attack.label}, ε {at} [%]", attack, epsilon))
    return columns


def results_under(evaluation: Evaluation | None, attack: Attack) -> list[Result]:
    """The results of an attack with any epsilon."""
    results: Sequence[Result] = evaluation.results if evaluation else ()
    return [result for result in results if attack in _attacks(result)]


def accuracy(evaluation: Evaluation | None, attack: Attack, epsilon: float) -> float | None:
    """Top-1 in percent under an attack; None if it was not measured.

    Of several such results the one of the most images counts, then the one of the lowest seed.
    """
    results = results_under(evaluation, attack)
    found = [result for result in results if result.attack.epsilon == epsilon]
    return 100 * _chosen(found).top1 if found else None


def attack_curve(evaluation: Evaluation | None, attack: Attack) -> Curve:
    """Top-1 in percent over epsilon, beginning with the clean images at 0.

    The clean images are left out unless as many of them were measured in the same precision.
    """
    by_epsilon: dict[float, list[Result]] = {}
    for result in results_under(evaluation, attack):
        by_epsilon.setdefault(result.attack.epsilon, []).append(result)
    chosen = {epsilon: _chosen(results) for epsilon, results in sorted(by_epsilon.items())}
    attacked = {epsilon: result for epsilon, result in chosen.items() if epsilon}
    if attacked:
        clean = _clean(evaluation, list(attacked.values()))
        chosen = attacked if clean is None else {0.0: clean, **attacked}
    return tuple(chosen), tuple(100 * result.top1 for result in chosen.values())


def _chosen(results: Sequence[Result]) -> Result:
    """Of results of the same attack the one of the most images, then of the lowest seed."""
    return max(results, key=lambda result: (result.images, -(result.attack.seed or 0)))


def _clean(evaluation: Evaluation | None, attacked: Sequence[Result]) -> Result | None:
    """The result of the same images in the same precision without an attack, if there is one."""
    measured = {(result.images, result.attack.precision) for result in attacked}
    if evaluation is None or len(measured) > 1:
        return None
    unchanged = (result for result in evaluation.results if result.attack.epsilon == 0)
    same = (result for result in unchanged if (result.images, result.attack.precision) in measured)
    return next(same, None)


def _attacks(result: Result) -> tuple[Attack, ...]:
    """The attack of a result with any epsilon; with two names if its step size is the default.

    That is the default for each epsilon, and a step size that all epsilons share.
    """
    if result.attack.name == "none":
        return (Attack("none"),)
    seed = None if result.attack.seed is None else 0
    attack = dataclasses.replace(result.attack, epsilon=0.0, seed=seed)
    usual = dataclasses.replace(attack, step_size=None)
    if attack.name == "fgsm":
        return (usual,)
    return (usual, attack) if result.attack.has_default_step_size else (attack,)


def _place(attack: Attack) -> tuple[object, ...]:
    kind = (attack.name != "none", attack.source or "", attack.name, attack.space != "pixel")
    numbers = (attack.steps or 0, attack.restarts or 0, attack.step_size or 0.0)
    return (*kind, *numbers, attack.seed is None)
