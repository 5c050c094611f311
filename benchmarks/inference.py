"""Times sparse inference, beside other engines on the dense network in each precision.

    pip install -e '.[train,runtimes]'
    python benchmarks/inference.py --images FOLDER [--only 'resnet50/*/b1/t2/*' ...] [--json PATH]
                                   [--deepsparse PYTHON]
    python benchmarks/inference.py --peaks [--json PATH]

The networks are pruned, with random weights, at 224 pixels. A case is named
network/method/b<batch>/t<threads>/engine, such as resnet50/ck-0.8-4x1/b1/t2/sparse, where 4x1
stands for blocks of 4 output channels and 1 input channel (`block_size: [4, 1]`). Engines that
multiply by zeros are timed once per network, as `dense`: in float32, in the precision that OpenVINO
chooses by itself, and quantized to int8 after training. FOLDER holds photographs as
`val/<class>/…` (and `train/<class>/…`), by which activations are scaled and on which networks run.

The cases of a network, batch size and number of threads take turns, so that a noisy machine treats
them alike; times compare within such a run only. The record can be made in parts, each of whole
runs. Reported are the fastest and the median time, in milliseconds, and the difference between the
outputs and those of the same network in torch in float32; an engine whose outputs differ by more
than its precision explains ends the benchmark.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from inference_cases import (
    DENSE,
    ENGINES,
    FLOAT32,
    INT8,
    METHODS,
    THREADS,
    Case,
    block_size,
    cases,
)
from inference_engines import BUILDERS, Built, DeepSparse, DenseFiles, Run, Setting
from inference_record import cpu, left_out, printed, read, run_of, write
from torch import Tensor, nn

from starfire_prune import ck_structured, fc_fine, intra_structured, window_structured
from starfire_prune.data import load_datasets
from starfire_prune.sparse import compile as compile_sparse
from starfire_prune.utils.files import write_text

IMAGE_SIZE = 224
CALIBRATION_IMAGES = 100
TEST_IMAGES = 8  # a multiple of each batch size
# The largest errors of outputs, by precision. Those of an unrelated network are above 1.
LIMITS = {FLOAT32: 1e-3, "float16": 0.05, "bfloat16": 0.15, INT8: 0.5}


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


# Networks of the same images alone: a tensor is equal to itself only
@functools.lru_cache(maxsize=len(METHODS) + 1)
def network(name: str, method: str, images: Tensor) -> nn.Module:
    """A pruned network with random weights, and batch norms as after training on the images.

    The statistics make outputs depend on the image, and biases around 1 keep most activations above
    zero: with biases around 0 random layers amplify rounding until, in int8, it hides whether an
    engine runs the right network.
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, mean=1.0, std=0.1)
        norm.momentum = None  # the statistics become those of the next pass
    if method != DENSE:
        prune(model, method)
    for norm in norms:
        norm.train()
    model(images)
    return model.eval()


def prune(model: nn.Module, method: str) -> None:
    """Prune all but depthwise convolutions; 1x1 kernels by CK, linear layers by single weights."""
    kind, amount, _ = method.split("-")
    share = float(amount)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fc_fine(module, amount=share)
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            if kind == "ck" or module.kernel_size == (1, 1):
                ck_structured(module, amount=share, block_size=block_size(method))
            elif kind == "window":
                window_structured(module, amount=share, exact_layer_sparsity=True)
            else:
                intra_structured(module, amount=share)


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


