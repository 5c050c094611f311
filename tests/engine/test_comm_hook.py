"""The masked all-reduce: trainings with and without it, and what two ranks send each other.

As a module, `python -m tests.engine.test_comm_hook FOLDER`, it is two ranks that go through all
cases and leave what they saw as JSON.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import Lamb
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    bf16_compress_wrapper,
)
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from starfire_prune import MaskedAllreduceState, Pruner, masked_allreduce_hook
from starfire_prune.engine.comm_hook import _kept_positions
from starfire_prune.utils.modules import layer_weight
from tests.support.networks import SmallNet, backward, batch, equal_states, one_epoch, snapshot
from tests.support.paths import ROOT

UPDATES_PER_EPOCH = 3
STEPS = 15  # an epoch dense, one of the era, the rest fixed

# --- what the ranks do -------------------------------------------------------------------------


class Branches(nn.Module):
    """A branch for every other image at random, so that ranks use other parameters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3)
            self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(3))
            self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.stem(images))
        branch = self.branches[int(images[0, 0, 0, 0] > 0)]  # the third is never used
        output: Tensor = self.head(functional.relu(branch(features)).mean((2, 3)))
        return output


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train, that must end with the same weights with the hook and without it."""

    model: Callable[[], nn.Module] = SmallNet
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda weights: torch.optim.SGD(
        weights, lr=0.05, momentum=0.9, weight_decay=1e-3
    )
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "ck"
    largest_norm: float | None = None
    accumulation: int = 1
    channels_last: bool = False
    is_fixed: bool = False  # before DDP wraps it


TINY_BUCKETS = {"bucket_cap_mb": 0.0005}  # rebuilt after the first backward pass

CASES = {
    "sgd": Case(),
    "adam": Case(optimizer=lambda weights: torch.optim.Adam(weights, lr=1e-3)),
    "lamb": Case(optimizer=lambda weights: Lamb(weights, lr=1e-2, weight_decay=1e-2)),
    "clipping": Case(largest_norm=0.1),
    "channels_last": Case(channels_last=True, method="window"),
    "accumulation": Case(accumulation=2),
    "unused parameters": Case(model=Branches, ddp={"find_unused_parameters": True}),
    "static_graph": Case(ddp={"static_graph": True}),
    "rebuilt buckets": Case(ddp=TINY_BUCKETS),
    "rebuilt buckets, fixed already": Case(ddp=TINY_BUCKETS, is_fixed=True, channels_last=True),
    "bucket views": Case(ddp={"gradient_as_bucket_view": True, **TINY_BUCKETS}),
}


def wrapped(case: Case) -> tuple[DistributedDataParallel, torch.optim.Optimizer, Pruner]:
    model = case.model()
    if case.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = case.optimizer(model.parameters())
    settings = {"method": case.method, "amount": 0.7, "era": [0, 1] if case.is_fixed else [1, 2]}
    pruner = Pruner(model, settings, updates_per_epoch=UPDATES_PER_EPOCH, optimizer=optimizer)
    if case.is_fixed:
        pruner.end_epoch(0)
    return DistributedDataParallel(model, **case.ddp), optimizer, pruner


def trained(case: Case, rank: int, *, with_hook: bool) -> tuple[dict[str, Tensor], int]:
    """The weights after all steps, and how many gradients the last one sent through the hook."""
    ddp, optimizer, pruner = wrapped(case)
    if with_hook:
        ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
    for step in range(STEPS):
        with counted() as sent:
            train_step(case, ddp, optimizer, 1000 * rank + 10 * step)
        pruner.step()
        if step % UPDATES_PER_EPOCH == UPDATES_PER_EPOCH - 1:
            pruner.end_epoch(pruner.epoch)
    pruner.check()
    return snapshot(ddp.module), sum(sent)


def train_step(case: Case, ddp: Any, optimizer: torch.optim.Optimizer, index: int) -> None:
    for part in range(case.accumulation):
        with ddp.no_sync() if part < case.accumulation - 1 else nullcontext():
            images, labels = batch(index + part)
            if case.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            functional.cross_entropy(ddp(images), labels).backward()  # type: ignore[no-untyped-call]
    if case.largest_norm is not None:
        nn.utils.clip_grad_norm_(ddp.parameters(), case.largest_norm)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of what is all-reduced from Python, in elements."""
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counting(values: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(values.numel())
        return all_reduce(values, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", counting)
        yield sent


def compared(case: Case, rank: int) -> dict[str, Any]:
    plain, _ = trained(case, rank, with_hook=False)
    hooked, sent = trained(case, rank, with_hook=True)
    weights = sum(weight.numel() for weight in case.model().parameters())
    return {"equal": equal_states(plain, hooked), "sent": sent / weights}


def bf16_compared(rank: int) -> dict[str, Any]:
    """Composed with torch's compression, against that one alone, to which zeros are zeros."""
    states = []
    for composed in (False, True):
        ddp, optimizer, pruner = wrapped(Case(is_fixed=True))
        if composed:
            hook = bf16_compress_wrapper(masked_allreduce_hook)
            ddp.register_comm_hook(MaskedAllreduceState(pruner), hook)
        else:
            ddp.register_comm_hook(None, bf16_compress_hook)
        for step in range(10):
            with counted() as sent:
                train_step(Case(), ddp, optimizer, 1000 * rank + step)
            pruner.step()
        states.append(snapshot(ddp.module))
    weights = sum(weight.numel() for weight in SmallNet().parameters())
    return {"equal": equal_states(*states), "sent": sum(sent) / weights}


def nan_of_one_rank(rank: int) -> dict[str, Any]:
    """A gradient that overflows at a pruned weight, on rank 0 alone, in the first fixed step."""
    model = SmallNet()
    overflows = [rank == 0]

    def overflowing(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(~mask, torch.inf) if overflows[0] else gradient

    model.body.weight.register_hook(overflowing)  # type: ignore[no-untyped-call]
    pruner = one_epoch(model, 1, method="ck")
    pruner.end_epoch(0)
    mask = pruner.masks()["body.weight"]
    ddp = DistributedDataParallel(model)
    state = MaskedAllreduceState(pruner)
    ddp.register_comm_hook(state, masked_allreduce_hook)
    checked = []
    for step in range(2):
        ddp.zero_grad()
        backward(ddp, step)
        checked.append(all(index.is_checked for index in state._indices.values()))
        overflows[0] = False
    gradient: Any = model.body.weight.grad
    first = [bool(gradient[~mask].any()), bool(gradient.isfinite().all())]
    return {"checked": checked, "not zero": first[0], "finite": first[1]}


def refusal_of_a_gradient() -> str:
    """Of a gradient that is not zero where a weight is pruned."""
    ddp, optimizer, pruner = wrapped(Case(is_fixed=True))
    ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
    mask = pruner.masks()["point.weight"]
    weight: Any = ddp.module.point.weight

    def writes(weight: Any) -> None:
        weight.grad.add_(~mask)

    weight.register_post_accumulate_grad_hook(writes)
    try:
        train_step(Case(), ddp, optimizer, 0)
    except RuntimeError as error:
        return str(error)
    return "the call went through"


class Wide(nn.Sequential):
    """Half a million weights, so that the network's own headers weigh nothing."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 256, 3), nn.BatchNorm2d(256), nn.ReLU())
        self.append(nn.Conv2d(256, 128, 3)).append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
        self.append(nn.Linear(128, 1000))


def bytes_of_steps() -> dict[str, list[int]]:
    """What three steps send, in bytes: at the collective and over the interface."""
    case = Case(model=Wide)
    ddp, optimizer, pruner = wrapped(case)
    ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
    seen = {}
    for phase in ("dense", "fixed"):
        train_step(case, ddp, optimizer, 0)  # connects, and rebuilds buckets
        distributed.barrier()
        before = loopback_bytes()
        with counted() as sent:
            for step in range(3):
                train_step(case, ddp, optimizer, step)
        distributed.barrier()
        seen[phase] = [4 * sum(sent), loopback_bytes() - before]
        while pruner.phase != "fixed":
            pruner.end_epoch(pruner.epoch)
    return seen


def loopback_bytes() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if " lo:" in line]
    return int(line.split(":")[1].split()[8])  # sent


def run_rank(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    seen: dict[str, Any] = {name: compared(case, rank) for name, case in CASES.items()}
    seen["bf16"] = bf16_compared(rank)
    seen["nan"] = nan_of_one_rank(rank)
    seen["bytes"] = bytes_of_steps()
    seen["refusal"] = refusal_of_a_gradient()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


# --- two ranks ---------------------------------------------------------------------------------


def private_network() -> tuple[str, ...]:
    """The command before one that shall have a loopback interface of its own, or nothing."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return ()
    before = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    tried = subprocess.run([*before, "true"], capture_output=True)
    return () if tried.returncode else before


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has seen."""
    folder = tmp_path_factory.mktemp("ranks")
    before = private_network()
    command = [*before, sys.executable, "-m", "tests.engine.test_comm_hook", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [{**own, "private": bool(before)} for own in seen]


@pytest.mark.parametrize("name", CASES)
def test_training_ends_with_the_weights_of_training_without_the_hook(name, ranks):
    for seen in ranks:
        assert seen[name]["equal"]
        assert seen[name]["sent"] < 0.5  # of SmallNet, whose biases and batch norms weigh more


def test_it_composes_with_bf16_compression(ranks):
    for seen in ranks:
        assert seen["bf16"]["equal"]
        assert seen["bf16"]["sent"] < 0.5


def test_a_gradient_that_would_be_dropped_is_refused_by_its_name(ranks):
    mask_zeros = one_epoch_zeros("point.weight")
    for seen in ranks:
        assert seen["refusal"] == (
            f"point.weight has {mask_zeros} gradients of pruned weights that are not zero, which "
            f"the masked all-reduce would drop: zero the gradients after each update, and let "
            f"nothing but the backward pass write to them"
        )


def one_epoch_zeros(name: str) -> int:
    pruner = one_epoch(SmallNet(), 1, method="ck", amount=0.7)
    pruner.end_epoch(0)
    return int((~pruner.masks()[name]).sum())


def test_an_overflow_at_a_pruned_weight_of_one_rank_is_zero_on_all(ranks):
    for rank, seen in enumerate(ranks):
        assert seen["nan"] == {"checked": [rank == 1, True], "not zero": False, "finite": True}


def test_the_collective_sends_less_than_a_third_at_70_percent(ranks):
    for seen in ranks:
        dense, fixed = (seen["bytes"][phase][0] for phase in ("dense", "fixed"))
        assert dense == 3 * 4 * sum(weight.numel() for weight in Wide().parameters())
        assert fixed <= 0.32 * dense


def test_the_interface_sends_less_than_a_third_at_70_percent(ranks):
    for seen in ranks:
        if not seen["private"]:
            pytest.skip("needs unshare and ip, and the right to make a network namespace")
        dense, fixed = (seen["bytes"][phase][1] for phase in ("dense", "fixed"))
        assert dense >= 2 * seen["bytes"]["dense"][0]  # of two ranks, with headers
        assert fixed <= 0.32 * dense


# --- one rank ----------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def hooked(**options: Any) -> tuple[DistributedDataParallel, Pruner, MaskedAllreduceState]:
    ddp, _, pruner = wrapped(Case(ddp=options, is_fixed=True))
    state = MaskedAllreduceState(pruner)
    ddp.register_comm_hook(state, masked_allreduce_hook)
    return ddp, pruner, state


@pytest.mark.usefixtures("one_rank")
def test_an_index_is_built_once_a_bucket():
    ddp, _, state = hooked()
    seen = []
    for step in range(4):
        backward(ddp, step)
        ddp.zero_grad()
        seen.append({key: index.kept for key, index in state._indices.items()})
    after_the_rebuild, *others = seen[1:]
    for later in others:
        assert later.keys() == after_the_rebuild.keys()
        assert all(later[key] is kept for key, kept in after_the_rebuild.items())


@pytest.mark.usefixtures("one_rank")
def test_rebuilt_buckets_leave_no_index_of_earlier_ones_behind():
    ddp, pruner, state = hooked(**TINY_BUCKETS)
    sizes = []
    for step in range(3):
        backward(ddp, step)
        ddp.zero_grad()
        sizes.append(len(state._indices))
        known = [id(weight) for index in state._indices.values() for weight in index.parameters]
        assert sorted(known) == sorted(map(id, ddp.parameters()))
    kept = sum(int(mask.sum()) for mask in pruner.masks().values())
    others = sum(weight.numel() for weight in ddp.parameters())
    others -= sum(mask.numel() for mask in pruner.masks().values())
    assert 4 * kept <= state.index_bytes <= 4 * (kept + others)
    assert sizes[-1] > 1


@pytest.mark.usefixtures("one_rank")
def test_masks_that_are_loaded_make_another_index():
    ddp, pruner, state = hooked()
    backward(ddp, 0)
    ddp.zero_grad()
    before = state.index_bytes
    saved = pruner.state_dict()
    saved["masks"]["body.weight"][0] = False
    pruner.load_state_dict(saved)
    backward(ddp, 1)
    gone = SmallNet().body.weight[0].numel() - int((~pruner.masks()["body.weight"][0]).sum())
    assert gone == 0
    assert state.index_bytes < before


@pytest.mark.usefixtures("one_rank")
def test_the_dense_phase_and_the_era_send_all_and_keep_no_index():
    ddp, _, pruner = wrapped(Case())
    state = MaskedAllreduceState(pruner)
    ddp.register_comm_hook(state, masked_allreduce_hook)
    weights = sum(weight.numel() for weight in ddp.parameters())
    for phase in ("dense", "era"):
        assert pruner.phase == phase
        with counted() as sent:
            backward(ddp, 0)
        assert (sum(sent), state.index_bytes) == (weights, 0)
        pruner.end_epoch(pruner.epoch) if phase == "dense" else None
        pruner.step()


@pytest.mark.usefixtures("one_rank")
def test_a_bucket_without_pruned_weights_is_sent_whole():
    ddp, pruner, state = hooked(**TINY_BUCKETS)
    for step in range(2):
        backward(ddp, step)
    whole = [index for index in state._indices.values() if index.kept is None]
    pruned = {id(layer_weight(layer.module)) for layer in pruner.layers.values()}
    assert whole
    assert not pruned.intersection(id(weight) for index in whole for weight in index.parameters)


def kept_by_loops(parameter: Tensor, mask: Tensor) -> list[int]:
    """Positions in memory of kept weights, from the strides, one by one."""
    positions = []
    for place in mask.nonzero().tolist():
        positions.append(sum(i * s for i, s in zip(place, parameter.stride(), strict=True)))
    return sorted(positions)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 1, 3, 3), (4, 7, 1, 1)])
def test_positions_are_those_of_the_parameters_memory(shape, memory_format, mask_format):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(shape, generator=generator).to(memory_format=memory_format)
    mask = (torch.rand(shape, generator=generator) < 0.5).to(memory_format=mask_format)
    kept = _kept_positions([torch.ones(3), parameter], [None, mask])
    assert kept is not None
    assert kept.dtype == torch.int32
    expected = [0, 1, 2, *(3 + position for position in kept_by_loops(parameter, mask))]
    assert kept.tolist() == expected


def test_positions_in_a_parameter_with_gaps_go_row_by_row():
    parameter = torch.zeros(4, 6)[:, ::2]
    mask = torch.tensor([[True, False, True]] * 4)
    kept = _kept_positions([parameter], [mask])
    assert kept is not None
    assert kept.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]


def test_nothing_pruned_has_no_positions():
    assert _kept_positions([torch.ones(3)], [None]) is None


if __name__ == "__main__":
    # Forks, which load nothing again
    start_processes(run_rank, (sys.argv[1],), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
