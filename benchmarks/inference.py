"""Times sparse inference, and torch, ONNX Runtime, OpenVINO and DeepSparse for comparison.

    pip install onnxruntime openvino onnx onnxscript
    python benchmarks/inference.py [--only 'resnet50/*/b1/t2/*' ...] [--json PATH]
                                   [--deepsparse PYTHON]

The networks are pruned, with random weights, at 224 pixels in single precision. A case is named
network/method/b<batch>/t<threads>/engine, such as resnet50/ck-0.8-g4/b1/t2/sparse, where g4 stands
for blocks of 4 output channels (`block_size: [4, 1]`). Engines that multiply by zeros are timed
once per network, as `dense`. The cases of a network, batch size and number of threads alternate, so
that a noisy machine treats them alike. Reported are the fastest and the median run, in
milliseconds, and the difference between the outputs and torch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import importlib.util
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from starfire_prune import ck_structured, fc_fine, intra_structured, window_structured
from starfire_prune.sparse import compile as compile_sparse
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.files import write_text

MODELS = ("resnet18", "resnet50", "mobilenetv2_100")
METHODS = (
    *(f"ck-{amount}-g{block}" for block in (1, 4) for amount in (0.6, 0.7, 0.8, 0.9)),
    *(f"{method}-{amount}-g1" for method in ("window", "intra") for amount in (0.6, 0.8)),
)
DENSE = "dense"
DENSE_ENGINES = ("eager", "compile", "onnxruntime", "openvino")
SPARSE = "sparse"
BATCHES = (1, 8)
THREADS = (1, 2)
IMAGE_SIZE = 224
Run = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a pruning method and an engine to time."""

    model: str
    method: str
    batch: int
    threads: int
    engine: str

    def __str__(self) -> str:
        return f"{self.model}/{self.method}/b{self.batch}/t{self.threads}/{self.engine}"


