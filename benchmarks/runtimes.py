"""Tables and numbers of inference on CPUs, from the records of inference.py in results/."""

from __future__ import annotations

from typing import Any, Final

from inference_cases import (
    DENSE,
    ENGINES,
    FLOAT32,
    METHODS,
    MODELS,
    SPARSE,
    SPARSE_INT8,
    Place,
    method_label,
)
from inference_record import Row, Run, place_of, rivals, shares
from logs import percent_text, table
from measured import record_of

_RECORDS: Final = "inference/inference.json"
_INT8_RECORDS: Final = "inference/int8.json"  # runs with quantized engines of this package
_XEON_RECORDS: Final = "inference/int8_xeon.json"  # another machine, held to VNNI
_AMX_RECORDS: Final = "inference/amx.json"  # the same machine, with its matrix instructions
_AVX2_RECORDS: Final = "inference/avx2.json"  # held to AVX2
_FAMILY_RECORDS: Final = "inference/families.json"  # networks that are not ResNets
_PEAKS: Final = "inference/peaks.json"
_SHOWN: Final = Place("resnet50", batch=1, threads=2)
# What a time is a multiple of, in the order of `rivals`
_RIVALS: Final = (
    "best dense float32",
    "dense default of OpenVINO",
    "best dense int8",
)
_LABELS: Final = dict(zip(("float32", "default", "int8"), _RIVALS, strict=True))
_BLOCKS_SHOWN: Final = ("1x4", "4x4")
_RUN_HEADER: Final = ("network", "batch", "threads", "date", "CPU", "load average", "versions")
_ORDER: Final = {name: number for number, name in enumerate((DENSE, *METHODS))}


def _runs(model: str) -> list[Run]:
    """The runs of a network by batch size and threads."""
    found = [run for run in record_of(_RECORDS) if run["model"] == model]
    return sorted(found, key=lambda run: (run["batch"], run["threads"]))


def _run(place: Place, records: str = _RECORDS) -> Run:
    """The run of a place."""
    for run in record_of(records):
        if place_of(run) == place:
            found: Run = run
            return found
    raise ValueError(f"{records} has no run of {place}")


def _ours(run: Run) -> list[Row]:
    """The rows of this package's engines, by engine and method."""
    rows = [row for row in run["rows"] if ENGINES[row["engine"]].ours]
    engines = list(ENGINES)
    return sorted(rows, key=lambda row: (engines.index(row["engine"]), _ORDER[row["method"]]))


def _rival_texts(run: Run) -> dict[str, str]:
    """The times of `rivals` with the engine, or for the default its precision; or dashes."""
    texts = {}
    for key, row in rivals(run).items():
        if row is None:
            texts[key] = "–"
        else:
            name = row["precision"] if key == "default" else ENGINES[row["engine"]].label
            texts[key] = f"{row['best_ms']:.2f} ms ({name})"
    return texts


def _label(row: Row) -> str:
    """An engine of this package and what it skips."""
    return f"{ENGINES[row['engine']].label}, {method_label(row['method'])}"


def inference_summary() -> str:
    """Pruned ResNet-50s beside the best dense engine of each precision, in one run.

    Those in float32 are pruned to 80 %.
    """
    run = _run(_SHOWN, _INT8_RECORDS)
    measured = [number for number, row in enumerate(rivals(run).values()) if row is not None]
    dense = list(_rival_texts(run).values())
    rows = [["dense network", "", *(dense[number] for number in measured)]]
    for row in _ours(run):
        wanted = ("ck-0.8-1x1", "ck-0.8-4x1") if row["precision"] == FLOAT32 else _BLOCKS_SHOWN
        if row["method"].endswith(wanted):
            cells = shares(row, run)
            label = (method_label(row["method"]), row["precision"])
            rows.append([*label, *(cells[number] for number in measured)])
    header = ["ResNet-50", "precision", *(f"of the {_RIVALS[number]}" for number in measured)]
    return table(header, rows)


