"""benchmarks/inference.py: what it times, refuses and records, and the tables of its record."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the scripts import one another, as they do when one is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def cases() -> ModuleType:
    """The names of what is timed."""
    return importlib.import_module("inference_cases")


@pytest.fixture
def record() -> ModuleType:
    """The record's functions."""
    return importlib.import_module("inference_record")


@pytest.fixture
def inference() -> ModuleType:
    """The script itself."""
    return importlib.import_module("inference")


def row(engine: str, best_ms: float, method: str = "dense", precision: str = "float32") -> Any:
    return {
        "method": method,
        "engine": engine,
        "precision": precision,
        "gflop_left": 4.0,
        "megabytes": 10.0,
        "best_ms": best_ms,
        "median_ms": best_ms + 1,
        "deviation": 0.02,
    }


ROWS = [
    row("onnxruntime", 40.0),
    row("openvino-f32", 50.0),
    row("openvino", 20.0, precision="bfloat16"),
    row("onnxruntime-int8", 12.0, precision="int8"),
    row("openvino-int8", 10.0, precision="int8"),
    row("deepsparse", 1.0, "ck-0.8-1x1"),
    row("sparse", 2.0),
    row("sparse", 16.0, "ck-0.8-1x1"),
    row("sparse", 8.0, "ck-0.8-1x4"),
]


def run(rows: list[Any], threads: int = 2, cpu: str = "a CPU") -> Any:
    place = {"model": "resnet50", "batch": 1, "threads": threads}
    return {**place, "date": "2026-11-27", "cpu": cpu, "versions": {"torch": "2"}, "rows": rows}


# Names


@pytest.mark.parametrize(
    ("method", "size", "label"),
    [
        ("ck-0.8-1x1", (1, 1), "CK 80 %"),
        ("ck-0.7-4x1", (4, 1), "CK 70 %, `block_size: [4, 1]`"),
        ("ck-0.9-1x4", (1, 4), "CK 90 %, `block_size: [1, 4]`"),
        ("window-0.6-1x1", (1, 1), "window 60 %"),
    ],
)
def test_the_name_of_a_method_says_its_blocks(method, size, label, cases):
    assert (cases.block_size(method), cases.method_label(method)) == (size, label)


def test_engines_that_multiply_by_zeros_are_timed_on_the_dense_network_only(cases):
    found = cases.cases(["resnet18/*/b1/t2/openvino*", "resnet18/ck-0.8-*/b1/t2/*"])
    assert list(map(str, found)) == [
        "resnet18/dense/b1/t2/openvino",
        "resnet18/dense/b1/t2/openvino-f32",
        "resnet18/dense/b1/t2/openvino-int8",
        *(
            f"resnet18/ck-0.8-{block}/b1/t2/{engine}"
            for engine in ("sparse", "sparse-int8")
            for block in ("1x1", "4x1", "1x4", "4x4")
        ),
    ]


def test_every_engine_can_be_built(cases):
    engines = importlib.import_module("inference_engines")
    assert list(engines.BUILDERS) == list(cases.ENGINES)


# Comparison


def test_each_precision_is_represented_by_its_fastest_dense_engine(record):
    found = {name: rival["engine"] for name, rival in record.rivals(run(ROWS)).items()}
    assert found == {"float32": "onnxruntime", "default": "openvino", "int8": "openvino-int8"}


def test_a_default_of_float32_counts_as_float32_too(record):
    found = record.rivals(run([row("openvino", 30.0), row("openvino-f32", 40.0)]))
    assert (found["float32"]["engine"], found["default"]["engine"]) == ("openvino", "openvino")


def test_what_a_run_did_not_time_is_a_dash(record):
    pruned = row("sparse", 16.0, "ck-0.8-1x1")
    assert record.shares(pruned, run([row("eager", 32.0), pruned])) == ["0.50x", "–", "–"]


def test_outputs_that_ignore_the_input_are_unexplained(inference):
    expected = torch.tensor([[10.0, 11.0], [10.0, 13.0]])
    constant = expected.mean(0).expand(2, 2)
    assert inference.unexplained(expected, expected) == 0
    assert inference.unexplained(constant, expected) == 1
    assert inference.deviation(constant, expected) < 0.1  # which alone would not tell


