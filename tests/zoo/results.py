"""The measured cells of all models, in a file."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from tests.support.paths import ROOT
from tests.zoo.cells import CELLS, measure
from tests.zoo.models import ZOO
from tests.zoo.outcomes import Outcome

__all__ = ["RESULTS", "measure_all", "read_results", "write_results"]

RESULTS = Path(__file__).with_name("results.json")
_PACKAGES = ("torch", "timm", "torchvision", "torch-pruning", "onnx", "onnxscript", "onnxruntime")
_BATCH = 6  # models that a process measures
_LOCK = Lock()


def read_results() -> dict[str, Any]:
    """The file: date, versions, and the outcomes of each cell by model."""
    if not RESULTS.exists():
        return {"models": {}}
    read: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return read


def write_results(results: dict[str, Any]) -> None:
    """Write the file, a cell a line."""
    head = json.dumps({key: results[key] for key in ("date", "versions")}, indent=1)
    models = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(cell)}: {json.dumps(each)}" for cell, each in cells.items())
        + "\n }"
        for name, cells in results["models"].items()
    ]
    text = ",\n".join(models)
    RESULTS.write_text(
        f'{head.removesuffix("}").rstrip()},\n "models": {{\n{text}\n}}}}\n', encoding="utf-8"
    )


def measure_all(
    names: Iterable[str], cells: Sequence[str], processes: int, report: Callable[[str], None]
) -> None:
    """Measure models, and put them into the file as they are ready.

    Args:
        names: Names of models of the zoo.
        cells: The cells that are measured; others keep their results.
        processes: Number of processes, each with one thread.
        report: Gets a line for each model.
    """
    names = list(names)
    batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda batch: _measure_batch(batch, cells, report), batches))


def _measure_batch(names: list[str], cells: Sequence[str], report: Callable[[str], None]) -> None:
    """Measure models in a process of their own, and in another one what a crash leaves."""
    waiting = list(names)
    while waiting:
        arguments = [",".join(cells), *waiting]
        command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.results", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                _keep(waiting.pop(0), json.loads(line), report)
        if process.wait() and waiting:
            died = dataclasses.asdict(Outcome("unclear", f"exit status {process.returncode}"))
            _keep(waiting.pop(0), {"plan": died}, report)


def _keep(name: str, outcomes: dict[str, Any], report: Callable[[str], None]) -> None:
    with _LOCK:
        results = read_results()
        results["date"] = datetime.date.today().isoformat()
        results["versions"] = {each: version(each).partition("+")[0] for each in _PACKAGES}
        results["versions"]["Python"] = platform.python_version()
        found = results["models"]
        merged = {**found.get(name, {}), **outcomes}
        found[name] = {cell: merged[cell] for cell in CELLS if cell in merged}
        results["models"] = {each: found[each] for each in ZOO if each in found}
        write_results(results)
        cells = [f"{cell} {each['status']}" for cell, each in outcomes.items()]
        report(f"{name}: {', '.join(cells)}; {_seconds(outcomes):.0f} s")


def _seconds(outcomes: dict[str, Any]) -> float:
    return float(sum(each["seconds"] for each in outcomes.values()))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        measured = measure(ZOO[wanted], sys.argv[1].split(","))
        plain = {cell: dataclasses.asdict(each) for cell, each in measured.items()}
        sys.stdout.write(json.dumps(plain) + "\n")
        sys.stdout.flush()
        gc.collect()  # models have cycles
