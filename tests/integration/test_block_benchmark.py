"""benchmarks/blocks.py: what it says of blocks, from logs of any number of runs."""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

Log = Callable[..., None]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    """benchmarks/blocks.py, which reads a folder of logs that is empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        module = importlib.import_module("blocks")
        patch.setattr(module, "_BLOCKS", tmp_path)
        patch.setattr(module, "CALIBRATED", tmp_path / "calibrated.json")
        yield module


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Writes the log of a run."""

    def write(run: str, top1: float, target: float = 0.8, epochs: int = 8) -> None:
        (tmp_path / run).mkdir()
        rows = [
            {
                "epoch": epoch,
                "phase": "fixed",
                "top1": top1,
                "target_sparsity": target,
                "sparsity": target,
            }
            for epoch in range(epochs)
        ]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / run / "metrics.jsonl").write_text(text, encoding="utf-8")

    return write


def row_of(module: ModuleType, asked: int, block: str) -> list[str]:
    """The cells of a block's row."""
    lines = [line[1:-1].split("|") for line in module.blocks().splitlines()[2:]]
    cells = [[cell.strip() for cell in line] for line in lines]
    [found] = [row for row in cells if row[0] == block and row[1].startswith(str(asked))]
    return found


def share_within(t: float, freedom: int, steps: int = 20_000) -> float:
    """The probability of -t to t in Student's distribution, by the trapezoidal rule."""

    def density(x: float) -> float:
        return math.pow(1 + x * x / freedom, -(freedom + 1) / 2)

    width = 2 * t / steps
    inner = sum(density(-t + width * step) for step in range(1, steps))
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    return scale / math.sqrt(math.pi * freedom) * width * (inner + density(t))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 20, 30])
def test_the_interval_holds_95_percent_of_students_distribution(freedom, module):
    assert share_within(module._t95(freedom + 1), freedom) == pytest.approx(0.95, abs=1e-4)


def test_a_mean_has_the_standard_error_of_its_sample(module):
    mean = module.Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean.value, mean.count) == (3.0, 5)
    assert mean.error == pytest.approx(math.sqrt(2.5 / 5))
    assert mean.half == pytest.approx(2.776 * math.sqrt(0.5))
    assert (mean.low, mean.high) == (3.0 - mean.half, 3.0 + mean.half)


def test_a_single_value_may_be_anywhere(module):
    mean = module.Mean.of([1.0])
    assert (mean.value, mean.error, mean.low, mean.high) == (1.0, math.inf, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ([-2.0, -2.1, -1.9], "costs more than 1.5 points"),
        ([-0.5, -0.6, -0.4], "costs less than 1.5 points"),
        ([0.1, -0.1, 0.0], "costs less than 1.5 points, if any"),
        ([-0.5], "undecided: too few seeds to tell how many it takes"),
        ([-0.5, -2.0], "undecided: too few seeds to tell how many it takes"),
        # The spread is 1 and the distance 1: t / sqrt(n) is 1.05 for 6 seeds and 0.92 for 7
        ([-1.5, -0.5, 0.5], "undecided: about 7 seeds would decide"),
        # The spread is 0.55 and the distance 0.73: t / sqrt(n) is 1.59 for 4 seeds and 1.24 for 5
        ([-1.6, -2.5, -2.6], "undecided: about 5 seeds would decide"),
        ([-1.4, -1.5, -1.6], "undecided: more than 31 seeds would decide"),
    ],
)
def test_the_verdict_is_of_the_whole_interval(differences, sentence, module):
    assert module.verdict(module.Mean.of(differences)) == sentence


def test_blocks_are_compared_by_seeds_that_both_have(module, log):
    for seed, top1 in enumerate((0.70, 0.72, 0.90)):
        log(f"ck-80-1x1-seed{seed}", top1)
    for seed, top1 in enumerate((0.69, 0.70)):
        log(f"ck-80-1x4-seed{seed}", top1)
    row = row_of(module, 80, "`[1, 4]`")
    assert row[:6] == ["`[1, 4]`", "80.00", "2", "69.50 ± 6.35", "", "-1.50"]
    assert row[6:8] == ["0.50", "-7.85 to +4.85"]


