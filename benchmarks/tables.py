"""The tables and numbers of README.md, RESULTS.md and docs/, from the logs in results/.

    python benchmarks/tables.py [--check]

writes them between their markers: `<!-- table: NAME -->` above a table and `<!-- end -->` below it,
`<!-- number: NAME -->1.23<!-- end -->` within a line. `--check` writes nothing and prints what
differs from the logs.
"""

from __future__ import annotations

import argparse
import difflib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from blocks import blocks, finished, quantized
from evidence import claims, tiny_accuracy, tiny_robustness, tiny_summary
from logs import (
    RESULTS,
    cells_of,
    epochs_of,
    found,
    last_top1,
    mean_top1,
    percent_text,
    printed_table,
    table,
)
from measured import (
    added_share,
    era_step_ms,
    faster,
    hook_ms,
    loading,
    megabytes_of,
    overhead,
    sent_share,
    sizes,
    strict_share,
    wire,
)
from runtimes import (
    families,
    inference_engines,
    inference_of,
    inference_runs,
    inference_summary,
    int8_amx,
    int8_avx2,
    int8_engines,
    int8_places,
    int8_runs,
    peak,
    roofline,
    share_of_dense,
)
from tradeoff_record import tradeoff

from starfire_prune.utils.files import write_text

ROOT = Path(__file__).parents[1]
FORMS_SHOWN = ("dense", "zstd19", "raw", "deflated")
FILES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "docs" / "distributed.md",
)

_TABLE: Final = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER: Final = re.compile(r"(<!-- number: ([\w.-]+) -->)([^<]*)(<!-- end -->)")


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, print what differs")
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
    """A page with its tables and numbers replaced by those of the logs.

    Raises:
        ValueError: If a marker has an unknown name.
    """
    text = _TABLE.sub(lambda m: f"{m[1]}{_named(TABLES, m[2])()}\n{m[3]}", text)
    return _NUMBER.sub(lambda m: f"{m[1]}{_named(NUMBERS, m[2])()}{m[4]}", text)


def _named(items: Mapping[str, Callable[[], str]], name: str) -> Callable[[], str]:
    if name in items:
        return items[name]
    near = difflib.get_close_matches(name, items, n=3) or sorted(items)
    raise ValueError(f"there is no table or number {name}; did you mean {', '.join(near)}?")


def _difference(path: Path, old: str, new: str) -> Iterable[str]:
    shown, logged = (text.splitlines(keepends=True) for text in (old, new))
    names = (str(path.relative_to(ROOT)), "from the logs")
    return difflib.unified_diff(shown, logged, *names, n=0)


# Masks

_MASKS: Final = "mask_update/output.txt"
_MASK_ALTERNATIVES: Final = {
    "native, another CK method by NumPy's partition of int64 keys, exact ties": "int64 keys",
    "native, another CK method by stable sorts": "stable sorts",
    "coremltools `MagnitudePruner`, `per_kernel` (its ratio is to ck, coarse)": "per_kernel",
}


def mask_alternatives() -> str:
    """CK by the engine and by alternatives that prune kernels."""
    _, _, engine, native, ratio = cells_of(r"\| ck \| 1\.6% .*", _MASKS)
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


def amortised_share() -> str:
    """The lowest and the highest share of `step()` in a training step, over an era."""
    lines = printed_table("step() over", _MASKS).splitlines()[2:]
    shares = sorted(line.strip("| ").split("|")[-1].strip(" %") for line in lines)
    return f"{shares[0]} to {shares[-1]} %"


# Runs on digits


def runs_table(kinds: Mapping[str, str]) -> str:
    """A row for each kind of run: top-1 after the last epoch of each seed, and the mean."""
    rows = []
    for name, runs in kinds.items():
        top1 = last_top1(runs)
        logs = [str(path.relative_to(RESULTS)) for path in sorted(RESULTS.glob(runs))]
        zeros = statistics.mean(epochs_of(log)[-1]["sparsity_network"] for log in logs)
        rows.append(
            [name, percent_text(zeros, 1), ", ".join(map(percent_text, top1)), mean_top1(runs)]
        )
    return table(["run", "sparsity", "top-1 by seed, last epoch", "mean"], rows)


