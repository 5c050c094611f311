"""What pruning adds to a training step of ResNet-50, in seconds and in memory, beside other ways.

    python benchmarks/overhead.py [--steps 20] [--only dense era fixed ...] [--json FILE]
    python benchmarks/overhead.py --device cuda --batch 256 --side 224 --bf16 --channels-last

Each case is a process of its own. On a CPU the operations that a case adds are timed where they
run, within the steps, by the CPU time of their thread: whole steps on a machine with other work
swing by more than what is measured. The peak of memory is a second process's, over what it held
before it made the model. By hand: `weight.mul_(mask)` after each update, and nothing else. Native:
`torch.nn.utils.prune.l1_unstructured` called again at each step. The mean of the era's `step()` is
over 1,000 updates of an era of 10,000.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from memory import peak_bytes, reset_peak, resident_bytes
from overhead_cases import AMOUNT, CASES, Training
from records import keep_rows, versions
from torch import Tensor, nn

from starfire_prune import MaskedAllreduceState, Pruner
from starfire_prune.utils.modules import layer_weight

AMORTISED_OVER = 1_000
WARM_UP = 3
WORK = ("added_ms", "hook_ms", "step_ms", "cpu_ms")

Row = dict[str, Any]


def main() -> None:
    """Measure the cases, print the table and keep the record."""
    arguments = parsed()
    if arguments.case:
        print(json.dumps(run_case(arguments)))
        return
    setting = setting_of(arguments)
    rows = {f"{setting}: {case}": measured(case, arguments) for case in arguments.only}
    if arguments.json:
        rows = keep_rows(arguments.json, head_of(arguments), rows)
    parts = {tuple(name.split(": ")): row for name, row in rows.items()}
    print_rows({case: row for (place, case), row in parts.items() if place == setting}, setting)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="that count, of each case")
    parser.add_argument("--only", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=160, help="of the images, in pixels")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="the record: rows are added to those it has")
    parser.add_argument("--part", choices=("times", "memory"), help="default: both")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def head_of(arguments: argparse.Namespace) -> Row:
    """What holds for all rows of a record."""
    return {
        "versions": versions("torch", "timm", "starfire-prune", "coremltools"),
        "settings": {"model": "resnet50", "sparsity": AMOUNT, "optimizer": "sgd, momentum"},
    }


def setting_of(arguments: argparse.Namespace) -> str:
    """Where and on what the steps run, such as `cpu, 16 x 160 px, 2 threads`."""
    device = arguments.device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    flags = [name for name in ("bf16", "channels_last", "compile") if getattr(arguments, name)]
    threads = [f"{torch.get_num_threads()} threads"] if device == "cpu" else []
    size = f"{arguments.batch} x {arguments.side} px"
    return ", ".join([device, size, *threads, *flags])


def measured(case: str, arguments: argparse.Namespace) -> Row:
    """A case's times, and its memory, each of a new process."""
    own = [f"--{key}={getattr(arguments, key)}" for key in ("steps", "device", "batch", "side")]
    flags = ("bf16", "channels_last", "compile")
    own += [f"--{flag.replace('_', '-')}" for flag in flags if getattr(arguments, flag)]
    command = [sys.executable, __file__, f"--case={case}", *own]
    # Large blocks go back at once, so that the peak is that of tensors
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    row: Row = {}
    if arguments.part != "memory":
        row |= run([*command, "--part=times"])
    if arguments.part != "times":
        row |= run([*command, "--part=memory"], exact)
    return row


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> Row:
    """The row that a process prints last."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a case has failed: {' '.join(command[1:])}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


# A case, in a process of its own


def run_case(arguments: argparse.Namespace) -> Row:
    """Times or the peak of one case."""
    prune_small_network()
    before = resident_bytes(arguments.device)
    training = Training(arguments)
    CASES[arguments.case](training)
    if arguments.part == "memory":
        return memory_of(training, before)
    for _ in range(WARM_UP):
        training.step()
    rows = [one_step(training) for _ in range(arguments.steps)]
    row: Row = {key: statistics.median(step[key] for step in rows) for key in WORK}
    if arguments.case == "era":
        row["amortised_ms"] = amortised_ms(training)
    if arguments.device != "cpu" or arguments.compile:
        del (
            row["added_ms"],
            row["hook_ms"],
            row["cpu_ms"],
        )  # of kernels that run elsewhere, or fused
    return {**row, "steps": len(rows)}


def prune_small_network() -> None:
    """Load what pruning loads, so that it is there before memory is looked at."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    Pruner(model, {"method": "ck", "amount": AMOUNT, "era": [0, 1]}, updates_per_epoch=1).step()


