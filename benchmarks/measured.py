"""The tables and numbers of files, of the wire and of overhead, from the records in results/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from logs import RESULTS, percent_text, table

_BYTES: Final = "size/bytes.json"
_LOADING: Final = "size/loading.json"
_WIRE: Final = "wire/wire.json"
_OVERHEAD: Final = "overhead/overhead.json"

Row = dict[str, Any]


@cache
def record_of(log: str) -> Any:
    """A record in JSON, below results/."""
    return json.loads((RESULTS / log).read_text(encoding="utf-8"))


# Files

_FORMS: Final = {"dense": "dense", "raw": "compressed", "deflated": "compressed, deflated"}


def sizes(*dtypes: str) -> str:
    """Megabytes of a pruned ResNet-50 in each form."""
    rows = []
    for row in record_of(_BYTES)["sizes"]:
        if row["dtype"] not in dtypes:
            continue
        megabytes = [
            "–" if row[f"{form}_bytes"] is None else f"{row[f'{form}_bytes'] / 1e6:.2f}"
            for form in ("dense", "zstd19", "csr", "raw", "deflated")
        ]
        known = [row["method"], percent_text(row["sparsity"], 0), row["dtype"]]
        rows.append([*known, *megabytes, f"{row['of_bound']:.3f}x"])
    forms = ["dense", "dense under zstd -19", "CSR", "compressed", "and deflated"]
    return table(["method", "zeros", "dtype", *forms, "compressed, of its bound"], rows)


def megabytes_of(form: str) -> str:
    """The size of a form of the ResNet-50 with CK at 70 % in float32."""
    for row in record_of(_BYTES)["sizes"]:
        if (row["method"], row["sparsity"], row["dtype"]) == ("ck", 0.7, "fp32"):
            return f"{row[f'{form}_bytes'] / 1e6:.1f} MB"
    raise ValueError(f"{_BYTES} has no ck at 70 % in fp32")


def strict_share() -> str:
    """The largest share, in float32, of a bound without bits for the kernels that CK has left."""
    rows = [row for row in record_of(_BYTES)["sizes"] if row["dtype"] == "fp32"]
    return f"{max(row['of_strict_bound'] for row in rows):.3f}x"


def loading() -> str:
    """Loading into a model, beside safetensors' own way for the dense file."""
    rows = [
        [
            f"{row['method']}, {percent_text(row['sparsity'], 0)}",
            name,
            f"{1e3 * row[form]['unchecked_s']:.0f}",
            f"{1e3 * row[form]['checked_s']:.0f}",
            f"{row[form]['ratio']:.2f}x",
            f"{row[form]['least_ratio']:.2f}–{row[form]['largest_ratio']:.2f}x",
        ]
        for row in record_of(_LOADING)["loads"]
        for form, name in _FORMS.items()
    ]
    header = ["pruning", "file", "`load_file` + `load_state_dict` of the dense file [ms]"]
    return table([*header, "`load_pruned_model` [ms]", "ratio", "range"], rows)


# The wire


def wire() -> str:
    """Bytes and times of steps over a limited link, without the hook and with it."""
    rows = record_of(_WIRE)["rows"]
    header = [
        "step",
        "sent at the collective [MB]",
        "of dense",
        "at the interface [MB]",
        "of dense",
    ]
    return table(
        [*header, "step [s]", "least to largest [s]", "faster by the hook"],
        [_wire_cells(name, rows) for name in rows],
    )


def _wire_cells(name: str, rows: dict[str, Row]) -> list[str]:
    row, dense = rows[name], rows["dense"]
    sent = [
        cell
        for key in ("collective_bytes", "interface_bytes")
        for cell in (f"{row[key] / 1e6:.1f}", f"{row[key] / dense[key]:.3f}x")
    ]
    sparsity, _, hook = name.partition(", ")
    label = "dense" if name == "dense" else f"fixed at {sparsity} %" + (f", {hook}" if hook else "")
    times = [f"{row['step_s']:.3f}", f"{row['fastest_s']:.3f}–{row['slowest_s']:.3f}"]
    return [label, *sent, *times, faster(sparsity) if hook else ""]


def faster(sparsity: str) -> str:
    """How many times faster a step with the hook is."""
    rows = record_of(_WIRE)["rows"]
    return f"{rows[sparsity]['step_s'] / rows[f'{sparsity}, hook']['step_s']:.2f}x"


def sent_share(sparsity: str) -> str:
    """The share of a dense step's bytes that a step with the hook sends, at the interface."""
    rows = record_of(_WIRE)["rows"]
    share = rows[f"{sparsity}, hook"]["interface_bytes"] / rows["dense"]["interface_bytes"]
    return f"{share:.3f}x"


# Overhead


def overhead() -> str:
    """What each way to train sparse adds to a step's CPU time and to its peak of memory."""
    return table(
        ["case", "step, CPU [ms]", "added [ms]", "of dense", "peak [MB]", "of dense"],
        [_overhead_cells(case, row) for case, row in _cases()],
    )


def added_share(case: str) -> str:
    """The CPU time that a case adds, of the dense step's."""
    rows = dict(_cases())
    return percent_text(rows[case]["added_ms"] / rows["dense"]["cpu_ms"], 1)


def hook_ms(phase: str) -> str:
    """The CPU time of all that the hook does in a phase, in milliseconds."""
    return f"{dict(_cases())[f'{phase}, DDP and hook']['hook_ms']:.0f}"


def era_step_ms() -> str:
    """The CPU time of `step()` in the mean of an era, masks included, in milliseconds."""
    return f"{dict(_cases())['era']['amortised_ms']:.1f}"


def _cases() -> Iterator[tuple[str, Row]]:
    for name, row in record_of(_OVERHEAD)["rows"].items():
        yield name.partition(": ")[2], row


def _overhead_cells(case: str, row: Row) -> list[str]:
    base = dict(_cases())["dense, DDP" if "DDP" in case else "dense"]
    added = f"{row['added_ms']:.1f}", percent_text(row["added_ms"] / base["cpu_ms"], 1)
    cells = [case, f"{row['cpu_ms']:.0f}", *(("", "") if case.startswith("dense") else added)]
    if "peak_bytes" not in row:
        return [*cells, "–", "–"]
    peak, dense_peak = row["peak_bytes"] - row.get("index_bytes", 0), base["peak_bytes"]
    share = "" if case.startswith("dense") else f"{peak / dense_peak:.3f}x"
    return [*cells, f"{peak / 1e6:.0f}", share]