def photographs() -> str:
    """The epochs of ResNet-50 v1.5 on images of 224 px."""
    rows = [
        [
            str(row["epoch"] + 1),
            row["phase"],
            percent_text(row["top1"], 1),
            percent_text(row["sparsity"], 1),
            percent_text(row["pruner_cpu_share"]),
        ]
        for row in epochs_of("imagenette/metrics.jsonl")
    ]
    return table(["epoch", "phase", "top-1", "sparsity", "pruner's share of the CPU time"], rows)


_COMPACTED: Final = {"ck, 90 %": "compact/ck90.txt", "filter, 50 %": "compact/filter50.txt"}


def compaction() -> str:
    """The sparse models and the compact ones."""
    rows = []
    for name, log in _COMPACTED.items():
        sparse, smaller = (cells_of(rf"\| {kind} \| .*", log) for kind in ("sparse", "compact"))
        parameters, macs = re.findall(r"[\d.]+%", found(r"\| left (.*)", log))
        deviation = found(r"largest deviation of the outputs: (\S+)", log)
        rows.append([name, *sparse, ""])
        shares = [f"{smaller[2]} ({parameters})", f"{smaller[3]} ({macs})"]
        rows.append(["", *smaller[:2], *shares, deviation])
    header = ["pruning", "model", "top-1", "parameters", "MACs at 32 px"]
    return table([*header, "largest difference of the outputs"], rows)


# The names of tables and numbers

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
    "tiny-accuracy": tiny_accuracy,
    "tiny-robustness": tiny_robustness,
    "tiny-summary": tiny_summary,
    "claims": claims,
    "blocks": blocks,
    "blocks-int8": quantized,
    "tradeoff": tradeoff,
    "sizes": lambda: sizes("fp32", "fp16", "bf16", "int8"),
    "loading": loading,
    "wire": wire,
    "overhead": overhead,
    "inference-summary": inference_summary,
    "inference-engines": inference_engines,
    "int8-engines": int8_engines,
    "int8-places": int8_places,
    "families": families,
    "int8-amx": int8_amx,
    "int8-avx2": int8_avx2,
    "int8-runs": int8_runs,
    "inference-resnet50": partial(inference_of, "resnet50"),
    "inference-resnet18": partial(inference_of, "resnet18"),
    "inference-mobilenetv2": partial(inference_of, "mobilenetv2_100"),
    "inference-runs": inference_runs,
    "roofline": roofline,
}
NUMBERS: Final[Mapping[str, Callable[[], str]]] = {
    "mask-update.training-step": lambda: found(r"160 px: ([\d.]+ s)", _MASKS),
    "mask-update.share": amortised_share,
    "quickstart.dense": lambda: mean_top1(QUICKSTART["dense"]),
    "quickstart.ck": lambda: mean_top1(QUICKSTART["ck"]),
    "finetune.dense": lambda: mean_top1(FINETUNE["dense, 10 epochs"]),
    "finetune.ck": lambda: mean_top1(FINETUNE["ck, 5 epochs more"]),
    **{f"size.{form}": partial(megabytes_of, form) for form in FORMS_SHOWN},
    "blocks.runs": finished,
    "size.strict": strict_share,
    **{f"wire.faster-{sparsity}": partial(faster, sparsity) for sparsity in ("70", "80")},
    "wire.share-70": partial(sent_share, "70"),
    "overhead.fixed": partial(added_share, "fixed"),
    "overhead.era": partial(added_share, "era"),
    **{
        f"inference.{method}": partial(share_of_dense, "float32", method)
        for method in ("ck-0.8-4x1", "window-0.8-1x1")
    },
    "peak.matrix": partial(peak, 1, "matrix_gflop_per_s"),
    "peak.convolution": partial(peak, 1, "convolution_gflop_per_s"),
    "peak.copied": partial(peak, 1, "copied_gb_per_s"),
    "overhead.era-step-ms": era_step_ms,
    "overhead.hook-ms": partial(hook_ms, "fixed"),
    "overhead.hook-dense-ms": partial(hook_ms, "dense"),
}


if __name__ == "__main__":
    sys.exit(main())