def cases(patterns: Sequence[str], with_deepsparse: bool = False) -> list[Case]:
    """The cases that one of the patterns matches."""
    engines = [(DENSE, engine) for engine in (*DENSE_ENGINES, SPARSE)]
    engines += [(method, SPARSE) for method in METHODS]
    if with_deepsparse:
        engines += [(method, "deepsparse") for method in (DENSE, *METHODS)]
    every = [
        Case(model, method, batch, threads, engine)
        for model, batch, threads in itertools.product(MODELS, BATCHES, THREADS)
        for method, engine in engines
    ]
    return [case for case in every if any(fnmatch.fnmatch(str(case), p) for p in patterns)]


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=len(METHODS) + 1)
def network(name: str, method: str) -> nn.Module:
    """A pruned network with random weights, and batch norms as after some training."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    if method != DENSE:
        prune(model, method)
    return model


def prune(model: nn.Module, method: str) -> None:
    """Prune all but depthwise convolutions; 1x1 kernels by CK, linear layers by single weights."""
    kind, amount, block = method.split("-")
    share, block_size = float(amount), (int(block[1:]), 1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fc_fine(module, amount=share)
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            if kind == "ck" or module.kernel_size == (1, 1):
                ck_structured(module, amount=share, block_size=block_size)
            elif kind == "window":
                window_structured(module, amount=share, exact_layer_sparsity=True)
            else:
                intra_structured(module, amount=share)


# ---------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------


def eager(model: nn.Module, images: Tensor, threads: int) -> Run:
    """torch in eager mode."""
    return model


def compiled(model: nn.Module, images: Tensor, threads: int) -> Run:
    """torch.compile with default settings."""
    torch.compiler.reset()
    return torch.compile(model)


def sparse(model: nn.Module, images: Tensor, threads: int) -> Run:
    """The kernels measured here."""
    return compile_sparse(model, images)


def onnxruntime(model: nn.Module, images: Tensor, threads: int) -> Run:
    """ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, images, Path(folder))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(model: nn.Module, images: Tensor, threads: int) -> Run:
    """OpenVINO's CPU plugin, in single precision, for latency."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = exported(model, images, Path(folder))
        request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0])


def exported(model: nn.Module, images: Tensor, folder: Path, **options: Any) -> Path:
    """The model as an ONNX file."""
    path = folder / "model.onnx"
    options = {"dynamo": True, "verbose": False, "external_data": False, **options}
    torch.onnx.export(model, (images,), path, **options)
    return path


class DeepSparse:
    """DeepSparse in a separate process, with a separate environment."""

    python = ""

    def __init__(self, model: nn.Module, images: Tensor, threads: int) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Its latest opset is 13, which torch's older exporter still writes
            options = {"dynamo": False, "opset_version": 13, "external_data": None}
            model_path = exported(dense_copy(model), images, folder, **options)
            np.save(folder / "images.npy", images.numpy())
            paths = (model_path, folder / "images.npy")
            worker = Path(__file__).with_name("deepsparse_worker.py")
            sizes = (str(len(images)), str(threads))
            self._process = subprocess.Popen(
                [self.python, worker, *paths, *sizes, folder / "output.npy"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._wait_for("ready")
            self._output = torch.from_numpy(np.load(folder / "output.npy"))

    def __call__(self, images: Tensor) -> Tensor:
        """Run the model once on the images that it was created with."""
        commands = cast(IO[str], self._process.stdin)
        commands.write("run\n")
        commands.flush()
        self._wait_for("done")
        return self._output

    def _wait_for(self, word: str) -> None:
        for line in cast(IO[str], self._process.stdout):
            if line.strip() == word:
                return
        raise SystemExit("DeepSparse has exited; its error is above")

    def __del__(self) -> None:
        self._process.kill()
        self._process.wait()


ENGINES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "deepsparse": DeepSparse,
    SPARSE: sparse,
}


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


def measure(chosen: Sequence[Case], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each of the cases, which have one network, batch size and number of threads."""
    torch.set_num_threads(chosen[0].threads)
    images = torch.randn(chosen[0].batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    runs = [ENGINES[c.engine](network(c.model, c.method), images, c.threads) for c in chosen]
    deviations = [
        deviation(run(images), network(case.model, case.method)(images))
        for case, run in zip(chosen, runs, strict=True)
    ]
    times: list[list[float]] = [[] for _ in chosen]
    for _ in range(rounds):
        for taken, run in zip(times, runs, strict=True):
            taken += timings(run, images, seconds / rounds)
    for case, taken, error in zip(chosen, times, deviations, strict=True):
        yield {
            **dataclasses.asdict(case),
            **work_left(network(case.model, case.method), images),
            "best_ms": round(min(taken), 3),
            "median_ms": round(statistics.median(taken), 3),
            "deviation": error,
        }


def work_left(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The work that remains if zeros are skipped, in 10⁹ operations and in megabytes.

    A multiply-add counts as two operations. The bytes are those of each layer's input, output and
    nonzero weights, with two bytes of index each.
    """
    operations, moved = 0, 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations, moved
        kept = int(cast(Tensor, module.weight).count_nonzero())
        pixels = output.numel() // output.shape[1]
        operations += 2 * kept * pixels
        moved += inputs[0].nbytes + output.nbytes + 6 * kept

    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    return {"gflop_left": operations / 1e9, "megabytes": moved / 1e6}


def peaks(threads: int) -> dict[str, float]:
    """The highest speeds on this machine, in 10⁹ operations and bytes per second.

    They are measured with torch's matrix product, with the kernels of this package on a dense layer
    that fits in the caches, and with torch's copy of a large tensor.
    """
    torch.set_num_threads(threads)
    matrix, memory = torch.rand(2048, 2048), torch.rand(2**26)
    target, images = torch.empty_like(memory), torch.rand(1, 256, 14, 14)
    convolution = compile_sparse(nn.Conv2d(256, 256, 3, padding=1), images)
    product_ms = min(timings(lambda x: x @ x, matrix, 2.0))
    convolution_ms = min(timings(convolution, images, 2.0))
    copy_ms = min(timings(target.copy_, memory, 2.0))
    return {
        "threads": threads,
        "matrix_gflop_per_s": 2 * 2048**3 / product_ms / 1e6,
        "convolution_gflop_per_s": 2 * 9 * 256 * images.numel() / convolution_ms / 1e6,
        "copied_gb_per_s": 2 * memory.nbytes / copy_ms / 1e6,
    }


def deviation(output: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest output."""
    return float((output - expected).abs().max() / expected.abs().max())


def timings(run: Run, images: Tensor, seconds: float) -> list[float]:
    """Milliseconds of each run within `seconds`, after two runs that are not counted."""
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run(images)
        taken.append(1000 * (time.perf_counter() - start))
    return taken[2:]


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def read(path: Path | None) -> dict[Case, dict[str, Any]]:
    """The records of a file, by their case."""
    if path is None or not path.exists():
        return {}
    return {case_of(record): record for record in json.loads(path.read_text(encoding="utf-8"))}


def case_of(record: dict[str, Any]) -> Case:
    """The case of a record."""
    return Case(**{field.name: record[field.name] for field in dataclasses.fields(Case)})


def table(records: Iterable[dict[str, Any]]) -> str:
    """The records in Markdown, each with its time relative to the fastest dense runtime's."""
    known = list(records)
    rivals: dict[tuple[str, int, int], float] = {}
    for record in known:
        if record["engine"] in ("onnxruntime", "openvino"):
            place = (record["model"], record["batch"], record["threads"])
            rivals[place] = min(record["best_ms"], rivals.get(place, float("inf")))
    lines = [
        "| network | batch | threads | engine | pruned | best ms | median ms | share | deviation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in known:
        rival = rivals.get((r["model"], r["batch"], r["threads"]))
        share = f"{r['best_ms'] / rival:.2f}" if rival else ""
        lines.append(
            f"| {r['model']} | {r['batch']} | {r['threads']} | {r['engine']} | {r['method']} "
            f"| {r['best_ms']:.2f} | {r['median_ms']:.2f} | {share} | {r['deviation']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Time the chosen cases and print the table of all records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="cases, such as 'resnet18/*'"
    )
    parser.add_argument("--json", type=Path, help="file to which the records are added")
    parser.add_argument(
        "--deepsparse", metavar="PYTHON", help="interpreter of an environment with deepsparse 1.8"
    )
    parser.add_argument(
        "--peaks", action="store_true", help="measure the machine itself instead of networks"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of timing each case")
    parser.add_argument("--rounds", type=int, default=4, help="number of turns for each case")
    arguments = parser.parse_args()
    if arguments.peaks:
        found = [peaks(threads) for threads in THREADS]
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
        return
    DeepSparse.python = arguments.deepsparse or ""
    chosen = cases(arguments.only, with_deepsparse=bool(arguments.deepsparse))
    if not chosen:
        parser.error(f"argument --only: no case matches {arguments.only}; one is {cases(['*'])[0]}")
    for engine in sorted({case.engine for case in chosen} & {"onnxruntime", "openvino"}):
        if importlib.util.find_spec(engine) is None:
            parser.error(
                f"{engine} isn't installed: pip install {engine}, or exclude it with --only"
            )
    records = read(arguments.json)
    places = itertools.groupby(chosen, lambda case: (case.model, case.batch, case.threads))
    for _, place_cases in places:
        with torch.no_grad():
            for record in measure(list(place_cases), arguments.seconds, arguments.rounds):
                records[case_of(record)] = record
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(list(records.values()), indent=1) + "\n")
    print(table(records.values()))


if __name__ == "__main__":
    main()