def int8_engines() -> str:
    """All engines in the run with quantized engines of this package."""
    return _engines_table(_run(_SHOWN, _INT8_RECORDS))


def int8_places() -> str:
    """Quantized networks, batches and threads on two CPUs, beside dense int8 in the same run."""
    records = (record_of(name) for name in (_INT8_RECORDS, _XEON_RECORDS))
    runs = [run for of_one_cpu in records for run in of_one_cpu]
    methods = [
        method
        for method in METHODS
        if sum(_int8_share(run, method) is not None for run in runs) == len(runs)
    ]
    rows = [
        [
            *(_processor(run), MODELS[run["model"]], str(run["batch"]), str(run["threads"])),
            f"{rivals(run)['int8']['best_ms']:.2f}",  # type: ignore[index]
            *(f"{_int8_share(run, method):.2f}x" for method in methods),
        ]
        for run in runs
    ]
    header = ["CPU", "network", "batch", "threads", "dense int8 [ms]"]
    return table([*header, *(method_label(method) for method in methods)], rows)


def _processor(run: Run) -> str:
    """The processor of a run, without its features."""
    name: str = run["cpu"].partition(",")[0]
    return name.replace("(R)", "").removesuffix(" Processor")


def _int8_share(run: Run, method: str) -> float | None:
    """A quantized network's time of the best dense int8 engine's, if both were measured."""
    rival = rivals(run)["int8"]
    for row in run["rows"]:
        if rival and (row["engine"], row["method"]) == (SPARSE_INT8, method):
            return float(row["best_ms"] / rival["best_ms"])
    return None


def families() -> str:
    """Pruned networks of other families beside the best dense engine in float32."""
    rows = []
    for run in record_of(_FAMILY_RECORDS):
        dense = _rival_texts(run)["float32"]
        place = (MODELS[run["model"]], str(run["batch"]), str(run["threads"]))
        own = [(method_label(row["method"]), shares(row, run)[0]) for row in _ours(run)]
        rows += [[*place, dense, *each] for each in own]
    header = ["network", "batch", "threads", "best dense float32", "pruned", "of its time"]
    return table(header, rows)


def int8_amx() -> str:
    """The engines in int8 on a CPU with matrix instructions, which only OpenVINO uses."""
    return _engines_table(_run(_SHOWN, _AMX_RECORDS))


def int8_avx2() -> str:
    """The engines held to AVX2."""
    return _engines_table(_run(_SHOWN, _AVX2_RECORDS))


def int8_runs() -> str:
    """When, where and with what the runs of quantized engines and other families were measured."""
    names = (_INT8_RECORDS, _FAMILY_RECORDS, _XEON_RECORDS, _AMX_RECORDS, _AVX2_RECORDS)
    runs = [run for name in names for run in record_of(name)]
    return table(_RUN_HEADER, [_run_cells(run) for run in runs])


def inference_engines() -> str:
    """All engines on a ResNet-50 with batch size 1 and two threads."""
    return _engines_table(_run(_SHOWN))


def _engines_table(run: Run) -> str:
    """All engines of a run."""
    engines = list(ENGINES)
    rows = sorted(
        run["rows"], key=lambda row: (engines.index(row["engine"]), _ORDER[row["method"]])
    )
    cells = [
        [
            *(ENGINES[row["engine"]].label, row["precision"], method_label(row["method"])),
            *(f"{row['best_ms']:.2f}", f"{row['median_ms']:.2f}", *shares(row, run)),
            f"{row['deviation']:.0e}",
        ]
        for row in rows
    ]
    header = ["engine", "precision", "zeros", "best [ms]", "median [ms]"]
    return table([*header, *(f"of the {name}" for name in _RIVALS), "largest difference"], cells)