def measure(
    chosen: Sequence[Case],
    images: Tensor,
    files: DenseFiles,
    seconds: float,
    rounds: int,
    isa: int,
) -> Iterator[dict[str, Any]]:
    """A row for each of the cases, which are of one place."""
    place = chosen[0].place
    torch.set_num_threads(place.threads)
    batch = images[: place.batch]
    built = [
        BUILDERS[case.engine](
            Setting(case, network(place.model, case.method, images), batch, files, isa)
        )
        for case in chosen
    ]
    differences = [
        checked(case, engine, images) for case, engine in zip(chosen, built, strict=True)
    ]
    times: list[list[float]] = [[] for _ in chosen]
    for _ in range(rounds):
        for taken, engine in zip(times, built, strict=True):
            taken += timings(engine.run, batch, seconds / rounds)
    for case, engine, taken, difference in zip(chosen, built, times, differences, strict=True):
        yield {
            "method": case.method,
            "engine": case.engine,
            "precision": engine.precision,
            **work_left(network(place.model, case.method, images), batch),
            "best_ms": round(min(taken), 3),
            "median_ms": round(statistics.median(taken), 3),
            "deviation": difference,
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


def checked(case: Case, engine: Built, images: Tensor) -> float:
    """The largest difference of the outputs from those in torch, of the largest output.

    An engine on a pruned network that is quantized is compared with the quantized network in torch:
    random pruned networks amplify the rounding of weights until it hides all else.

    Raises:
        SystemExit: If the outputs, or how they differ between images, are not the network's.
    """
    if engine.reference is None:
        expected = expected_outputs(case.place.model, case.method, images)
    else:
        expected = engine.reference(images)
    parts = torch.split(images, case.place.batch)
    outputs = torch.cat([engine.run(part).clone() for part in parts])
    errors = (deviation(outputs, expected), unexplained(outputs, expected))
    if not max(errors) <= LIMITS[engine.precision]:
        raise SystemExit(
            f"{case}: outputs in {engine.precision} differ from those expected by {errors[0]:.2g} "
            f"of the largest, and between images by {errors[1]:.2g} of what they should; at most "
            f"{LIMITS[engine.precision]:g} is explained by the precision"
        )
    return errors[0]


@functools.lru_cache(maxsize=len(METHODS) + 1)
def expected_outputs(model: str, method: str, images: Tensor) -> Tensor:
    """The outputs of a network in torch, in float32."""
    return cast(Tensor, network(model, method, images)(images))


def deviation(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest output."""
    return float((outputs - expected).abs().max() / expected.abs().max())


def unexplained(outputs: Tensor, expected: Tensor) -> float:
    """The error of how outputs differ between images, relative to how they should differ.

    Outputs of a network with random weights are similar for all images: without their mean, a
    network that ignores its input has an error of 1.

    Args:
        outputs: of an engine, of shape ``(images, classes)``.
        expected: of torch, of the same shape.
    """
    own, other = (each - each.mean(0) for each in (outputs, expected))
    return float((own - other).norm() / other.norm())


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
# Command line
# ---------------------------------------------------------------------------------------------


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Images to calibrate with, and others to run networks on, of the folder's validation part."""
    part: Any = load_datasets("folder", root=folder, image_size=IMAGE_SIZE, crop_pct=1.0).val
    wanted = CALIBRATION_IMAGES + TEST_IMAGES
    if len(part) < wanted:
        raise SystemExit(f"--images: {folder} has {len(part)} images in val, {wanted} are needed")
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    found = torch.stack([part[int(index)][0] for index in order[:wanted]])
    return found[TEST_IMAGES:], found[:TEST_IMAGES]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="cases, such as 'resnet18/*'"
    )
    result.add_argument("--images", type=Path, metavar="FOLDER", help="with train/ and val/")
    result.add_argument("--json", type=Path, help="file to which the runs are added")
    result.add_argument(
        "--replace",
        action="store_true",
        help="remove cases of an earlier run of --json's that are not measured again",
    )
    result.add_argument(
        "--deepsparse", metavar="PYTHON", help="interpreter of an environment with deepsparse 1.8"
    )
    result.add_argument(
        "--peaks", action="store_true", help="measure the machine itself instead of networks"
    )
    result.add_argument("--seconds", type=float, default=2.0, help="duration of timing each case")
    result.add_argument("--rounds", type=int, default=4, help="number of turns for each case")
    result.add_argument(
        "--isa",
        type=int,
        default=0,
        choices=(0, 128, 256, 257, 512),
        help="instruction set of this package's kernels: portable, AVX2, AVX-VNNI or AVX-512; "
        "ONEDNN_MAX_CPU_ISA=AVX2 in the environment holds OpenVINO",
    )
    return result


def chosen_cases(
    command_line: argparse.ArgumentParser, arguments: argparse.Namespace
) -> list[Case]:
    """The cases to measure; what stands against it is an error now, rather than after minutes."""
    chosen = cases(arguments.only, with_deepsparse=bool(arguments.deepsparse))
    if not chosen:
        command_line.error(f"--only: no case matches {arguments.only}; one is {cases(['*'])[0]}")
    if arguments.images is None:
        command_line.error("--images: name a folder of photographs, with train/ and val/")
    needed = {package for case in chosen for package in ENGINES[case.engine].packages}
    missing = sorted(each for each in needed if importlib.util.find_spec(each) is None)
    if missing:
        command_line.error(
            f"not installed: {', '.join(missing)}: pip install -e '.[runtimes]', or choose other "
            "engines by --only"
        )
    lost = left_out(read(arguments.json), chosen)
    if lost and not arguments.replace:
        command_line.error(
            f"--json: {arguments.json} has {len(lost)} cases of the same networks, batch sizes and "
            f"threads that --only leaves out, such as {lost[0]}. Times compare within a run only: "
            "measure them too, name another file, or give --replace to remove them"
        )
    return chosen


def record_peaks(path: Path | None) -> None:
    """Measure the machine, print what was found and write it."""
    found = [{**peaks(threads), "cpu": cpu()} for threads in THREADS]
    if path is not None:
        write_text(path, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def main() -> None:
    """Time the chosen cases and print the table of all runs."""
    command_line = parser()
    arguments = command_line.parse_args()
    if arguments.peaks:
        return record_peaks(arguments.json)
    chosen = chosen_cases(command_line, arguments)
    DeepSparse.python = arguments.deepsparse or ""
    calibration, images = photographs(arguments.images)
    runs = read(arguments.json)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = DenseFiles(Path(folder), calibration)
        for place, group in itertools.groupby(chosen, lambda case: case.place):
            timing = (arguments.seconds, arguments.rounds, arguments.isa)
            rows = list(measure(list(group), images, files, *timing))
            runs[place] = run_of(place, rows, arguments.isa)
            if arguments.json is not None:
                write(arguments.json, runs.values())
    print(printed(runs.values()))
    return None


if __name__ == "__main__":
    main()
