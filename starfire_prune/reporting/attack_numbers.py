"""Accuracy under attack over several runs: what `evaluation.json` files hold, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final

from starfire_prune.evaluation import Evaluation, Result
from starfire_prune.reporting.numbers import Curve

__all__ = [
    "Attack",
    "accuracy",
    "attack_curve",
    "attacks_of",
    "columns_of",
    "epsilon_text",
    "is_level",
    "results_under",
]

_SPACES: Final = {"pixel": "pixels in [0, 1]", "normalised": "normalised pixels"}


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and its settings, but for epsilon and what goes with it.

    Attributes:
        name: `"none"` for clean images, `"fgsm"` or `"pgd"`.
        space: that epsilon is of, `"pixel"` or `"normalised"`.
        steps: of PGD.
        restarts: of PGD.
        source: name of the run whose gradients it followed; None for the model's own.
        precision: of the passes.
    """

    name: str
    space: str = "pixel"
    steps: int | None = None
    restarts: int | None = None
    source: str | None = None
    precision: str = "fp32"

    @property
    def label(self) -> str:
        """In a few words.

        Example:
            >>> Attack("pgd", steps=10, restarts=2, source="dense-seed0").label
            'PGD of 10 steps, 2 restarts, transferred from dense-seed0'
        """
        if self.name == "none":
            return "clean"
        parts = [self.name.upper()]
        if self.steps is not None:
            parts[0] += f" of {self.steps} step{'s' * (self.steps > 1)}"
        if self.restarts is not None and self.restarts > 1:
            parts.append(f"{self.restarts} restarts")
        if self.space != "pixel":
            parts.append(self.space)
        if self.precision != "fp32":
            parts.append(self.precision)
        if self.source is not None:
            parts.append(f"transferred from {self.source}")
        return ", ".join(parts)

    @property
    def unit(self) -> str:
        """What epsilon is of."""
        return _SPACES[self.space]


def attacks_of(evaluations: Iterable[Evaluation | None]) -> list[Attack]:
    """The attacks that any of the evaluations holds: none, those on the model itself, the rest."""
    found = {_attack(result): None for one in evaluations if one for result in one.results}
    return sorted(found, key=_place)


def columns_of(evaluations: Iterable[Evaluation | None]) -> list[tuple[str, Attack, float]]:
    """The columns of a table of accuracies under attack: heading, attack, epsilon."""
    evaluations = list(evaluations)
    columns = []
    for attack in attacks_of(evaluations):
        found = {result.epsilon for one in evaluations for result in results_under(one, attack)}
        for epsilon in sorted(found):
            if attack.name == "none":
                columns.append((f"{attack.label} [%]", attack, epsilon))
            elif epsilon:  # at 0 an attack leaves the images as they are
                at = epsilon_text(epsilon, attack)
                columns.append((f"{attack.label}, ε {at} [%]", attack, epsilon))
    return columns


def epsilon_text(epsilon: float, attack: Attack) -> str:
    """An epsilon as a person gives it: of pixels in 255ths where it is a number of them.

    Example:
        >>> epsilon_text(8 / 255, Attack("fgsm")), epsilon_text(0.1, Attack("fgsm"))
        ('8/255', '0.1')
    """
    if attack.space == "pixel" and is_level(epsilon):
        return f"{round(255 * epsilon)}/255"
    return f"{epsilon:.4g}"


def is_level(epsilon: float) -> bool:
    """Whether epsilon is a number of the steps between pixels of 8 bits."""
    return abs(255 * epsilon - round(255 * epsilon)) < 1e-6


def results_under(evaluation: Evaluation | None, attack: Attack) -> list[Result]:
    """The results of an attack with any epsilon."""
    results: Sequence[Result] = evaluation.results if evaluation else ()
    return [result for result in results if _attack(result) == attack]


def accuracy(evaluation: Evaluation | None, attack: Attack, epsilon: float) -> float | None:
    """Top-1 in percent under an attack; of several such results that of the most images."""
    found = [own for own in results_under(evaluation, attack) if own.epsilon == epsilon]
    return 100 * max(found, key=lambda result: result.images).top1 if found else None


def attack_curve(evaluation: Evaluation | None, attack: Attack) -> Curve:
    """Top-1 in percent over epsilon, from the clean images at 0 on where they were measured."""
    epsilons = {result.epsilon for result in results_under(evaluation, attack)}
    if not epsilons:
        return (), ()
    values = {epsilon: accuracy(evaluation, attack, epsilon) for epsilon in epsilons}
    values.setdefault(0.0, accuracy(evaluation, Attack("none"), 0.0))
    known = [
        (epsilon, value) for epsilon in sorted(values) if (value := values[epsilon]) is not None
    ]
    return tuple(epsilon for epsilon, _ in known), tuple(value for _, value in known)


def _attack(result: Result) -> Attack:
    if result.attack == "none":
        return Attack("none")
    settings = (result.space, result.steps, result.restarts, result.source, result.precision)
    return Attack(result.attack, *settings)


def _place(attack: Attack) -> tuple[object, ...]:
    own = (attack.name != "none", attack.source or "", attack.name)
    return (*own, attack.space != "pixel", attack.steps or 0, attack.restarts or 0)
