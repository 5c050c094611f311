"""What it costs to work out the masks of a ResNet-50 on the CPU, beside the alternatives.

    python benchmarks/mask_update.py [--repeats 3] [--updates 10000]

In one run, all of them on the same weights with the same amounts: a full update of all 54 layers
through the engine; the native re-application of the same masks, `BasePruningMethod.apply` called
again; a step of coremltools' `MagnitudePruner` where that is installed; a training step; and the
amortised cost of the engine's `step()` over an era.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import Pruner
from starfire_prune.layers import PrunedLayer

AMOUNT = 0.6
UPDATES = 5  # of a short era: each takes 0.12 more, enough for every layer's count to rise
METHODS = ("ck", "window", "intra")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="eras to measure (default 3)")
    parser.add_argument("--updates", type=int, default=10_000, help="of the amortised era")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    print(f"ResNet-50, {torch.get_num_threads()} threads, {platform.machine()}, {versions}\n")
    engine = {method: median(engine_updates(method, arguments.repeats)) for method in METHODS}
    native = {method: median(native_updates(method, arguments.repeats)) for method in METHODS}
    coreml = coremltools_step(arguments.repeats)
    training = median(training_steps())
    print("| full update of all layers | engine [s] | native re-application [s] | ratio |")
    print("|---|---|---|---|")
    for method in METHODS:
        ratio = native[method] / engine[method]
        print(f"| {method} | {engine[method]:.3f} | {native[method]:.3f} | {ratio:.1f}x |")
    if isinstance(coreml, str):
        print(f"\ncoremltools MagnitudePruner, per_kernel: {coreml}")
    else:
        ratio = coreml / engine["ck"]
        print(f"\ncoremltools MagnitudePruner, per_kernel: {coreml:.3f} s, {ratio:.1f}x of ck")
    print(f"forward + backward, batch 16 at 160 px: {training:.3f} s\n")
    print(f"| step() over an era of {arguments.updates} | amortised [ms] | share of a step |")
    print("|---|---|---|")
    for method in METHODS:
        cost = amortised(method, arguments.updates)
        print(f"| {method} | {1e3 * cost:.2f} | {cost / training:.2%} |")


def engine_updates(method: str, repeats: int) -> Iterator[float]:
    """Seconds of each full update through `Pruner.step`, the first and last of an era left out."""
    for _ in range(repeats):
        model = resnet50()
        settings = {"method": method, "amount": AMOUNT, "era": [0, 1], "resolution": 0.0}
        pruner = Pruner(model, settings, updates_per_epoch=UPDATES)
        for update in range(1, UPDATES):
            drift(model)
            seconds = timed(pruner.step)
            if update > 1:  # the first one puts the hooks on
                yield seconds


class Native(prune.BasePruningMethod):
    """A layer's mask as a plain native method: the same mask function, none of the engine."""

    PRUNING_TYPE = "global"

    def __init__(self, layer: PrunedLayer, progress: float) -> None:
        self.method = layer.method_at(progress)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask in the dtype of native ones."""
        return self.method.compute_mask(t, default_mask).to(t.dtype)


def native_updates(method: str, repeats: int) -> Iterator[float]:
    """Seconds of each native re-application to all layers, with the amounts of the engine's."""
    for _ in range(repeats):
        model = resnet50()
        settings = {"method": method, "amount": AMOUNT, "era": [0, 1]}
        layers = list(Pruner(model, settings, updates_per_epoch=UPDATES).layers.values())
        for update in range(1, UPDATES):
            drift(model)
            seconds = timed(lambda update=update: apply_natively(layers, update / UPDATES))
            if update > 1:
                yield seconds


def apply_natively(layers: list[PrunedLayer], progress: float) -> None:
    """`BasePruningMethod.apply` on every layer."""
    for layer in layers:
        Native.apply(layer.module, "weight", layer, progress)  # type: ignore[no-untyped-call]


def coremltools_step(repeats: int) -> float | str:
    """Median seconds of a step that updates all masks, or why there is none."""
    try:
        from coremltools.optimize.torch import pruning
    except Exception as error:  # whatever an incompatible version raises on import
        return f"not measured ({type(error).__name__}: {error})"
    seconds = []
    for _ in range(repeats):
        model = resnet50()
        schedule = {"update_steps": list(range(1, UPDATES + 1))}
        config: dict[str, Any] = {
            "scheduler": schedule,
            "granularity": "per_kernel",
            "initial_sparsity": 0.0,
            "target_sparsity": AMOUNT,
        }
        settings = pruning.MagnitudePrunerConfig.from_dict({"global_config": config})
        pruner = pruning.MagnitudePruner(model, settings)
        model = pruner.prepare(inplace=True)
        for update in range(1, UPDATES):
            drift(model)
            measured = timed(pruner.step)
            if update > 1:
                seconds.append(measured)
    return statistics.median(seconds)


def training_steps() -> Iterator[float]:
    """Seconds of forward and backward passes of the dense model."""
    model = resnet50()
    images, labels = torch.randn(16, 3, 160, 160), torch.randint(1000, (16,))

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    step()
    for _ in range(5):
        yield timed(step)


def amortised(method: str, updates: int) -> float:
    """Mean seconds of `step()` over a whole era, at the default resolution."""
    model = resnet50()
    settings = {"method": method, "amount": AMOUNT, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=updates)
    total = 0.0
    for update in range(updates):
        if update % (updates // 100 or 1) == 0:
            drift(model)
        total += timed(pruner.step)
    return total / updates


def resnet50() -> nn.Module:
    """The dense model, with the same weights each time."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet50")
    return model.train()


@torch.no_grad()
def drift(model: nn.Module) -> None:
    """Move the weights a little, as training would."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=1e-3)


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(values: Iterator[float]) -> float:
    """Of the measured seconds."""
    return statistics.median(values)


if __name__ == "__main__":
    main()
