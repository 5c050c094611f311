"""What it costs to prune kernels in blocks, on a part of CIFAR-10: the logs of the runs as a table.

    python tools/sweep.py recipes/tables/cifar10_blocks.yaml
    python benchmarks/blocks.py runs/tables/cifar10_blocks
    python benchmarks/tables.py

train the networks, keep the logs of the finished runs in results/cifar10_blocks/, and write the
table. It is of the runs that are kept: seeds may be missing, and come later.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from logs import RESULTS, percent_text, points_text, table

from starfire_prune.runs.folder import QUANTIZATION_PHASE, exported_file, metrics_file, read_metrics
from starfire_prune.utils.files import write_text

_BLOCKS: Final = RESULTS / "cifar10_blocks"
CALIBRATED: Final = _BLOCKS / "calibrated.json"  # top-1 in int8 by run, see calibrated.py
EPOCHS: Final = 8  # in floats; those of quantization follow
_LIMIT: Final = 1.5  # points of top-1 that blocks may cost before they are not worth having
_AMOUNTS: Final = (70, 80, 90)
_SINGLE: Final = "1x1"
_SHAPES: Final = {"1x1": "[1, 1]", "1x4": "[1, 4]", "4x1": "[4, 1]", "4x4": "[4, 4]"}
_KEPT: Final = ("python", "packages", "commit", "device", "cpus", "processes", "threads", "forked")
# Student's t for a two-sided interval of 95 %, by degrees of freedom from 1
_T95: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_MOST_SEEDS: Final = len(_T95) + 1


def main() -> int:
    """Keep the logs of the finished runs in the folder of a sweep."""
    parser = argparse.ArgumentParser(description="keep the logs of the finished runs of a sweep")
    parser.add_argument("runs", type=Path, help="such as runs/tables/cifar10_blocks")
    kept = list(keep(parser.parse_args().runs, _BLOCKS))
    print(f"kept: {', '.join(kept) or 'nothing, no run has finished'}")
    return 0 if kept else 1


def keep(runs: Path, target: Path) -> Iterator[str]:
    """Copy metrics and environment of each finished run; the command, which has paths, is left out.

    Args:
        runs: Folder of the runs' folders.
        target: Folder that gets a folder for each of them.

    Yields:
        The name of each run that was copied.
    """
    for folder in sorted(path for path in runs.iterdir() if exported_file(path).exists()):
        own = target / folder.name
        own.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(metrics_file(folder), metrics_file(own))
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        shown = {key: environment[key] for key in _KEPT if key in environment}
        write_text(own / "environment.json", json.dumps(shown, indent=1) + "\n")
        yield folder.name


# Statistics


@dataclass(frozen=True)
class Mean:
    """The mean of independent values with its interval of 95 %, by Student's t.

    Attributes:
        value: The mean.
        error: Its standard error; infinite for a single value.
        count: How many values there are.
    """

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value."""
        count = len(values)
        error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.inf
        return cls(statistics.mean(values), error, count)

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return math.inf if self.count == 1 else _t95(self.count) * self.error

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half


def _t95(count: int) -> float:
    """Student's t for the mean of so many values; of more than 31 that of 31, a little above."""
    return _T95[min(count, _MOST_SEEDS) - 2]


def verdict(difference: Mean) -> str:
    """Whether blocks cost more than the limit, by the interval of their difference."""
    if difference.high < -_LIMIT:
        return f"costs more than {_LIMIT} points"
    if difference.low > -_LIMIT:
        return f"costs less than {_LIMIT} points" + ("" if difference.high < 0 else ", if any")
    return f"undecided: {_seeds_to_decide(difference)}"


def _seeds_to_decide(difference: Mean) -> str:
    """How many seeds it takes if mean and spread stay as they are."""
    if difference.count < 3:
        return "too few seeds to tell how many it takes"
    spread = difference.error * math.sqrt(difference.count)
    distance = abs(difference.value + _LIMIT)
    for count in range(difference.count + 1, _MOST_SEEDS + 1):
        if _t95(count) * spread / math.sqrt(count) < distance:
            return f"about {count} seeds would decide"
    return f"more than {_MOST_SEEDS} seeds would decide"


# Runs


Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    """The last epoch of a run in floats, and in int8 if it was quantized."""

    floats: Row
    int8: Row | None


def kept_runs(variant: str) -> dict[int, _Run]:
    """The last epochs of a variant's runs, by seed.

    Raises:
        ValueError: If a run has not all epochs, or is not of the sparsity in its name.
    """
    found = {}
    for folder in _BLOCKS.glob(f"{variant}-seed*"):
        epochs = read_metrics(folder)
        rows = [row for row in epochs if row["phase"] != QUANTIZATION_PHASE]
        if len(rows) != EPOCHS:
            raise ValueError(f"{folder.name} has {len(rows)} of {EPOCHS} epochs")
        target = 100 * rows[-1]["target_sparsity"]
        if not math.isclose(target, _asked(variant)):
            raise ValueError(
                f"{folder.name} was pruned to {target:.0f} %, not to {_asked(variant)} %"
            )
        int8 = epochs[-1] if epochs[-1]["phase"] == QUANTIZATION_PHASE else None
        found[int(folder.name.rpartition("-seed")[2])] = _Run(rows[-1], int8)
    return dict(sorted(found.items()))


