"""The sections of a report on accuracy, sparsity and robustness: figures and captions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from starfire_prune.engine.sparsity import left_out_text
from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.spaces import epsilon_text, is_level
from starfire_prune.reporting.attacks import SPACES, attack_curve, attacks_of, results_under
from starfire_prune.reporting.curves import Curve, curve, mean_curve
from starfire_prune.reporting.document import Images, Picture, Section
from starfire_prune.reporting.figures import Points, Series, curves, points
from starfire_prune.reporting.grids import mean_top1, robustness_grid
from starfire_prune.reporting.labels import enumerated, numbered, settings_text
from starfire_prune.reporting.runs import Variant
from starfire_prune.reporting.style import MOST_CURVES, Line
from starfire_prune.utils.text import mean_of, number_text

__all__ = ["accuracy_section", "robustness_section", "sparsity_section"]


Lines = Mapping[str, Line]
_CLOSER_FROM: Final = 8  # least epochs of runs whose last half has another picture
_BAND: Final = "Lines are means over the seeds; bands go from the lowest to the highest run"


def accuracy_section(variants: Sequence[Variant], lines: Lines) -> Section:
    """Accuracy over all epochs and over the last half, and in the last and the best epoch."""
    pictures = []
    for part_name, suffix, part in _parts(variants):
        series = _series(part, lines, "top1")
        ends = _ends_text(part, mean_top1)
        settings = f"{_band(part)}Settings: {settings_text(part)}."
        drops = _shared_drops(part)
        dotted = (
            f" Dotted: the learning rate drops, after epoch {enumerated(drops)}." if drops else ""
        )
        axes = ("epoch", "top-1 on held-out images [%]")
        pictures.append(
            Picture(
                f"accuracy{suffix}",
                f"Top-1 accuracy over the epochs{part_name}",
                f"As in the paper's Figures 4 and 6 to 10. {settings}{dotted}",
                f"Curves of top-1 accuracy over the epochs. After the last one: {ends}.",
                curves(series, axes, verticals=drops),
            )
        )
        last = max(variant.recipe.total_epochs for variant in part)
        if min(run.numbers.epochs for variant in part for run in variant.counted) >= _CLOSER_FROM:
            closer = curves(
                series, axes, x_from=float(last // 2), verticals=[d for d in drops if d > last // 2]
            )
            pictures.append(
                Picture(
                    f"accuracy-closer{suffix}",
                    f"The same from epoch {last // 2} on{part_name}",
                    f"The y axis shows the range of these epochs only. {settings}{dotted}",
                    f"The last half of the same curves, enlarged. After the last epoch: {ends}.",
                    closer,
                )
            )
        if any("top5" in row for variant in part for run in variant.runs for row in run.metrics):
            pictures.append(
                Picture(
                    f"top5{suffix}",
                    f"Top-5 accuracy over the epochs{part_name}",
                    f"As in the paper's Figure 10. {settings}",
                    f"Curves of top-5 accuracy over the epochs. After the last: "
                    f"{_ends_text(part, _top5)}.",
                    curves(_series(part, lines, "top5"), ("epoch", "top-5 on held-out images [%]")),
                )
            )
    return Section("Accuracy", pictures=(*pictures, _last_and_best(variants, lines)))


def sparsity_section(variants: Sequence[Variant], lines: Lines) -> Section:
    """Sparsity over the epochs, and the sparsity asked for and reached."""
    pictures = [
        Picture(
            f"sparsity{suffix}",
            f"Sparsity over the epochs{part_name}",
            f"Share of zeros among all convolution and linear weights, as in the paper's Figures "
            f"4, 7 to 9 and 11: it rises in the pruning era and is constant after it. "
            f"{_left_out(part)}{_band(part)}Settings: {settings_text(part)}.",
            f"Curves of sparsity over the epochs. After the last: {_ends_text(part, _reached)}.",
            curves(
                _series(part, lines, "sparsity_network"), ("epoch", "zero weights [%]"), to_100=True
            ),
        )
        for part_name, suffix, part in _parts(variants)
    ]
    pruned = [variant for variant in variants if not variant.is_dense]
    if pruned:
        pictures.append(_asked_and_reached(pruned, lines))
    return Section("Sparsity", pictures=tuple(pictures))


def robustness_section(variants: Sequence[Variant], lines: Lines) -> Section | None:
    """Top-1 under attack over epsilon; None if no run was evaluated."""
    evaluated = [variant for variant in variants if any(run.evaluation for run in variant.runs)]
    if not evaluated:
        return None
    found = attacks_of(run.evaluation for variant in evaluated for run in variant.runs)
    pictures = [
        _attacked(evaluated, lines, attack)
        for attack in found
        if attack.name != "none" and attack.source is None
    ]
    text = (
        "The pictures show attacks that follow the gradients of the network itself (white box), as "
        "the paper's Table 3; attacks transferred from another run are only in the table."
        if any(attack.source is not None for attack in found)
        else "The attacks follow the gradients of the network itself (white box), as the paper's "
        "Table 3."
    )
    grid = robustness_grid(variants, lines)
    return Section("Robustness", text, (grid,), tuple(numbered(pictures)))


# Accuracy and sparsity


def _last_and_best(variants: Sequence[Variant], lines: Lines) -> Picture:
    marks = [
        Points(
            variant.name,
            lines[variant.name],
            _known(run.numbers.last_top1 for run in variant.runs),
            _known(run.numbers.best_top1 for run in variant.runs),
        )
        for variant in variants
    ]
    return Picture(
        "last-and-best",
        "Last and best epoch",
        "A dot is the top-1 of a run after its last epoch, a ring that of its best epoch, which is "
        f"optimistic: it is chosen by the same images. Settings: {settings_text(variants)}.",
        f"Top-1 of each run after its last and its best epoch. Means after the last: "
        f"{_ends_text(variants, mean_top1)}.",
        points(marks, "top-1 on held-out images [%]", ("last epoch", "best epoch")),
    )


def _asked_and_reached(pruned: Sequence[Variant], lines: Lines) -> Picture:
    marks = [
        Points(
            variant.name,
            lines[variant.name],
            _known(run.numbers.reached for run in variant.runs),
            (variant.runs[0].numbers.asked,),
        )
        for variant in pruned
    ]
    texts = "; ".join(
        f"{variant.name} asked {number_text(variant.runs[0].numbers.asked, 1)} %, reached "
        f"{number_text(_reached(variant), 1)} %"
        for variant in pruned
    )
    return Picture(
        "asked-and-reached",
        "Sparsity asked for and reached",
        "A stroke is the sparsity asked for, a dot the one that a run has reached over all "
        f"convolution and linear weights. {_left_out(pruned)}Settings: {settings_text(pruned)}.",
        f"Sparsity asked for and reached: {texts}.",
        points(marks, "zero weights [%]", ("reached", "asked for"), strokes=True),
    )


def _left_out(variants: Sequence[Variant]) -> str:
    """The sentence about weights that the sparsity doesn't count, or nothing."""
    measured = [run.sparsity for variant in variants for run in variant.runs if run.sparsity]
    texts = dict.fromkeys(left_out_text(own.left_out) for own in measured if own.left_out)
    return f"Not counted: {'; '.join(texts)}. " if texts else ""


