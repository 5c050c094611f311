"""The record of inference.py: runs, each of a network, a batch size and a number of threads.

Times compare within a run only, in which the cases take turns. So a new run replaces the earlier
one of the same place, with all its rows.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from inference_cases import DENSE, ENGINES, FLOAT32, INT8, MODELS, Case, Place, method_label
from logs import table
from records import versions

from starfire_prune.utils.files import write_text

Row = dict[str, Any]
Run = dict[str, Any]
_FEATURES: Final = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "amx_int8"),
)
_ISAS: Final = {128: "portable code", 256: "AVX2", 257: "AVX-VNNI", 512: "AVX-512"}
_PACKAGES: Final = ("torch", "timm", "onnxruntime", "openvino", "nncf")


def place_of(run: Run) -> Place:
    """The network, batch size and number of threads of a run."""
    return Place(run["model"], run["batch"], run["threads"])


def read(path: Path | None) -> dict[Place, Run]:
    """The runs of a file, by their place; empty if there is no such file."""
    if path is None or not path.exists():
        return {}
    return {place_of(run): run for run in json.loads(path.read_text(encoding="utf-8"))}


def write(path: Path, runs: Iterable[Run]) -> None:
    """Write the runs of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(list(runs), indent=1) + "\n")


def run_of(place: Place, rows: list[Row], isa: int = 0) -> Run:
    """The run of a place that has just ended on this machine, with kernels held to an `isa`."""
    return {
        "model": place.model,
        "batch": place.batch,
        "threads": place.threads,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu() + (f", kernels held to {_ISAS[isa]}" if isa else ""),
        "load_average": round(os.getloadavg()[1], 1),  # of five minutes, the run included
        "versions": versions(*_PACKAGES),
        "rows": rows,
    }


def left_out(runs: dict[Place, Run], chosen: Sequence[Case]) -> list[str]:
    """The cases of earlier runs that new runs would remove without measuring them again."""
    again = {str(case) for case in chosen}
    places = {case.place for case in chosen}
    earlier = [
        str(Case(place, row["method"], row["engine"]))
        for place, run in runs.items()
        if place in places
        for row in run["rows"]
    ]
    return [case for case in earlier if case not in again]


def cpu() -> str:
    """This machine's processor, its number of CPUs, and the features that engines use.

    An instruction set to which `ONEDNN_MAX_CPU_ISA` holds OpenVINO and torch is named.
    """
    name, features = platform.processor() or platform.machine(), set[str]()
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            features = set(value.split())
    known = [feature for feature in _FEATURES if feature in features]
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    limit = [] if held is None else [f"OpenVINO and torch held to {held}"]
    return ", ".join([f"{name}, {os.cpu_count()} CPUs", *known, *limit])


def is_rival(row: Row) -> bool:
    """Whether a row is of another engine on the dense network."""
    return row["method"] == DENSE and not ENGINES[row["engine"]].ours


def rivals(run: Run) -> dict[str, Row | None]:
    """The fastest dense engine of each precision, None where there is no such row.

    The keys are float32, default (what OpenVINO does unless it is told otherwise) and int8.
    """
    dense = [row for row in run["rows"] if is_rival(row)]
    groups = {
        FLOAT32: [row for row in dense if row["precision"] == FLOAT32],
        "default": [row for row in dense if row["engine"] == "openvino"],
        INT8: [row for row in dense if row["precision"] == INT8],
    }
    return {
        name: min(rows, key=lambda row: float(row["best_ms"]), default=None)
        for name, rows in groups.items()
    }


def shares(row: Row, run: Run) -> list[str]:
    """The time of a row as a multiple of each rival's; a dash where that was not measured."""
    return [
        "–" if rival is None else f"{row['best_ms'] / rival['best_ms']:.2f}x"
        for rival in rivals(run).values()
    ]


def printed(runs: Iterable[Run]) -> str:
    """The runs as a table in Markdown."""
    place = ["network", "batch", "threads", "engine", "precision", "pruned"]
    times = ["best [ms]", "median [ms]", "of float32", "of the default", "of int8"]
    rows = [
        [
            *(MODELS[run["model"]], str(run["batch"]), str(run["threads"]), row["engine"]),
            *(row["precision"], method_label(row["method"])),
            *(f"{row['best_ms']:.2f}", f"{row['median_ms']:.2f}", *shares(row, run)),
            f"{row['deviation']:.0e}",
        ]
        for run in runs
        for row in run["rows"]
    ]
    return table([*place, *times, "difference"], rows)
