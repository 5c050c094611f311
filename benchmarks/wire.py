"""What two machines send each other in a training step of ResNet-50, and how long it takes.

    python benchmarks/wire.py [--steps 10] [--only dense 60 70 80] [--rate 1000] [--json FILE]
    python benchmarks/wire.py --arithmetic

The machines are two network namespaces, of a process of one thread each, joined by a link that
`tc tbf` limits (needs root and iproute2). With batch 2 at 64 px the link and not the arithmetic is
what they wait for. Measured are a dense step and, in the fixed phase, steps without
`masked_allreduce_hook` and with it; bytes are counted where the hook calls the collective (without
it: all gradients) and at the network interface. `--arithmetic` measures nothing: it works out at
which step times, links and numbers of machines the hook pays.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from records import keep_rows, versions
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from starfire_prune import MaskedAllreduceState, Pruner, masked_allreduce_hook

BATCH, SIDE = 2, 64
WARM_UP = 3  # steps before those that count: connections, rebuilt buckets, the first index
CASES = ("dense", "60", "70", "80")
LINK = "link0"

MACHINES = (8, 64, 256, 1024)
GIGABITS = (1, 10, 25, 100, 400)
STEPS_S = (0.1, 0.3, 1.0)
HOP_S = 20e-6  # from machine to machine, for each message of a ring
BUCKETS = 5  # of ResNet-50 in DDP's 25 MiB
ADDED_S = 1e-3  # gathering and scattering on a GPU: three times what 0.3 GB of traffic take

Row = dict[str, Any]


def main() -> None:
    """Measure, print the table and keep the record; or print the arithmetic."""
    arguments = parsed()
    if arguments.rank is not None:
        run_rank(arguments)
    elif arguments.arithmetic:
        print_arithmetic()
    else:
        rows = measured(arguments)
        if arguments.json:
            rows = keep_rows(arguments.json, head_of(arguments), rows)
        print_rows(rows, arguments.rate)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="that count, of each case")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="some cases")
    parser.add_argument("--rate", type=int, default=1000, help="of the link, in Mbit/s")
    parser.add_argument("--json", type=Path, help="the record: rows are added to those it has")
    parser.add_argument("--arithmetic", action="store_true", help="no measurement: the pages")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def head_of(arguments: argparse.Namespace) -> Row:
    """What holds for all rows of a record."""
    settings = {"model": "resnet50", "batch": BATCH, "side": SIDE, "threads": 1, "ranks": 2}
    return {
        "versions": versions("torch", "timm", "starfire-prune"),
        "settings": {**settings, "link_mbit_per_s": arguments.rate, "dtype": "float32"},
    }


# Two machines


def measured(arguments: argparse.Namespace) -> dict[str, Row]:
    """The rows of rank 0, with what rank 1 has sent beside them."""
    with machines(arguments.rate) as names, tempfile.TemporaryDirectory() as folder:
        options = ["--steps", str(arguments.steps), "--only", *arguments.only, "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
        program = (sys.executable, __file__)
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *program, "--rank", str(rank), *options],
                env=environment,
            )
            for rank, name in enumerate(names)
        ]
        statuses = [process.wait() for process in ranks]
        if any(statuses):
            raise SystemExit("a rank has failed: its error is above")
        rows: dict[str, Row] = json.loads(Path(folder, "rank0.json").read_text())
        return rows


@contextlib.contextmanager
def machines(rate: int) -> Iterator[list[str]]:
    """Two network namespaces, joined by a link of so many Mbit/s each way."""
    names = [f"wire-{os.getpid()}-{number}" for number in range(2)]
    made: list[str] = []
    try:
        for name in names:
            call("ip", "netns", "add", name)
            made.append(name)
        peer = ("peer", "name", LINK, "netns", names[1])
        call("ip", "link", "add", LINK, "netns", names[0], "type", "veth", *peer)
        for number, name in enumerate(names):
            join_link(name, f"10.0.0.{number + 1}/24", rate)
        yield names
    finally:
        for name in made:
            for process in call("ip", "netns", "pids", name).split():
                os.kill(int(process), signal.SIGTERM)
            call("ip", "netns", "delete", name)


def join_link(name: str, address: str, rate: int) -> None:
    """Give a machine its end of the link."""
    call("ip", "-netns", name, "address", "add", address, "dev", LINK)
    for device in (LINK, "lo"):
        call("ip", "-netns", name, "link", "set", device, "up")
    limit = ("tbf", "rate", f"{rate}mbit", "burst", "256kb", "latency", "50ms")
    call("tc", "-netns", name, "qdisc", "add", "dev", LINK, "root", *limit)


def call(*command: str) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"needs {command[0]}: install iproute2") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}; it needs root")
    return done.stdout


# A rank


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure all cases on this machine, and leave their rows in the folder."""
    torch.set_num_threads(1)
    store = f"file://{arguments.folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=arguments.rank, world_size=2)
    rows: dict[str, Row] = {}
    for case in arguments.only:
        rows[case] = measured_case(case, arguments, with_hook=False)
        if case != "dense":
            rows[f"{case}, hook"] = measured_case(case, arguments, with_hook=True)
    Path(arguments.folder, f"rank{arguments.rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def measured_case(case: str, arguments: argparse.Namespace, *, with_hook: bool) -> Row:
    """Seconds and bytes of the steps of one case, as this rank has seen them."""
    gc.collect()  # what an earlier case has left hooked
    ddp, pruner, step = wrapped(case)
    if with_hook:
        ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
    for _ in range(WARM_UP):
        step()
    distributed.barrier()
    sent_before = interface_bytes()
    with counted() as collective:
        seconds = [timed(step) for _ in range(arguments.steps)]
    distributed.barrier()
    sent = interface_bytes() - sent_before
    whole = sum(weight.nbytes for weight in ddp.parameters())  # DDP's own calls are C++
    with ddp.no_sync():
        alone = statistics.median(timed(step) for _ in range(3))
    return {
        "step_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "fastest_s": min(seconds),
        "without_sending_s": alone,
        "collective_bytes": sum(collective) / len(seconds) if with_hook else whole,
        "interface_bytes": sent / len(seconds),
        "sparsity": 0.0 if case == "dense" else pruner.sparsity().network,
        "steps": len(seconds),
    }


def wrapped(case: str) -> tuple[DistributedDataParallel, Pruner, Any]:
    """ResNet-50 under DDP, dense or past its era, and what takes a step of it."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    amount = 0.5 if case == "dense" else int(case) / 100
    settings = {"method": "ck", "amount": amount, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=1000, optimizer=optimizer)
    if case != "dense":
        pruner.end_epoch(0)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(distributed.get_rank())
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(1000, (BATCH,))

    def step() -> None:
        loss: Any = nn.functional.cross_entropy(ddp(images), labels)
        loss.backward()
        optimizer.step()
        if pruner.phase == "fixed":
            pruner.step()
        optimizer.zero_grad()

    return ddp, pruner, step


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of what is all-reduced from Python."""
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counting(values: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(values.nbytes)
        return all_reduce(values, *arguments, **options)

    distributed.all_reduce = counting  # type: ignore[assignment]
    try:
        yield sent
    finally:
        distributed.all_reduce = all_reduce


def interface_bytes() -> int:
    """What this machine has sent over the link until now."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith(f"{LINK}:")]
    return int(line.split(":")[1].split()[8])


def timed(step: Any) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


# Tables


def print_rows(rows: dict[str, Row], rate: int) -> None:
    """The measured steps, each sparsity's without the hook and with it."""
    print(
        f"ResNet-50, batch {BATCH} at {SIDE} px, 2 machines, {rate} Mbit/s, {versions('torch')}\n"
    )
    print(
        "| step | sent [MB] | of dense | interface [MB] | of dense | step [s] | least [s] | gain |"
    )
    print("|---|---|---|---|---|---|---|---|")
    dense = rows.get("dense")
    for name, row in rows.items():
        shares = [
            f"{row[key] / dense[key]:.3f}" if dense else ""
            for key in ("collective_bytes", "interface_bytes")
        ]
        plain = rows.get(name.removesuffix(", hook"), row)
        print(
            f"| {name} | {row['collective_bytes'] / 1e6:.1f} | {shares[0]} | "
            f"{row['interface_bytes'] / 1e6:.1f} | {shares[1]} | {row['step_s']:.3f} | "
            f"{row['fastest_s']:.3f} | "
            f"{plain['step_s'] / row['step_s']:.2f}x |"
        )
    alone = statistics.median(row["without_sending_s"] for row in rows.values())
    print(f"\nthe same step with nothing sent: {alone:.3f} s")


def all_reduce_seconds(sent_bytes: float, machines: int, gigabits: float) -> float:
    """Of a ring: each machine sends 2 (n - 1) / n of the bytes, in 2 (n - 1) messages a bucket.

    Args:
        sent_bytes: of the gradients, from 0.
        machines: n, from 1, each with one such link.
        gigabits: a second and direction.
    """
    if machines == 1:
        return 0.0
    on_the_wire = 2 * (machines - 1) / machines * sent_bytes * 8 / (gigabits * 1e9)
    return on_the_wire + BUCKETS * 2 * (machines - 1) * HOP_S


def step_seconds(
    alone_s: float, sent_bytes: float, machines: int, gigabits: float, added_s: float = 0.0
) -> float:
    """Of a training step whose all-reduce runs behind its backward pass, two thirds of it.

    Args:
        alone_s: the step with nothing sent.
        sent_bytes, machines, gigabits: as in `all_reduce_seconds`.
        added_s: for gathering and scattering.
    """
    backward_s = alone_s * 2 / 3
    return (
        alone_s
        - backward_s
        + added_s
        + max(backward_s, all_reduce_seconds(sent_bytes, machines, gigabits))
    )


def speedup(alone_s: float, machines: int, gigabits: float, kept: float, size: float) -> float:
    """How many times faster a step is with the hook.

    Args:
        alone_s: the step with nothing sent.
        machines, gigabits: as in `all_reduce_seconds`.
        kept: share of the gradients that is sent, in (0, 1].
        size: of all gradients, in bytes.
    """
    plain = step_seconds(alone_s, size, machines, gigabits)
    return plain / step_seconds(alone_s, kept * size, machines, gigabits, ADDED_S)


def fastest_link_that_pays(
    alone_s: float, machines: int, kept: float, size: float, least: float = 1.1
) -> float:
    """Gbit/s up to which a step gets `least` times faster; 0 if it does on none.

    The gain doesn't rise with the link, so that halving an interval finds it.
    """
    low, high = 1e-3, 1e4
    if speedup(alone_s, machines, low, kept, size) < least:
        return 0.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        pays = speedup(alone_s, machines, middle, kept, size) >= least
        low, high = (middle, high) if pays else (low, middle)
    return low


def print_arithmetic() -> None:
    """The pages of arithmetic for ResNet-50 at 70 %."""
    size = 4.0 * sum(weight.numel() for weight in timm.create_model("resnet50").parameters())
    kept = 0.302  # as measured: 30 % of convolutions and FC, and all biases and batch norms
    print(f"ResNet-50, float32, {size / 1e6:.1f} MB of gradients, at 70 % {kept:.1%} of them\n")
    links = " | ".join(f"{gigabits} Gbit/s" for gigabits in GIGABITS)
    print(f"| step alone | machines | {links} | 1.1x up to |")
    print(f"|---|---|{'---|' * len(GIGABITS)}---|")
    for alone_s in STEPS_S:
        for number in MACHINES:
            gains = " | ".join(
                f"{speedup(alone_s, number, gigabits, kept, size):.2f}x" for gigabits in GIGABITS
            )
            limit = fastest_link_that_pays(alone_s, number, kept, size)
            print(f"| {alone_s} s | {number:,} | {gains} | {limit:.1f} Gbit/s |")


if __name__ == "__main__":
    main()