def test_dense_training_is_compared_with_too(module, log):
    log("dense-seed4", 0.75, target=0.0)
    log("ck-90-4x4-seed4", 0.70, target=0.9)
    unpaired = ["", "", "", "no seed in common with `[1, 1]`"]
    row = row_of(module, 90, "`[4, 4]`")
    assert row == ["`[4, 4]`", "90.00", "1", "70.00", "-5.00", *unpaired]
    assert row_of(module, 0, "dense")[:4] == ["dense", "0.00", "1", "75.00"]


def test_a_single_seed_has_no_interval(module, log):
    log("ck-80-1x1-seed0", 0.70)
    log("ck-80-1x4-seed0", 0.69)
    verdict = "undecided: too few seeds to tell how many it takes"
    assert row_of(module, 80, "`[1, 4]`")[3:] == ["69.00", "", "-1.00", "", "", verdict]


def test_what_has_no_runs_is_said_to_be_unmeasured(module):
    assert row_of(module, 70, "`[4, 1]`") == ["`[4, 1]`", "70", "0", *[""] * 5, "not measured yet"]
    assert module.finished() == "0"


def test_all_kept_runs_are_counted(module, log):
    log("dense-seed0", 0.75, target=0.0)
    log("ck-70-4x1-seed11", 0.75, target=0.7)
    assert module.finished() == "2"


def test_a_run_without_all_its_epochs_is_told(module, log):
    log("ck-80-1x4-seed3", 0.7, epochs=7)
    with pytest.raises(ValueError, match="ck-80-1x4-seed3 has 7 of 8 epochs"):
        module.kept_runs("ck-80-1x4")


def test_a_run_of_another_sparsity_than_its_name_says_is_told(module, log):
    log("ck-80-1x4-seed3", 0.7, target=0.9)
    with pytest.raises(ValueError, match="ck-80-1x4-seed3 was pruned to 90 %, not to 80 %"):
        module.kept_runs("ck-80-1x4")


def test_finished_runs_are_kept_without_the_paths_of_their_commands(module, log, tmp_path):
    for run in ("dense-seed0", "dense-seed1"):
        log(run, 0.75, target=0.0)
        environment = {"command": ["/home/me/train.py"], "python": "3.11.7", "threads": 1}
        (tmp_path / run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (tmp_path / "dense-seed1" / "export").mkdir()
    (tmp_path / "dense-seed1" / "export" / "model.safetensors").touch()
    assert list(module.keep(tmp_path, tmp_path / "kept")) == ["dense-seed1"]
    kept = tmp_path / "kept" / "dense-seed1"
    assert json.loads((kept / "environment.json").read_text()) == {"python": "3.11.7", "threads": 1}
    source = tmp_path / "dense-seed1" / "metrics.jsonl"
    assert (kept / "metrics.jsonl").read_bytes() == source.read_bytes()
    assert not (tmp_path / "kept" / "dense-seed0").exists()


def test_runs_that_were_quantized_are_compared_with_themselves(module, log, tmp_path):
    for seed, (floats, int8) in enumerate(((0.70, 0.69), (0.72, 0.73))):
        log(f"dense-seed{seed}", floats, target=0.0)
        last = {"epoch": 8, "phase": "quantization", "top1": int8, "target_sparsity": 0.0}
        path = tmp_path / f"dense-seed{seed}" / "metrics.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(last | {"sparsity": 0.0}) + "\n")
    log("ck-80-1x1-seed0", 0.60)  # without such an epoch
    (row,) = module.quantized().splitlines()[2:]
    without = "| dense | 0 | 2 | 71.00 | not measured | |  | 71.00 | +0.00 | -12.71 to +12.71 |"
    assert row == without
    calibrated = {"dense-seed0": 0.68, "dense-seed1": 0.72}
    (tmp_path / "calibrated.json").write_text(json.dumps(calibrated), encoding="utf-8")
    (row,) = module.quantized().splitlines()[2:]
    by_calibration = "70.00 | -1.00 | -13.71 to +11.71 "
    assert row == without.replace("not measured | |  ", by_calibration)
    assert module.top1_by_seed("dense") == {0: 70.0, 1: 72.0}
