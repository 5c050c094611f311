"""benchmarks/tradeoff.py: accuracies of the logs beside times of the record."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

Row = dict[str, Any]


def timed(method: str, engine: str, precision: str, milliseconds: float) -> Row:
    return {"method": method, "engine": engine, "precision": precision, "best_ms": milliseconds}


ROWS = [
    timed("dense", "onnxruntime", "float32", 0.4),
    timed("dense", "openvino-f32", "float32", 0.3),
    timed("dense", "openvino-int8", "int8", 0.2),
    timed("ck-80-1x4", "sparse", "int8", 0.1),
    timed("ck-80-4x4", "sparse", "int8", 0.05),  # not trained yet
]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    """benchmarks/tradeoff_record.py with a record and logs of its own."""
    record = [{"threads": threads, "rows": ROWS} for threads in (1, 2)]
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        blocks, module = (importlib.import_module(name) for name in ("blocks", "tradeoff_record"))
        patch.setattr(blocks, "_BLOCKS", tmp_path)
        patch.setattr(module, "RECORD", tmp_path / "record.json")
        yield module


def log(folder: Path, name: str, floats: float, int8: float, sparsity: float) -> None:
    """Write the log of a run of eight epochs in floats, and one of quantization."""
    (folder / name).mkdir()
    epochs = [("fixed", floats)] * 8 + [("quantization", int8)]
    rows = [
        {
            "epoch": epoch,
            "phase": phase,
            "top1": top1,
            "target_sparsity": sparsity,
            "sparsity": sparsity,
        }
        for epoch, (phase, top1) in enumerate(epochs)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / name / "metrics.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def _logs(tmp_path: Path) -> None:
    for seed, better in ((0, 0.0), (1, 0.02)):
        log(tmp_path, f"dense-seed{seed}", 0.5 + better, 0.6 + better, 0.0)
        log(tmp_path, f"ck-80-1x4-seed{seed}", 0.4 + better, 0.55 + better, 0.8)


@pytest.mark.usefixtures("_logs")
def test_networks_have_the_time_of_their_fastest_engine(module):
    lines = module.tradeoff().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    half = "± 12.71"  # t of one degree of freedom times 2 / sqrt(2) / sqrt(2)
    assert cells == [
        ["dense", "float32", "0.300", "1.50x", "0.300", "1.50x", f"51.00 {half}", "+0.00", "2"],
        ["dense", "int8", "0.200", "1.00x", "0.200", "1.00x", f"61.00 {half}", "+0.00", "2"],
        [
            *("CK 80 %, `[1, 4]`", "int8", "0.100", "0.50x", "0.100", "0.50x"),
            *(f"56.00 {half}", "-5.00", "2"),
        ],
    ]


@pytest.mark.usefixtures("_logs")
def test_the_picture_has_the_networks(module, tmp_path):
    module.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_that_classifies_otherwise_ends_the_benchmark(module):
    tradeoff = importlib.import_module("tradeoff")
    images = torch.rand(10, 3, generator=torch.Generator().manual_seed(0))
    tradeoff.check("equal", lambda x: x, lambda x: 2 * x, images)
    with pytest.raises(SystemExit, match=r"^other: .*% of the images are classified as in torch"):
        tradeoff.check("other", lambda x: -x, lambda x: x, images)