def _asked(variant: str) -> int:
    """The percentage of zeros in a variant's name."""
    named = re.match(r"ck-(\d+)-", variant)
    return int(named[1]) if named else 0


def top1_by_seed(variant: str) -> dict[int, float]:
    """Top-1 in percent after the last epoch in floats, by seed."""
    return {seed: 100 * run.floats["top1"] for seed, run in kept_runs(variant).items()}


def paired(variant: str, other: str) -> list[float]:
    """Points of top-1 by which a variant is above another one, for each seed that both have."""
    own, others = top1_by_seed(variant), top1_by_seed(other)
    return [own[seed] - others[seed] for seed in own if seed in others]


def finished() -> str:
    """How many runs the table is of."""
    return str(sum(len(kept_runs(variant)) for variant in ("dense", *_variants())))


def _variants() -> list[str]:
    return [f"ck-{amount}-{shape}" for amount in _AMOUNTS for shape in _SHAPES]


# The table


def blocks() -> str:
    """Accuracy of all variants, and the difference of blocks to single kernels."""
    rows = [_row("dense", "dense", "dense")]
    for amount in _AMOUNTS:
        for shape, name in _SHAPES.items():
            rows.append(_row(f"ck-{amount}-{shape}", f"`{name}`", f"ck-{amount}-{_SINGLE}"))
    header = ["block", "zeros [%]", "seeds", "top-1 [%]", "to dense", "to `[1, 1]`"]
    return table([*header, "standard error", "interval of 95 %", "verdict"], rows)


def _row(variant: str, name: str, single: str) -> list[str]:
    """A row of the table; `single` is the variant to compare with, which has no verdict."""
    runs = kept_runs(variant)
    if not runs:
        return [name, str(_asked(variant)), "0", *[""] * 5, "not measured yet"]
    share = statistics.mean(run.floats["sparsity"] for run in runs.values())
    zeros = percent_text(share).strip(" %")
    top1 = Mean.of([100 * run.floats["top1"] for run in runs.values()])
    to_dense = paired(variant, "dense") if variant != "dense" else []
    cells = [name, zeros, str(len(runs)), _with_interval(top1), _mean_points(to_dense)]
    return [*cells, *(_compared(paired(variant, single)) if variant != single else [""] * 4)]


def quantized() -> str:
    """Top-1 of the same networks in floats, in int8 by calibration, and after training for it."""
    calibrated = json.loads(CALIBRATED.read_text(encoding="utf-8")) if CALIBRATED.exists() else {}
    rows = []
    for variant in ("dense", *_variants()):
        runs = {seed: run for seed, run in kept_runs(variant).items() if run.int8}
        if not runs:
            continue
        floats = [100 * run.floats["top1"] for run in runs.values()]
        trained = [100 * run.int8["top1"] for run in runs.values() if run.int8]
        names = [f"{variant}-seed{seed}" for seed in runs]
        by_calibration = [100 * calibrated[name] for name in names if name in calibrated]
        block = "dense" if variant == "dense" else f"`{_SHAPES[variant.rpartition('-')[2]]}`"
        cells = [block, str(_asked(variant)), str(len(runs)), f"{statistics.mean(floats):.2f}"]
        complete = len(by_calibration) == len(runs)
        cells += _cost_cells(floats, by_calibration) if complete else ["not measured", "", ""]
        rows.append([*cells, *_cost_cells(floats, trained)])
    header = ["block", "zeros [%]", "seeds", "top-1 in floats [%]"]
    costs = ["difference", "interval of 95 %"]
    calibration, training = ("in int8 by calibration [%]", "in int8 after training for it [%]")
    return table([*header, calibration, *costs, training, *costs], rows)


def _cost_cells(before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The mean of accuracies, and the mean of their differences to others with its interval."""
    cost = Mean.of([one - other for one, other in zip(after, before, strict=True)])
    interval = f"{points_text(cost.low)} to {points_text(cost.high)}" if cost.count > 1 else ""
    return [f"{statistics.mean(after):.2f}", points_text(cost.value), interval]


def _with_interval(mean: Mean) -> str:
    return f"{mean.value:.2f}" + (f" ± {mean.half:.2f}" if mean.count > 1 else "")


def _mean_points(differences: Sequence[float]) -> str:
    return points_text(statistics.mean(differences)) if differences else ""


def _compared(differences: Sequence[float]) -> list[str]:
    """Difference, standard error, interval and verdict."""
    if not differences:
        return ["", "", "", f"no seed in common with `{_SHAPES[_SINGLE]}`"]
    mean = Mean.of(differences)
    if mean.count == 1:
        return [points_text(mean.value), "", "", verdict(mean)]
    interval = f"{points_text(mean.low)} to {points_text(mean.high)}"
    return [points_text(mean.value), f"{mean.error:.2f}", interval, verdict(mean)]


if __name__ == "__main__":
    sys.exit(main())
