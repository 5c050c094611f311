"""The tables and numbers of README.md and RESULTS.md, from the logs in results/.

    python benchmarks/tables.py [--check]

writes them anew between their markers: `<!-- table: NAME -->` above a table and `<!-- end -->`
below it, `<!-- number: NAME -->1.23<!-- end -->` within a line. `--check` writes nothing and tells
what is not as the logs have it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from starfire_prune.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md")

Rows = Sequence[Sequence[str]]

_TABLE: Final = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER: Final = re.compile(r"(<!-- number: ([\w.-]+) -->)([^<]*)(<!-- end -->)")


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, tell what differs")
    check = parser.parse_args().check
    differing = 0
    for path in FILES:
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        differing += old != new
        if check:
            sys.stdout.writelines(_difference(path, old, new))
        elif old != new:
            write_text(path, new)
            print(f"written: {path.relative_to(ROOT)}")
    return int(check and differing > 0)


def filled(text: str) -> str:
    """A page with its tables and numbers as the logs have them.

    Raises:
        ValueError: for a marker of an unknown name.
    """
    text = _TABLE.sub(lambda m: f"{m[1]}{_named(TABLES, m[2])()}\n{m[3]}", text)
    return _NUMBER.sub(lambda m: f"{m[1]}{_named(NUMBERS, m[2])()}{m[4]}", text)


def _named(items: Mapping[str, Callable[[], str]], name: str) -> Callable[[], str]:
    if name in items:
        return items[name]
    near = difflib.get_close_matches(name, items, n=3) or sorted(items)
    raise ValueError(f"there is no table or number {name}; there are {', '.join(near)}")


def _difference(path: Path, old: str, new: str) -> Iterable[str]:
    lines = (text.splitlines(keepends=True) for text in (old, new))
    return difflib.unified_diff(*lines, str(path.relative_to(ROOT)), "as the logs have it", n=0)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


# Logs


@cache
def epochs_of(log: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, below results/."""
    text = (RESULTS / log).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def printed(log: str) -> str:
    """What a benchmark has printed."""
    return (RESULTS / log).read_text(encoding="utf-8")


def found(pattern: str, log: str) -> str:
    """The group of a pattern in what a benchmark has printed."""
    match = re.search(pattern, printed(log))
    if match is None:
        raise ValueError(f"{log} has nothing like {pattern}")
    return match[1]


def printed_table(first: str, log: str) -> str:
    """The table that begins so in what a benchmark has printed, as it stands there."""
    text = printed(log)
    start = text.index(f"| {first}")
    return text[start:].partition("\n\n")[0].rstrip("\n")


def last_top1(runs: str) -> list[float]:
    """Top-1 after the last epoch, of the logs that fit a pattern below results/."""
    logs = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.glob(runs))
    return [epochs_of(log)[-1]["top1"] for log in logs]


def mean_top1(runs: str) -> str:
    """Their mean."""
    return _percent(statistics.mean(last_top1(runs)))


def _percent(share: float, digits: int = 2) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


# Masks

_MASKS: Final = "mask_update/output.txt"
_MASK_ALTERNATIVES: Final = {
    "native, a CK method of its own by NumPy's partition of int64 keys, exact ties": "int64 keys",
    "native, a CK method of its own by stable sorts": "stable sorts",
    "coremltools `MagnitudePruner`, `per_kernel` (its ratio is to ck, coarse)": "per_kernel",
}


def mask_alternatives() -> str:
    """CK by the engine and by what else prunes kernels."""
    _, _, engine, native, ratio = _cells(r"\| ck \| 1\.6% .*", _MASKS)
    rows = [
        ["engine", engine, "1.0x"],
        ["native, with this package's mask functions", native, ratio],
    ]
    for name, key in _MASK_ALTERNATIVES.items():
        seconds, ratio = (
            found(rf"{key}: {part}", _MASKS) for part in (r"([\d.]+) s", r".*?([\d.]+x)")
        )
        rows.append([name, seconds, ratio])
    return table(["ck, all layers", "seconds", "of the engine's"], rows)


def _cells(pattern: str, log: str) -> list[str]:
    line = found(f"({pattern})", log)
    return [cell.strip() for cell in line.strip("| ").split("|")]


# Runs on digits


def runs_table(kinds: Mapping[str, str]) -> str:
    """A row for each kind of run: the last epoch of each seed, and their mean."""
    rows = []
    for name, runs in kinds.items():
        top1 = last_top1(runs)
        log = next(RESULTS.glob(runs)).relative_to(RESULTS)
        zeros = epochs_of(str(log))[-1]["sparsity_network"]
        rows.append([name, _percent(zeros, 1), ", ".join(map(_percent, top1)), mean_top1(runs)])
    return table(["run", "sparsity", "top-1 by seed, last epoch", "mean"], rows)


def photographs() -> str:
    """The epochs of ResNet-50 v1.5 on images of 224 px."""
    rows = [
        [
            str(row["epoch"]),
            row["phase"],
            _percent(row["top1"], 1),
            _percent(row["sparsity"], 1),
            _percent(row["pruner_cpu_share"]),
        ]
        for row in epochs_of("imagenette/metrics.jsonl")
    ]
    return table(["epoch", "phase", "top-1", "sparsity", "pruner's share of the CPU time"], rows)


_COMPACTED: Final = {"ck, 90 %": "compact/ck90.txt", "filter, 50 %": "compact/filter50.txt"}


def compaction() -> str:
    """The sparse models and the compact ones."""
    rows = []
    for name, log in _COMPACTED.items():
        sparse, smaller = (_cells(rf"\| {kind} \| .*", log) for kind in ("sparse", "compact"))
        parameters, macs = re.findall(r"[\d.]+%", found(r"\| left (.*)", log))
        deviation = found(r"largest deviation of the outputs: (\S+)", log)
        rows.append([name, *sparse, ""])
        shares = [f"{smaller[2]} ({parameters})", f"{smaller[3]} ({macs})"]
        rows.append(["", *smaller[:2], *shares, deviation])
    header = ["pruning", "model", "top-1", "parameters", "MACs at 32 px"]
    return table([*header, "largest difference of the outputs"], rows)


# What the pages may name

QUICKSTART: Final = {"dense": "quickstart/dense-*.jsonl", "ck": "quickstart/ck-*.jsonl"}
FINETUNE: Final = {
    "dense, 10 epochs": "finetune/dense-*.jsonl",
    "ck, 5 epochs more": "finetune/ck-*.jsonl",
}
TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "mask-update": lambda: printed_table("full update", _MASKS),
    "mask-alternatives": mask_alternatives,
    "mask-amortised": lambda: printed_table("step() over", _MASKS),
    "quickstart": lambda: runs_table(QUICKSTART),
    "finetune": lambda: runs_table(FINETUNE),
    "imagenette": photographs,
    "compact": compaction,
}
NUMBERS: Final[Mapping[str, Callable[[], str]]] = {
    "mask-update.training-step": lambda: found(r"160 px: ([\d.]+ s)", _MASKS),
    "quickstart.dense": lambda: mean_top1(QUICKSTART["dense"]),
    "quickstart.ck": lambda: mean_top1(QUICKSTART["ck"]),
    "finetune.dense": lambda: mean_top1(FINETUNE["dense, 10 epochs"]),
    "finetune.ck": lambda: mean_top1(FINETUNE["ck, 5 epochs more"]),
}


if __name__ == "__main__":
    sys.exit(main())
