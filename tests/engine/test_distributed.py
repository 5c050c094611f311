"""The pruner under DDP, over several ranks, and with torch.compile."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from starfire_prune import Pruner
from starfire_prune.methods.base import find_hook
from tests.support.networks import (
    LAYERS,
    SmallNet,
    backward,
    batch,
    equal_states,
    hook_count,
    one_epoch,
    sgd,
    snapshot,
    train,
    train_step,
)

MASKS = {f"{name}.weight_mask" for name in LAYERS}


def join(folder: Path, rank: int, world_size: int) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    join(tmp_path, 0, 1)
    yield
    distributed.destroy_process_group()


def buffer_names(ddp: DistributedDataParallel) -> set[str]:
    """The names of what DDP broadcasts at every forward pass."""
    names = {id(buffer): name for name, buffer in ddp.module.named_buffers()}
    return {names[id(buffer)] for buffer in ddp.modules_buffers}


# DDP


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("method", ["ck", "inter"])
@pytest.mark.usefixtures("one_rank")
def test_trap_10_ddp_broadcasts_no_masks(wrapped_first, method):
    model = SmallNet()
    if wrapped_first:
        ddp = DistributedDataParallel(model)
        pruner = one_epoch(ddp, 4, method=method)
    else:
        pruner = one_epoch(model, 4, method=method)
        ddp = DistributedDataParallel(model)
    assert {f"{name}.weight_mask" for name in pruner.layers} == MASKS
    assert set(ddp.parameters_to_ignore) >= MASKS
    optimizer = sgd(ddp)
    train(ddp, optimizer, pruner, range(3))
    ddp(batch(0)[0])
    assert {name for name, _ in model.named_buffers()} >= MASKS
    assert buffer_names(ddp) == {name for name, _ in SmallNet().named_buffers()}
    train(ddp, optimizer, pruner, range(3, 6))
    assert pruner.phase == "fixed"
    pruner.check()


def test_trap_10_the_names_are_reserved_before_wrapping():
    model = SmallNet()
    one_epoch(model, 4, method="ck", exclude=["stem"])
    reserved: Any = model._ddp_params_and_buffers_to_ignore
    assert MASKS - {"stem.weight_mask"} <= set(reserved)
    assert "stem.weight_mask" not in reserved


def test_trap_10_names_that_were_reserved_before_are_kept():
    model = SmallNet()
    model._ddp_params_and_buffers_to_ignore = ["bn1.running_mean"]  # type: ignore[assignment]
    one_epoch(model, 4, method="ck")
    reserved: Any = model._ddp_params_and_buffers_to_ignore
    assert {"bn1.running_mean"} | MASKS <= set(reserved)


@pytest.mark.parametrize("part", ["whole", "stem"])
@pytest.mark.usefixtures("one_rank")
def test_trap_10_ddp_broadcasts_no_masks_of_a_compiled_model(part):
    model = SmallNet()
    compiled: Any = model
    if part == "whole":
        compiled = torch.compile(model, backend="eager")
    else:
        model.stem = torch.compile(model.stem, backend="eager")  # type: ignore[assignment]
    pruner = one_epoch(compiled, 4, method="ck")
    ddp = DistributedDataParallel(compiled)
    pruner.step()
    ddp._assign_modules_buffers()  # type: ignore[no-untyped-call] # as a forward pass does
    assert not any("mask" in name for name in buffer_names(ddp))
    assert len(buffer_names(ddp)) == 9


@pytest.mark.usefixtures("one_rank")
def test_trap_10_ddp_trains_as_without_it():
    plain, inner = SmallNet(), SmallNet()
    ddp = DistributedDataParallel(inner)
    for model in (plain, ddp):
        optimizer = sgd(model)
        settings = {"method": "ck", "amount": 0.6, "era": [0, 1]}
        pruner = Pruner(model, settings, updates_per_epoch=4, optimizer=optimizer)
        train(model, optimizer, pruner, range(8))
    assert equal_states(snapshot(plain), snapshot(inner))


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters_are_refused():
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    distribute_module(model, mesh)
    with pytest.raises(ValueError, match=r"^the model's parameters are sharded \(FSDP\): a rank"):
        one_epoch(model, 1, method="ck")


# Two ranks


def train_two_ranks(rank: int, folder: Path) -> None:
    """Trains with other images on each rank, and writes down what each saw."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    join(folder, rank, 2)
    model = SmallNet(seed=rank)  # DDP gives all ranks the weights of rank 0
    pruner = one_epoch(model, 6, method="window", exact_layer_sparsity=True, resolution=0.0)
    ddp = DistributedDataParallel(model)
    optimizer = sgd(ddp)
    lines = []
    for index in range(9):
        train_step(ddp, optimizer, 100 * rank + index)
        pruner.step()
        lines.append(f"{pruner.phase} {pruner.mask_hash()}")
        pruner.check()
        if index in (3, 8):  # in the era, and after it
            lines.append(refusal_of_another_mask(pruner, rank))
    lines.append(refusal_at_the_end_of_the_era(rank))
    (folder / f"rank{rank}").write_text("\n".join(lines))
    distributed.destroy_process_group()