def test_an_engine_with_another_network_ends_the_benchmark(inference, cases, monkeypatch):
    torch.manual_seed(0)
    model, images = nn.Linear(3, 5), torch.randn(4, 3)
    nn.init.constant_(model.bias, 10.0)
    average = model(images).mean(0)
    monkeypatch.setattr(inference, "network", lambda *names: model)
    inference.expected_outputs.cache_clear()
    case = cases.Case(cases.Place("resnet18", 1, 2), "dense", "openvino-int8")
    with torch.no_grad():
        assert inference.checked(case, inference.Built(model, "float32"), images) < 1e-6
        assert (
            0.1
            < inference.checked(case, inference.Built(lambda x: 0.8 * model(x), "int8"), images)
            < 0.3
        )
        message = r"resnet18/dense/b1/t2/openvino-int8: outputs in bfloat16 differ .* by 0\.2 of "
        with pytest.raises(SystemExit, match=message):
            inference.checked(case, inference.Built(lambda x: 0.8 * model(x), "bfloat16"), images)
        for wrong in (lambda x: 0 * x @ torch.ones(3, 5) + average, lambda x: model(x) + 100):
            with pytest.raises(SystemExit, match=r"at most 0\.5 is explained by the precision"):
                inference.checked(case, inference.Built(wrong, "int8"), images)
    inference.expected_outputs.cache_clear()


# The record


def test_a_written_record_is_read_by_its_places(record, cases, tmp_path):
    path = tmp_path / "new" / "inference.json"
    assert record.read(path) == {}
    runs = [record.run_of(cases.Place("resnet18", 8, threads), ROWS) for threads in (1, 2)]
    record.write(path, runs)
    assert record.read(path) == {cases.Place("resnet18", 8, t): runs[t - 1] for t in (1, 2)}


def test_cases_that_a_new_run_would_remove_are_found(record, cases):
    known = {cases.Place("resnet50", 1, 2): run(ROWS), cases.Place("resnet50", 1, 1): run(ROWS, 1)}
    chosen = cases.cases(["resnet50/*/b1/t2/*"])
    assert record.left_out(known, chosen) == ["resnet50/ck-0.8-1x1/b1/t2/deepsparse"]
    assert record.left_out(known, cases.cases(["resnet18/*"])) == []