def one_step(training: Training) -> Row:
    """Milliseconds of a step: on the clock, of the CPU, and of what is added."""
    training.added = training.of_hook = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    training.step()
    if training.arguments.device == "cuda":
        torch.cuda.synchronize()
    clocks = time.perf_counter() - start, time.process_time() - cpu
    seconds = (training.added, training.of_hook, *clocks)
    return {key: 1e3 * value for key, value in zip(WORK, seconds, strict=True)}


@torch.no_grad()
def amortised_ms(training: Training) -> float:
    """Mean CPU time of the era's `step()` as weights move."""
    weights = [layer_weight(layer) for layer in training.layers()]
    total = 0.0
    for update in range(AMORTISED_OVER):
        if update % 100 == 0:
            for weight in weights:
                weight.add_(torch.randn_like(weight), alpha=1e-3)
        start = time.process_time()
        training.after_update()
        total += time.process_time() - start
    return 1e3 * total / AMORTISED_OVER


# Memory


def memory_of(training: Training, before: int) -> Row:
    """The peak of three steps over what was held before, and what of the optimizer's is pruned."""
    for _ in range(2):
        training.step()
    reset_peak(training.arguments.device)
    for _ in range(3):
        training.step()
    return {
        "peak_bytes": peak_bytes(training.arguments.device) - before,
        **optimizer_bytes(training),
        **index_bytes(training),
    }


def optimizer_bytes(training: Training) -> Row:
    """Of the optimizer's state, and of its zeros."""
    states = [
        value
        for state in training.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]
    zeros = sum(int((value == 0).sum()) * value.element_size() for value in states)
    return {
        "optimizer_bytes": sum(value.nbytes for value in states),
        "optimizer_zero_bytes": zeros,
    }


def index_bytes(training: Training) -> Row:
    """Of the hook's indices."""
    hooks = getattr(training.forward, "_comm_hooks", [])
    states = [state for _, state in hooks if isinstance(state, MaskedAllreduceState)]
    return {"index_bytes": states[0].index_bytes} if states else {}


# The table


def print_rows(rows: dict[str, Row], setting: str) -> None:
    """A line a case, its added time and its memory beside the dense step's."""
    print(f"ResNet-50, {setting}, {versions('torch', 'coremltools')}\n")
    print("| case | step [ms] | CPU [ms] | added [ms] | of dense | peak [MB] | of dense |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(row_text(name, row, rows.get("dense, DDP" if "DDP" in name else "dense", {})))
    print("\npeaks are without the hook's indices, and over what a process holds without a model")
    for name, row in rows.items():
        if "amortised_ms" in row:
            print(f"{name}: step() takes {row['amortised_ms']:.2f} ms in the mean, masks included")
        if "index_bytes" in row:
            print(f"{name}: indices of {row['index_bytes'] / 1e6:.1f} MB")
        if name == "fixed" and "optimizer_bytes" in row:
            sizes = [row[key] / 1e6 for key in ("optimizer_bytes", "optimizer_zero_bytes")]
            print(f"{name}: optimizer state {sizes[0]:.1f} MB, of which {sizes[1]:.1f} MB zeros")


def row_text(name: str, row: Row, base: Row) -> str:
    """A line of the table, beside the dense step's."""
    step, cpu, added = (row.get(key) for key in ("step_ms", "cpu_ms", "added_ms"))
    peak, dense_cpu, dense_peak = row.get("peak_bytes"), base.get("cpu_ms"), base.get("peak_bytes")
    if peak is not None:
        peak -= row.get("index_bytes", 0)
    cells = [
        name,
        "" if step is None else f"{step:.0f}",
        "" if cpu is None else f"{cpu:.0f}",
        "" if added is None else f"{added:.1f}",
        "" if added is None or not dense_cpu else f"{added / dense_cpu:.2%}",
        "" if peak is None else f"{peak / 1e6:.0f}",
        "" if peak is None or not dense_peak else f"{peak / dense_peak:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
