"""The ways to train whose overhead is measured: each adds something to a step of ResNet-50."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from starfire_prune import MaskedAllreduceState, Pruner, masked_allreduce_hook
from starfire_prune.engine import comm_hook, gradients
from starfire_prune.methods.base import find_hook
from starfire_prune.utils.modules import layer_weight, prunable_layers

AMOUNT = 0.7
ERA_UPDATES = 10_000


class Training:
    """ResNet-50, and what takes a step of it.

    Args:
        arguments: of the command line.

    Attributes:
        after_update: what a case does after `optimizer.step()`.
        forward: the model as it is called: compiled, or wrapped by DDP.
        added: seconds of CPU time that a step's added operations took, of the present step.
        of_hook: of these the communication hook's.
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
        self.of_hook = 0.0

    def step(self) -> None:
        """A forward and backward pass, an update, and what the case does after it."""
        bf16 = self.arguments.bf16
        with torch.autocast(self.arguments.device, torch.bfloat16, enabled=bf16):
            loss: Any = nn.functional.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.timed(self.after_update)()
        self.optimizer.zero_grad()

    def timed(self, function: Callable[..., Any], *, of_hook: bool = False) -> Callable[..., Any]:
        """A function whose CPU time counts as added."""

        def timing(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments, **options)
            seconds = time.thread_time() - start
            self.added += seconds
            self.of_hook += seconds if of_hook else 0.0
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
    with_hook(training, fixed(training))


def dense_and_hook(training: Training) -> None:
    """Dense under DDP with the hook, which sends all gradients."""
    with_hook(training, training.pruner())


def with_hook(training: Training, pruner: Pruner) -> None:
    """DDP with the hook, all of whose operations are timed: those in futures' callbacks too."""
    under_ddp(training)

    @functools.wraps(masked_allreduce_hook)
    def timed_hook(*arguments: Any) -> Any:
        return training.timed(masked_allreduce_hook, of_hook=True)(*arguments)

    training.forward.register_comm_hook(MaskedAllreduceState(pruner), timed_hook)
    comm_hook._scatter = training.timed(comm_hook._scatter, of_hook=True)


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
    "dense, DDP and hook": dense_and_hook,
    "fixed, DDP and hook": fixed_and_hook,
    "by hand": by_hand,
    "native": native,
    "coremltools": coremltools,
}
