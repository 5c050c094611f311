"""Tables and numbers of inference on CPUs, from the records of inference.py in results/."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from logs import percent_text, table
from measured import record_of

_RECORDS: Final = "inference/inference.json"
_PEAKS: Final = "inference/peaks.json"
_RUNTIMES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_ENGINES: Final = {
    "eager": "torch, eager",
    "compile": "torch.compile",
    **_RUNTIMES,
    "deepsparse": "DeepSparse 1.8",
    "sparse": "`sparse.compile`",
}
_METHODS: Final = {
    **{f"ck-0.{tenth}-g1": f"CK {tenth}0 %" for tenth in (6, 7, 8, 9)},
    **{f"ck-0.{tenth}-g4": f"CK {tenth}0 %, `block_size: [4, 1]`" for tenth in (6, 7, 8, 9)},
    **{f"window-0.{tenth}-g1": f"window {tenth}0 %" for tenth in (6, 8)},
    **{f"intra-0.{tenth}-g1": f"intra {tenth}0 %" for tenth in (6, 8)},
}

Row = dict[str, Any]


def _rows(**wanted: Any) -> Iterator[Row]:
    """The records with these values."""
    for row in record_of(_RECORDS):
        if all(row[key] == value for key, value in wanted.items()):
            yield row


def _dense(model: str, batch: int, threads: int) -> Row:
    """The faster of the dense runtimes."""
    rows = _rows(model=model, batch=batch, threads=threads, method="dense")
    return min((row for row in rows if row["engine"] in _RUNTIMES), key=lambda row: row["best_ms"])


def inference_resnet50() -> str:
    """All engines on a ResNet-50 with batch size 1 and two threads."""
    rival = _dense("resnet50", 1, 2)["best_ms"]
    rows = [
        [
            _ENGINES[engine],
            "dense" if row["method"] == "dense" else _METHODS[row["method"]],
            f"{row['best_ms']:.2f}",
            f"{row['median_ms']:.2f}",
            f"{row['best_ms'] / rival:.2f}x",
            f"{row['deviation']:.0e}",
        ]
        for engine in _ENGINES
        for row in _rows(model="resnet50", batch=1, threads=2, engine=engine)
    ]
    header = ["engine", "zeros", "best [ms]", "median [ms]", "of the faster dense runtime"]
    return table([*header, "largest difference"], rows)


def inference() -> str:
    """Times relative to the faster dense runtime's, by network, batch size and threads."""
    places = sorted({(row["model"], row["batch"], row["threads"]) for row in _rows()})
    dense = ["dense runtime [ms]", "torch, eager", "torch.compile", "dense here"]
    header = ["network", "batch", "threads", *dense, *_METHODS.values()]
    return table(header, [_shares(*place) for place in places])


def _shares(model: str, batch: int, threads: int) -> list[str]:
    rival = _dense(model, batch, threads)
    rows = list(_rows(model=model, batch=batch, threads=threads))
    own = {row["method"]: row["best_ms"] for row in rows if row["engine"] == "sparse"}
    dense = {row["engine"]: row["best_ms"] for row in rows if row["method"] == "dense"}
    times = [dense["eager"], dense["compile"], *(own[method] for method in ("dense", *_METHODS))]
    dense_ms = f"{rival['best_ms']:.2f} ({_RUNTIMES[rival['engine']]})"
    shares = [f"{time / rival['best_ms']:.2f}x" for time in times]
    return [model, str(batch), str(threads), dense_ms, *shares]


def roofline() -> str:
    """The work that remains for a ResNet-50, batch size 1, and the speed of the machine."""
    peaks = {row["threads"]: row for row in record_of(_PEAKS)}
    rows = []
    for threads in (1, 2):
        for row in _rows(model="resnet50", batch=1, threads=threads, engine="sparse"):
            rate = row["gflop_left"] / row["best_ms"] * 1e3
            least_ms = row["gflop_left"] / peaks[threads]["convolution_gflop_per_s"] * 1e3
            moved_ms = row["megabytes"] / peaks[threads]["copied_gb_per_s"]
            zeros = "dense" if row["method"] == "dense" else _METHODS[row["method"]]
            share = percent_text(least_ms / row["best_ms"], 0)
            cells = [f"{row['gflop_left']:.2f}", f"{row['best_ms']:.2f}", f"{rate:.0f}", share]
            rows.append([str(threads), zeros, *cells, f"{row['megabytes']:.0f}", f"{moved_ms:.1f}"])
    header = ["threads", "zeros", "GFLOP left", "best [ms]", "GFLOP/s", "of the peak"]
    return table([*header, "moved [MB]", "copied in [ms]"], rows)


def peak(threads: int, key: str) -> str:
    """The highest speed of the machine: a number of inference.py's --peaks."""
    return next(f"{row[key]:.0f}" for row in record_of(_PEAKS) if row["threads"] == threads)


def share_of_dense(method: str) -> str:
    """A pruned ResNet-50's time relative to the faster dense runtime's; batch 1, two threads."""
    (row,) = _rows(model="resnet50", batch=1, threads=2, method=method, engine="sparse")
    return f"{row['best_ms'] / _dense('resnet50', 1, 2)['best_ms']:.2f}x"
