"""Accuracy under attack over several runs: what `evaluation.json` files hold, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Final

from starfire_prune.evaluation.attacks import default_step_size
from starfire_prune.evaluation.results import Evaluation, Result
from starfire_prune.reporting.curves import Curve

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
        step_size: of PGD, in the unit of epsilon; None for the default of each epsilon.
        from_images: whether PGD starts from the images themselves, and not at random.
    """

    name: str
    space: str = "pixel"
    steps: int | None = None
    restarts: int | None = None
    source: str | None = None
    precision: str = "fp32"
    step_size: float | None = None
    from_images: bool = False

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
        if self.step_size is not None:
            parts[0] += f" of {epsilon_text(self.step_size, self)}"
        if self.from_images:
            parts[0] += " from the images"
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
    found = {_attacks(result)[0]: None for one in evaluations if one for result in one.results}
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
    return [result for result in results if attack in _attacks(result)]


def accuracy(evaluation: Evaluation | None, attack: Attack, epsilon: float) -> float | None:
    """Top-1 in percent under an attack.

    Of several such results that of the most images counts, and of these that of the lowest seed.
    """
    found = [own for own in results_under(evaluation, attack) if own.epsilon == epsilon]
    return 100 * _chosen(found).top1 if found else None


def attack_curve(evaluation: Evaluation | None, attack: Attack) -> Curve:
    """Top-1 in percent over epsilon, from the clean images at 0 on.

    These are not there unless as many of them were measured in the same precision.
    """
    by_epsilon: dict[float, list[Result]] = {}
    for result in results_under(evaluation, attack):
        by_epsilon.setdefault(result.epsilon, []).append(result)
    chosen = {epsilon: _chosen(own) for epsilon, own in sorted(by_epsilon.items())}
    attacked = {epsilon: own for epsilon, own in chosen.items() if epsilon}
    if attacked:
        clean = _clean(evaluation, list(attacked.values()))
        chosen = attacked if clean is None else {0.0: clean, **attacked}
    return tuple(chosen), tuple(100 * own.top1 for own in chosen.values())


def _chosen(results: Sequence[Result]) -> Result:
    """Of results of the same attack that of the most images, and then of the lowest seed."""
    return max(results, key=lambda result: (result.images, -(result.seed or 0)))


def _clean(evaluation: Evaluation | None, attacked: Sequence[Result]) -> Result | None:
    """What the same images came to in the same precision without an attack, if it is known."""
    measured = {(result.images, result.precision) for result in attacked}
    if evaluation is None or len(measured) > 1:
        return None
    unchanged = (result for result in evaluation.results if result.epsilon == 0)
    same = (own for own in unchanged if (own.images, own.precision) in measured)
    return next(same, None)


def _attacks(result: Result) -> tuple[Attack, ...]:
    """The attack of a result, and where its step size is the default that of this step size too."""
    if result.attack == "none":
        return (Attack("none"),)
    settings = (result.space, result.steps, result.restarts, result.source, result.precision)
    attack = Attack(result.attack, *settings)
    if result.attack == "fgsm":
        return (attack,)
    usual = dataclasses.replace(attack, from_images=result.seed is None)
    own = dataclasses.replace(usual, step_size=result.step_size)
    return (usual, own) if _is_default_step(result) else (own,)


def _is_default_step(result: Result) -> bool:
    if result.step_size is None or result.steps is None:
        return result.step_size is None
    default = default_step_size(result.epsilon, result.steps)
    return math.isclose(result.step_size, default, rel_tol=1e-9)


def _place(attack: Attack) -> tuple[object, ...]:
    own = (attack.name != "none", attack.source or "", attack.name)
    numbers = (attack.steps or 0, attack.restarts or 0, attack.step_size or 0.0)
    return (*own, attack.space != "pixel", *numbers, attack.from_images)
