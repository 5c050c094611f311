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
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from memory import peak_bytes, reset_peak, resident_bytes
from records import keep_rows, versions
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from starfire_prune import (
    MaskedAllreduceState,
    Pruner,
    comm_hook,
    gradients,
    masked_allreduce_hook,
)
from starfire_prune.layers import layer_weight, prunable_layers
from starfire_prune.mask_method import find_hook

AMOUNT = 0.7
ERA_UPDATES = 10_000
AMORTISED_OVER = 1_000
WARM_UP = 3
WORK = ("added_ms", "step_ms", "cpu_ms")

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


class Training:
    """ResNet-50, and what takes a step of it.

    Args:
        arguments: of the command line.

    Attributes:
        after_update: what a case does after `optimizer.step()`.
        forward: the model as it is called: compiled, or wrapped by DDP.
        added: seconds of CPU time that a step's added operations took, of the present step.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.arguments = arguments
        self.model: nn.Module = timm.create_model("resnet50").train().to(arguments.device)
        size = (arguments.batch, 3, arguments.side, arguments.side)
        self.images = torch.randn(size, device=arguments.device)
        self.labels = torch.randint(1000, size[:1], device=arguments.device)
        if arguments.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.forward: Any = torch.compile(self.model) if arguments.compile else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.after_update: Callable[[], object] = lambda: None
        self.added = 0.0

    def step(self) -> None:
        """A forward and backward pass, an update, and what the case does after it."""
        bf16 = self.arguments.bf16
        with torch.autocast(self.arguments.device, torch.bfloat16, enabled=bf16):
            loss: Any = nn.functional.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.timed(self.after_update)()
        self.optimizer.zero_grad()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose CPU time counts as added."""

        def timing(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments, **options)
            self.added += time.thread_time() - start
            return result

        return timing

    def layers(self) -> list[nn.Module]:
        """All convolutions and linear layers."""
        return list(prunable_layers(self.model).values())

    def pruner(self) -> Pruner:
        """In its dense phase, at the first update of a long era."""
        settings = {"method": "ck", "amount": AMOUNT, "era": [0, 1]}
        return Pruner(self.model, settings, updates_per_epoch=ERA_UPDATES, optimizer=self.optimizer)


def dense(training: Training) -> None:
    """Nothing is added."""


def era(training: Training) -> None:
    """Masks by forward hooks, and `step()` after each update."""
    pruner = training.pruner()
    pruner.step()
    training.after_update = pruner.step
    if not training.arguments.compile and training.arguments.device == "cpu":
        for layer in pruner.layers.values():
            time_masked_forward(training, layer.module)


def time_masked_forward(training: Training, module: nn.Module) -> None:
    """Time what masks a layer's weight, and the node of the graph that masks its gradient."""
    hook: Any = find_hook(module, "weight")[1]
    timed_mask = training.timed(hook.apply_mask)
    start = 0.0

    def begin(*_: Any) -> None:
        nonlocal start
        start = time.thread_time()

    def end(*_: Any) -> None:
        training.added += time.thread_time() - start

    def apply_mask(masked: nn.Module) -> Any:
        weight = timed_mask(masked)
        weight.grad_fn.register_prehook(begin)
        weight.grad_fn.register_hook(end)
        return weight

    hook.apply_mask = apply_mask


def fixed(training: Training) -> Pruner:
    """Gradients are masked where they arise, and weights by `step()`."""
    pruner = training.pruner()
    pruner.end_epoch(0)
    training.after_update = pruner.step
    # The timed hooks hold references of their own, which are no reason to mask out of place
    gradients._counts_alone = functools.cache(
        functools.partial(gradients.counts_in_hook, training.timed)
    )
    for layer in pruner.layers.values():
        hooks: Any = layer_weight(layer.module)._backward_hooks
        for key, hook in hooks.items():
            hooks[key] = training.timed(hook)
    return pruner


def fixed_and_hook(training: Training) -> None:
    """The same under DDP with `masked_allreduce_hook`, of a single rank that sends nothing."""
    pruner = fixed(training)
    under_ddp(training)
    state = MaskedAllreduceState(pruner)
    training.forward.register_comm_hook(state, masked_allreduce_hook)
    for name in ("_gather", "_scatter"):
        setattr(comm_hook, name, training.timed(getattr(comm_hook, name)))


def under_ddp(training: Training) -> None:
    """Dense under DDP of a single rank, whose buckets take memory too."""
    backend = "nccl" if training.arguments.device == "cuda" else "gloo"
    store = tempfile.mkdtemp()
    distributed.init_process_group(
        backend, init_method=f"file://{store}/store", rank=0, world_size=1
    )
    training.forward = DistributedDataParallel(training.forward)


def by_hand(training: Training) -> None:
    """`weight.mul_(mask)` after each update, as one writes it."""
    training.pruner().end_epoch(0)
    weights = [layer_weight(layer) for layer in training.layers()]
    for weight in weights:
        hooks: Any = weight._backward_hooks
        hooks.clear()
    masks = [weight.detach().ne(0) for weight in weights]

    @torch.no_grad()
    def mask_weights() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    training.after_update = mask_weights


def native(training: Training) -> None:
    """`torch.nn.utils.prune` called again at each step, for a little more."""

    def apply() -> None:
        for layer in training.layers():
            prune.l1_unstructured(layer, "weight", 0.01)  # type: ignore[no-untyped-call]

    training.after_update = apply


def coremltools(training: Training) -> None:
    """Its `MagnitudePruner` by kernels, which works out all masks at each of its updates."""
    from coremltools.optimize.torch import pruning

    config: dict[str, Any] = {
        "scheduler": {"update_steps": list(range(1, 1000))},
        "granularity": "per_kernel",
        "initial_sparsity": 0.0,
        "target_sparsity": AMOUNT,
    }
    settings = pruning.MagnitudePrunerConfig.from_dict({"global_config": config})
    pruner = pruning.MagnitudePruner(training.model, settings)
    training.forward = training.model = pruner.prepare(inplace=True)
    training.after_update = pruner.step


CASES: dict[str, Callable[[Training], object]] = {
    "dense": dense,
    "era": era,
    "fixed": fixed,
    "dense, DDP": under_ddp,
    "fixed, DDP and hook": fixed_and_hook,
    "by hand": by_hand,
    "native": native,
    "coremltools": coremltools,
}


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
        del row["added_ms"], row["cpu_ms"]  # of kernels that run elsewhere, or fused
    return {**row, "steps": len(rows)}


def prune_small_network() -> None:
    """Load what pruning loads, so that it is there before memory is looked at."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    Pruner(model, {"method": "ck", "amount": AMOUNT, "era": [0, 1]}, updates_per_epoch=1).step()


def one_step(training: Training) -> Row:
    """Milliseconds of a step: on the clock, of the CPU, and of what is added."""
    training.added = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    training.step()
    if training.arguments.device == "cuda":
        torch.cuda.synchronize()
    seconds = (training.added, time.perf_counter() - start, time.process_time() - cpu)
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