def refusal_of_another_mask(pruner: Pruner, rank: int) -> str:
    mask = pruner.masks()["head.weight"]
    before = mask.clone()
    if rank == 1:
        mask[tuple(mask.nonzero()[0])] = False
    message = refusal(pruner.check)
    mask.copy_(before)
    return message


def refusal_at_the_end_of_the_era(rank: int) -> str:
    """Of weights that differ between the ranks, which no DDP keeps together."""
    return refusal(one_epoch(SmallNet(seed=rank), 1, method="ck").step)


def refusal(call: Callable[[], None]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "the call went through"


@pytest.mark.slow
def test_trap_10_ranks_have_the_same_masks_and_refuse_others(tmp_path):
    spawn(train_two_ranks, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = ((tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(2))
    assert one == other
    assert [line.split()[0] for line in one] == (
        ["era"] * 4 + ["the"] + ["era"] + ["fixed"] * 4 + ["the"] * 2
    )
    assert {one[4], one[10], one[11]} == {
        "the pruning masks of rank(s) 1 differ from those of rank 0: the ranks' weights have "
        "drifted apart"
    }
    hashes = [line.split()[1] for line in one if not line.startswith("the")]
    assert len(set(hashes)) == 6  # one for each update of the era


# torch.compile


def test_names_are_clean_under_torch_compile():
    model = SmallNet()
    model.stem = torch.compile(model.stem)  # type: ignore[assignment]
    pruner = one_epoch(torch.compile(model), 2, method="ck")  # type: ignore[arg-type]
    pruner.step()
    assert list(pruner.layers) == list(LAYERS)
    assert list(pruner.masks()) == [f"{name}.weight" for name in LAYERS]
    assert [layer.name for layer in pruner.sparsity().layers] == list(LAYERS)
    assert hook_count(model) == len(LAYERS)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings", [{"method": "window", "exact_layer_sparsity": True}, {"method": "ck"}]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_trap_11_masks_change_without_recompiling(settings):
    model = SmallNet()
    counter: Any = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter)
    optimizer = sgd(model)
    pruner = Pruner(
        compiled,
        {"amount": 0.6, "era": [0, 1], "resolution": 0.0, **settings},
        updates_per_epoch=8,
        example_input=batch(0)[0],  # so that no hooks watch the first update
    )
    counts, hashes = [], set()
    for index in range(8):
        train_step(compiled, optimizer, index)
        counts.append(counter.frame_count)
        pruner.step()
        hashes.add(pruner.mask_hash())
    assert counts == [1, *[2] * 7]  # the dense graph, and the one with hooks
    assert len(hashes) >= 5
    train_step(compiled, optimizer, 8)
    train_step(compiled, optimizer, 9)
    assert counter.frame_count == 2  # the dense graph again


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_trains_as_an_eager_one_through_all_phases():
    states = []
    for compiled in (False, True):
        inner = SmallNet()
        model: Any = torch.compile(inner, backend="aot_eager") if compiled else inner
        optimizer = sgd(inner)
        settings = {"method": "ck", "amount": 0.6, "era": [0, 1]}
        pruner = Pruner(model, settings, updates_per_epoch=3, optimizer=optimizer)
        train(model, optimizer, pruner, range(6))
        backward(model, 6)
        gradient: Any = inner.body.weight.grad
        assert not gradient[~pruner.masks()["body.weight"]].any()
        assert find_hook(inner.body, "weight")[1] is None
        states.append(snapshot(inner))
        pruner.check()
    torch.testing.assert_close(states[0], states[1])