def inference_of(model: str) -> str:
    """A network: the dense engines, then this package's times as multiples of each of them."""
    runs = _runs(model)
    places = [f"batch {run['batch']}, threads: {run['threads']}" for run in runs]
    dense = [[name, *(_rival_texts(run)[key] for run in runs)] for key, name in _LABELS.items()]
    for engine in ("eager", "compile"):
        dense.append([ENGINES[engine].label, *(_cell(run, engine, DENSE) for run in runs)])
    own = {(row["engine"], row["method"]): _label(row) for run in runs for row in _ours(run)}
    ours = [[label, *(_cell(run, *key) for run in runs)] for key, label in own.items()]
    return table([MODELS[model], *places], [*dense, *ours])


def _cell(run: Run, engine: str, method: str) -> str:
    """The three multiples of a case, or a dash if it was not measured."""
    for row in run["rows"]:
        if (row["engine"], row["method"]) == (engine, method):
            return " / ".join(shares(row, run))
    return "–"


def inference_runs() -> str:
    """When, where and with what each run was measured."""
    return table(_RUN_HEADER, [_run_cells(run) for model in MODELS for run in _runs(model)])


def _run_cells(run: Run) -> list[str]:
    versions = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
    place = [MODELS[run["model"]], str(run["batch"]), str(run["threads"])]
    return [*place, run["date"], run["cpu"], str(run.get("load_average", "–")), versions]


def roofline() -> str:
    """The work that remains for a ResNet-50 in float32, batch 1, and the speed of the machine."""
    peaks = {row["threads"]: row for row in record_of(_PEAKS)}
    rows = []
    for threads in (1, 2):
        run = _run(Place("resnet50", batch=1, threads=threads))
        _check_same_cpu(run, peaks[threads])
        own = [row for row in _ours(run) if row["precision"] == FLOAT32]  # as the peaks are
        rows += [_roofline_cells(row, threads, peaks[threads]) for row in own]
    header = ["threads", "zeros", "GFLOP left", "best [ms]", "GFLOP/s", "of the peak"]
    return table([*header, "moved [MB]", "copied in [ms]"], rows)


def _check_same_cpu(run: Run, peaks: Row) -> None:
    if run["cpu"] != peaks["cpu"]:
        raise ValueError(
            f"{_RECORDS} has {place_of(run)} of {run['cpu']}, and {_PEAKS} is of {peaks['cpu']}: "
            f"run inference.py --peaks --json {_PEAKS} on the machine of the first"
        )


def _roofline_cells(row: Row, threads: int, peaks: dict[str, Any]) -> list[str]:
    rate = row["gflop_left"] / row["best_ms"] * 1e3
    least_ms = row["gflop_left"] / peaks["convolution_gflop_per_s"] * 1e3
    moved_ms = row["megabytes"] / peaks["copied_gb_per_s"]
    share = percent_text(least_ms / row["best_ms"], 0)
    cells = [f"{row['gflop_left']:.2f}", f"{row['best_ms']:.2f}", f"{rate:.0f}", share]
    zeros = method_label(row["method"])
    return [str(threads), zeros, *cells, f"{row['megabytes']:.0f}", f"{moved_ms:.1f}"]


def peak(threads: int, key: str) -> str:
    """The highest speed of the machine: a number of inference.py's --peaks."""
    return next(f"{row[key]:.0f}" for row in record_of(_PEAKS) if row["threads"] == threads)


def share_of_dense(precision: str, method: str) -> str:
    """A pruned ResNet-50's time of the best dense engine's; batch 1, two threads.

    Args:
        precision: of the dense engine: float32, default or int8.
        method: of this package's float32 engine.
    """
    run = _run(_SHOWN)
    rival = rivals(run)[precision]
    for row in _ours(run):
        if (row["engine"], row["method"]) == (SPARSE, method):
            return "not measured" if rival is None else f"{row['best_ms'] / rival['best_ms']:.2f}x"
    raise ValueError(f"{_RECORDS} has no {method} in its run of {_SHOWN}")