def refusal(inference: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints when it refuses these arguments."""
    command_line = inference.parser()
    with pytest.raises(SystemExit, match=r"^2$"):
        inference.chosen_cases(command_line, command_line.parse_args(arguments))
    return capsys.readouterr().err


def test_arguments_that_can_not_be_are_refused(inference, capsys, monkeypatch):
    message = refusal(inference, capsys, "--only", "resnet51/*")
    assert "no case matches ['resnet51/*']; one is resnet18/dense/b1/t1/eager" in message
    message = refusal(inference, capsys, "--only", "*/sparse")
    assert "--images: name a folder of photographs, with train/ and val/" in message
    monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name: None)
    message = refusal(inference, capsys, "--images", "x", "--only", "*/openvino-int8")
    assert "not installed: nncf, onnx, onnxscript, openvino: pip install" in message


def test_a_part_of_a_run_does_not_replace_the_whole(inference, capsys, tmp_path):
    path = tmp_path / "inference.json"
    path.write_text(json.dumps([run(ROWS)]), encoding="utf-8")
    arguments = ["--images", "x", "--json", str(path), "--only", "resnet50/*/b1/t2/sparse"]
    message = refusal(inference, capsys, *arguments)
    assert f"--json: {path} has 6 cases of the same networks" in message
    assert "such as resnet50/dense/b1/t2/onnxruntime. Times compare within a run only" in message
    command_line = inference.parser()
    parsed = command_line.parse_args([*arguments, "--replace"])
    assert {case.engine for case in inference.chosen_cases(command_line, parsed)} == {"sparse"}


# Tables


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tables, of a record with one run for each number of threads."""
    module = importlib.import_module("runtimes")
    speeds = {"convolution_gflop_per_s": 500.0, "copied_gb_per_s": 10.0}
    peaks = [{"threads": threads, "cpu": "a CPU", **speeds} for threads in (1, 2)]
    runs = [run(ROWS), run(ROWS[:1], threads=1)]
    records = {module._RECORDS: runs, module._INT8_RECORDS: runs, module._PEAKS: peaks}
    monkeypatch.setattr(module, "record_of", records.__getitem__)
    return module


def test_the_summary_compares_with_the_best_engine_of_each_precision(runtimes):
    assert runtimes.inference_summary().splitlines() == [
        "| ResNet-50 | precision | of the best dense float32 | of the dense default of OpenVINO "
        "| of the best dense int8 |",
        "|---|---|---|---|---|",
        "| dense network | | 40.00 ms (ONNX Runtime) | 20.00 ms (bfloat16) "
        "| 10.00 ms (OpenVINO, quantized by NNCF) |",
        "| CK 80 % | float32 | 0.40x | 0.80x | 1.60x |",
    ]


def test_the_summary_leaves_out_precisions_that_were_not_timed(runtimes, monkeypatch):
    only_float32 = [row("eager", 32.0), row("sparse", 16.0, "ck-0.8-1x1")]
    monkeypatch.setattr(runtimes, "record_of", lambda name: [run(only_float32)])
    assert runtimes.inference_summary().splitlines() == [
        "| ResNet-50 | precision | of the best dense float32 |",
        "|---|---|---|",
        "| dense network | | 32.00 ms (torch, eager) |",
        "| CK 80 % | float32 | 0.50x |",
    ]


def test_the_summary_in_int8_has_blocks_of_input_channels_only(runtimes, monkeypatch):
    rows = [row("openvino-int8", 10.0, precision="int8")]
    rows += [
        row("sparse-int8", time, method, "int8")
        for time, method in ((12.0, "dense"), (9.0, "ck-0.8-4x1"), (6.0, "ck-0.8-1x4"))
    ]
    monkeypatch.setattr(runtimes, "record_of", lambda name: [run(rows)])
    assert runtimes.inference_summary().splitlines()[2:] == [
        "| dense network | | 10.00 ms (OpenVINO, quantized by NNCF) |",
        "| CK 80 %, `block_size: [1, 4]` | int8 | 0.60x |",
    ]


def test_places_are_compared_by_the_methods_that_all_of_them_have(runtimes, monkeypatch):
    def places(name: str) -> list[dict[str, Any]]:
        if name != runtimes._INT8_RECORDS:
            return []
        dense = row("openvino-int8", 10.0, precision="int8")
        one, other = (
            row("sparse-int8", time, method, "int8")
            for time, method in ((6.0, "ck-0.8-1x4"), (4.0, "ck-0.8-4x4"))
        )
        return [run([dense, one, other]), run([dense, one])]

    monkeypatch.setattr(runtimes, "record_of", places)
    header, _, *lines = runtimes.int8_places().splitlines()
    assert header.endswith("| dense int8 [ms] | CK 80 %, `block_size: [1, 4]` |")
    assert [line.rpartition("threads")[2].split(" | ")[-2:] for line in lines] == [
        ["10.00", "0.60x |"]
    ] * 2


def test_other_families_are_compared_in_float32(runtimes, monkeypatch):
    monkeypatch.setattr(runtimes, "record_of", lambda name: [run(ROWS)])
    dense = "| ResNet-50 | 1 | 2 | 40.00 ms (ONNX Runtime) |"
    assert runtimes.families().splitlines()[3:5] == [
        f"{dense} CK 80 % | 0.40x |",
        f"{dense} CK 80 %, `block_size: [1, 4]` | 0.20x |",
    ]


def test_a_network_has_a_column_for_each_run(runtimes):
    lines = runtimes.inference_of("resnet50").splitlines()
    assert lines[0] == "| ResNet-50 | batch 1, threads: 1 | batch 1, threads: 2 |"
    assert "| best dense int8 | – | 10.00 ms (OpenVINO, quantized by NNCF) |" in lines
    assert "| `sparse.compile`, CK 80 % | – | 0.40x / 0.80x / 1.60x |" in lines


def test_a_number_is_of_the_precision_that_it_names(runtimes, monkeypatch):
    assert runtimes.share_of_dense("int8", "ck-0.8-1x1") == "1.60x"
    assert runtimes.share_of_dense("float32", "ck-0.8-1x1") == "0.40x"
    only_float32 = [row("eager", 32.0), row("sparse", 16.0, "ck-0.8-1x1")]
    monkeypatch.setattr(runtimes, "record_of", lambda name: [run(only_float32)])
    assert runtimes.share_of_dense("int8", "ck-0.8-1x1") == "not measured"


def test_the_peaks_of_another_machine_are_refused(runtimes, monkeypatch):
    assert "| 2 | CK 80 % | 4.00 | 16.00 | 250 | 50 % | 10 | 1.0 |" in runtimes.roofline()
    monkeypatch.setattr(
        runtimes, "_run", lambda place: run(ROWS, threads=place.threads, cpu="another")
    )
    message = r"has resnet50/\*/b1/t1/\* of another, and inference/peaks\.json is of a CPU: run inf"
    with pytest.raises(ValueError, match=message):
        runtimes.roofline()


# Engines


class Small(nn.Module):
    """A network whose quantization takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(1)
        )

    def forward(self, images: torch.Tensor) -> Any:
        """The outputs of each image."""
        return self.layers(images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("engine", ["onnxruntime-int8", "openvino-int8"])
def test_an_int8_network_is_made_once_and_close_to_its_own(engine, cases, inference, tmp_path):
    for package in cases.ENGINES[engine].packages:
        pytest.importorskip(package)
    engines = importlib.import_module("inference_engines")
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(8, 3, 12, 12)
    files = engines.DenseFiles(tmp_path, images)
    case = cases.Case(cases.Place("resnet18", 4, 1), "dense", engine)
    with torch.no_grad():
        built = engines.BUILDERS[engine](engines.Setting(case, model, images[:4], files))
        written = {path: path.stat().st_mtime_ns for path in Path(tmp_path).iterdir()}
        engines.BUILDERS[engine](engines.Setting(case, model, images[:4], files))
        error = inference.unexplained(built.run(images[:4]), model(images[:4]))
    assert built.precision == "int8"
    assert 1e-4 < error < 0.1
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).iterdir()} == written
