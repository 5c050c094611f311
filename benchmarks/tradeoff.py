"""Accuracy against time: pruned networks beside narrower dense ones, in float32 and in int8.

    CIFAR10=… python tools/sweep.py recipes/tables/cifar10_blocks.yaml --output RUNS
    CIFAR10=… python tools/sweep.py recipes/tables/cifar10_widths.yaml --output RUNS
    python benchmarks/blocks.py RUNS
    python benchmarks/tradeoff.py RUNS --images "$CIFAR10"
    python benchmarks/tables.py

train the networks, keep their logs, time the networks of the first seed, draw
docs/accuracy_against_time.png and write the table; networks whose first seed is missing are left
out. Dense networks are timed in each dense engine, and the fastest one counts; pruned ones in
`sparse.compile`. In int8, times and accuracies are of the networks after the epoch of training for
int8; OpenVINO is also timed on what NNCF makes of the network in float32, in case that is faster.
All networks take turns, so times compare with each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from inference import timings
from inference_cases import DENSE, FLOAT32, INT8, Case, Place
from inference_engines import BUILDERS, Built, DenseFiles, Run, Setting, openvino_file
from inference_record import run_of
from torch import Tensor
from tradeoff_record import PRUNED, RECORD, THREADS, VARIANTS, draw, tradeoff

from starfire_prune.data import load_datasets
from starfire_prune.export import export_onnx
from starfire_prune.export.input import find_input, load_input
from starfire_prune.runs.folder import int8_file
from starfire_prune.serialization import load_quantized
from starfire_prune.sparse import compile as compile_sparse
from starfire_prune.utils.files import write_text

IMAGE_SIZE: Final = 48
CALIBRATION_IMAGES: Final = 100
TEST_IMAGES: Final = 500
PICTURE: Final = Path(__file__).parents[1] / "docs" / "accuracy_against_time.png"
AGREEING: Final = 0.98  # the least share of images that an engine classifies as torch does
AGREEING_AFTER_NNCF: Final = 0.9  # whose rounding the network has not been trained for


# ---------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A network in an engine.

    Attributes:
        variant: The network.
        engine: Name of the engine.
        precision: `FLOAT32` or `INT8`.
        run: Computes the outputs for a batch.
    """

    variant: str
    engine: str
    precision: str
    run: Run


def engines(
    variant: str, folder: Path, images: Tensor, files: DenseFiles, threads: int
) -> Iterator[Timed]:
    """The engines that run a network, each checked against torch.

    Args:
        variant: The network.
        folder: Its run.
        images: To test the engines with, ``(images, 3, height, width)``.
        files: Where networks are exported to.
        threads: Number of threads.
    """
    model, one = load_input(find_input(folder)).eval(), images[:1]
    quantized = load_quantized(int8_file(folder), model=model)
    if variant in PRUNED:
        for precision, network in ((FLOAT32, model), (INT8, quantized)):
            run = compile_sparse(network, one)
            check(f"{variant} in {precision}", run, network, images)
            yield Timed(variant, "sparse", precision, run)
        return
    for engine in ("openvino-f32", "onnxruntime", "openvino-int8"):
        case = Case(Place(variant, 1, threads), DENSE, engine)
        built: Built = BUILDERS[engine](Setting(case, model, one, files))
        least = AGREEING_AFTER_NNCF if built.precision == INT8 else AGREEING
        check(str(case), built.run, model, images, least)
        yield Timed(variant, engine, built.precision, built.run)
    path = files.folder / f"{variant}-trained-int8.onnx"
    if not path.exists():
        export_onnx(quantized, path, tuple(one.shape[1:]))
    case = Case(Place(variant, 1, threads), DENSE, "openvino-int8")
    built = openvino_file(path, Setting(case, quantized, one, files))
    check(f"{case}, trained for int8", built.run, quantized, images)
    yield Timed(variant, "openvino, trained for int8", built.precision, built.run)


def check(name: str, run: Run, network: Run, images: Tensor, least: float = AGREEING) -> None:
    """End the benchmark unless an engine classifies images as torch does."""
    own = torch.cat([run(image).clone() for image in torch.split(images, 1)]).argmax(1)
    share = float((own == network(images).argmax(1)).float().mean())
    if share < least:
        raise SystemExit(f"{name}: {share:.1%} of the images are classified as in torch")


def measure(runs: Path, images: Tensor, calibration: Tensor, seconds: float) -> list[Any]:
    """A run for each number of threads, as in the record of inference.py."""
    measured = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            files = DenseFiles(Path(folder), calibration)
            built = [
                timed
                for variant in VARIANTS
                if int8_file(folder_of := runs / f"{variant}-seed0").exists()
                for timed in engines(variant, folder_of, images, files, threads)
            ]
            times: list[list[float]] = [[] for _ in built]
            for _ in range(8):
                for taken, timed in zip(times, built, strict=True):
                    taken += timings(timed.run, images[:1], seconds / 8)
        rows = [
            {
                "method": timed.variant,
                "engine": timed.engine,
                "precision": timed.precision,
                "best_ms": round(min(taken), 4),
                "median_ms": round(statistics.median(taken), 4),
            }
            for timed, taken in zip(built, times, strict=True)
        ]
        measured.append(run_of(Place("resnet14", 1, threads), rows))
    return measured


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Images to test engines with, and others to calibrate with."""
    part: Any = load_datasets("folder", root=folder, image_size=IMAGE_SIZE, crop_pct=1.0).val
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [part[index][0] for index in order[: TEST_IMAGES + CALIBRATION_IMAGES]]
    found = torch.stack(chosen)
    return found[:TEST_IMAGES], found[TEST_IMAGES:]


def main() -> None:
    """Time the networks, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", help="the sweeps' folder; without: only draw")
    parser.add_argument("--images", type=Path, help="the images of CIFAR10, with train/ and val/")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="duration of timing each network"
    )
    arguments = parser.parse_args()
    if arguments.runs is not None:
        if arguments.images is None:
            parser.error("--images: name the folder of images, with train/ and val/")
        images, calibration = photographs(arguments.images)
        measured = measure(arguments.runs, images, calibration, arguments.seconds)
        write_text(RECORD, json.dumps(measured, indent=1) + "\n")
    draw(PICTURE)
    print(tradeoff())


if __name__ == "__main__":
    main()
