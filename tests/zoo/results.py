"""The measured cells of all models, in a file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.zoo.cells import measure
from tests.zoo.models import ZOO
from tests.zoo.outcomes import Outcome

__all__ = ["RESULTS", "measure_all", "read_results"]

RESULTS = Path(__file__).with_name("results.json")
_PACKAGES = ("torch", "timm", "torchvision", "torch-pruning", "onnx", "onnxscript", "onnxruntime")


def read_results() -> dict[str, Any]:
    """The file: date, versions, and the outcomes of each cell by model."""
    if not RESULTS.exists():
        return {"models": {}}
    read: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return read


def measure_all(names: Iterable[str], processes: int, report: Callable[[str], None]) -> None:
    """Measure models, and put them into the file as they are ready.

    Args:
        names: Names of models of the zoo.
        processes: Number of processes, each with one thread.
        report: Gets a line for each model.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=8) as pool:
        futures = {pool.submit(_measured, name): name for name in names}
        for future in as_completed(futures):
            name = futures[future]
            try:
                outcomes = future.result()
            except BrokenProcessPool:
                outcomes = {"plan": Outcome("unclear", "the process died")}
            report(f"{name}: {', '.join(_short(*each) for each in outcomes.items())}")
            _keep(name, outcomes)


def _measured(name: str) -> dict[str, Outcome]:
    return measure(ZOO[name])


def _short(cell: str, outcome: Outcome) -> str:
    return f"{cell} {outcome.status} {outcome.seconds:.0f} s"


def _keep(name: str, outcomes: dict[str, Outcome]) -> None:
    results = read_results()
    results["date"] = datetime.date.today().isoformat()
    results["versions"] = {each: version(each) for each in _PACKAGES}
    results["versions"]["Python"] = platform.python_version()
    found = results["models"]
    found[name] = {cell: dataclasses.asdict(outcome) for cell, outcome in outcomes.items()}
    results["models"] = {each: found[each] for each in ZOO if each in found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