def _reached(variant: Variant) -> float | None:
    return mean_of(run.numbers.reached for run in variant.counted)


def _top5(variant: Variant) -> float | None:
    return mean_of(run.numbers.last_top5 for run in variant.counted)


def _parts(variants: Sequence[Variant]) -> Iterator[tuple[str, str, list[Variant]]]:
    """The variants of each picture of curves, after the ends of its title and its file name.

    Too many variants for a picture are split by method, each part with the dense ones.
    """
    if len(variants) <= MOST_CURVES:
        yield "", "", list(variants)
        return
    dense = [variant for variant in variants if variant.is_dense][: MOST_CURVES // 2]
    room = MOST_CURVES - len(dense)
    for method in dict.fromkeys(variant.method for variant in variants if not variant.is_dense):
        members = [variant for variant in variants if variant.method == method]
        count = math.ceil(len(members) / room)
        size = math.ceil(len(members) / count)
        for number in range(count):
            suffix = f"-{number + 1}" if count > 1 else ""
            part = [*dense, *members[number * size : (number + 1) * size]]
            yield f": {method}{suffix.replace('-', ' ')}", f"-{method}{suffix}", part


def _series(variants: Sequence[Variant], lines: Lines, key: str) -> list[Series]:
    return [
        Series(
            variant.name,
            lines[variant.name],
            tuple(curve(run.metrics, key) for run in variant.counted),
        )
        for variant in variants
    ]


def _shared_drops(variants: Sequence[Variant]) -> list[int]:
    """The epochs after which the learning rate drops, if they are the same in all runs."""
    schedules = {
        variant.recipe.lr_schedule.milestones if variant.recipe.lr_schedule.name == "step" else ()
        for variant in variants
    }
    return list(schedules.pop()) if len(schedules) == 1 else []


# Robustness


def _attacked(variants: Sequence[Variant], lines: Lines, attack: Attack) -> Picture:
    series = [
        Series(variant.name, lines[variant.name], found)
        for variant in variants
        if (found := _attack_curves(variant, attack))
    ]
    ends = "; ".join(
        f"{one.label} {number_text(y[-1])} % at epsilon {epsilon_text(x[-1], attack.space)}"
        for one in series
        for x, y in [mean_curve(one.curves)]
        if x
    )
    shown = [variant for variant in variants if variant.name in {one.label for one in series}]
    has_clean = any(x[:1] == (0.0,) for one in series for x, _ in one.curves)
    clean = "; at 0 are the clean images" if has_clean else ""
    images = sorted(
        {
            result.images
            for variant in shown
            for run in variant.runs
            for result in results_under(run.evaluation, attack)
        }
    )
    return Picture(
        f"robustness-{attack.name}",
        f"Top-1 under {attack.label}",
        f"ε is the most by which {SPACES[attack.space]} change{clean}. "
        f"{enumerated(images)} images. {_band(shown)}Settings: {settings_text(shown)}.",
        f"Top-1 over epsilon: {ends}.",
        _over_epsilon(series, attack),
    )


def _over_epsilon(series: Sequence[Series], attack: Attack) -> Images:
    """The picture of curves over epsilon, in 255ths if all are whole pixel levels."""
    in_levels = attack.space == "pixel" and all(
        is_level(epsilon) for one in series for x, _ in one.curves for epsilon in x
    )
    if not in_levels:
        return curves(series, (f"ε, of {SPACES[attack.space]}", "top-1 [%]"), marked=True)
    scaled = [
        dataclasses.replace(
            one, curves=tuple((tuple(round(255 * e) for e in x), y) for x, y in one.curves)
        )
        for one in series
    ]
    return curves(scaled, ("255 · ε, of pixels in [0, 1]", "top-1 [%]"), marked=True)


def _attack_curves(variant: Variant, attack: Attack) -> tuple[Curve, ...]:
    found = (attack_curve(run.evaluation, attack) for run in variant.runs)
    return tuple((x, y) for x, y in found if x)


def _ends_text(variants: Sequence[Variant], value: Callable[[Variant], float | None]) -> str:
    return "; ".join(f"{variant.name} {number_text(value(variant))} %" for variant in variants)


def _band(variants: Sequence[Variant]) -> str:
    """The meaning of lines and bands, if a variant has several runs."""
    several = any(len(variant.counted) > 1 for variant in variants)
    return f"{_BAND}. " if several else ""


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)
