"""What it costs to work out the masks of a ResNet-50 on the CPU, beside the alternatives.

    python benchmarks/mask_update.py [--repeats 3] [--updates 10000]

In one run, all of them on the same weights with the same amounts: a full update of all 54 layers
through the engine; the native re-application, `BasePruningMethod.apply` called again, with this
package's own mask functions and with CK methods that share nothing with it; a step of coremltools'
`MagnitudePruner` where that is installed; a training step; and the amortised cost of the engine's
`step()` over an era.

A full update is one in which every layer's masks change. With 38 updates an era the amount rises
by 1.6 % at each, a kernel of 64; with 5 it rises by 12 %, a weight of each 3x3 window.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune import Pruner
from starfire_prune.engine.selection import PrunedLayer
from starfire_prune.masks.counts import count

AMOUNT = 0.6
FINE, COARSE = 38, 5  # updates of an era
LAST = 20  # measured at most: native containers grow, and so does their memory
CASES: dict[str, tuple[dict[str, object], int]] = {
    "ck": ({"method": "ck"}, FINE),
    "ck, coarse": ({"method": "ck"}, COARSE),
    "window": ({"method": "window"}, COARSE),
    "window, exact_layer_sparsity": ({"method": "window", "exact_layer_sparsity": True}, FINE),
    "intra": ({"method": "intra"}, FINE),
    "intra, coarse": ({"method": "intra"}, COARSE),
}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="eras to measure (default 3)")
    parser.add_argument("--updates", type=int, default=10_000, help="of the amortised era")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    print(f"ResNet-50, {torch.get_num_threads()} threads, {platform.machine()}, {versions}\n")
    repeats = arguments.repeats
    training = training_step()  # first: it leaves the allocator as a training run does
    results = {case: (engine_update(case, repeats), native_update(case, repeats)) for case in CASES}
    independent = {
        "NumPy's partition of int64 keys": independent_native_update(Partitioned),
        "stable sorts": independent_native_update(Sorted),
    }
    coreml = coremltools_step(repeats)
    print("| full update of all layers | rise | engine [s] | native re-application [s] | ratio |")
    print("|---|---|---|---|---|")
    for case, (engine, native) in results.items():
        rise = f"{AMOUNT / CASES[case][1]:.1%}"
        print(f"| {case} | {rise} | {engine:.3f} | {native:.3f} | {native / engine:.1f}x |")
    print()
    for way, seconds in independent.items():
        ratio = seconds / results["ck"][0]
        print(f"ck by a native method of its own, with {way}: {seconds:.3f} s, {ratio:.1f}x of ck")
    if isinstance(coreml, str):
        print(f"\ncoremltools MagnitudePruner, per_kernel: {coreml}")
    else:
        ratio = coreml / results["ck, coarse"][0]
        print(
            f"\ncoremltools MagnitudePruner, per_kernel: {coreml:.3f} s, {ratio:.1f}x of ck, coarse"
        )
    print(f"forward + backward, batch 16 at 160 px: {training:.3f} s\n")
    print(f"| step() over an era of {arguments.updates} | amortised [ms] | share of a step |")
    print("|---|---|---|")
    for method in ("ck", "window", "intra"):
        cost = amortised(method, arguments.updates)
        print(f"| {method} | {1e3 * cost:.2f} | {cost / training:.2%} |")


def settings_of(case: str) -> tuple[dict[str, object], int]:
    """A case's pruning settings, every rise worth an update, and its updates an era."""
    settings, updates = CASES[case]
    return {**settings, "amount": AMOUNT, "era": [0, 1], "resolution": 0.0}, updates


def engine_update(case: str, repeats: int) -> float:
    """Median seconds of a full update through `Pruner.step`, in the middle of an era."""
    settings, updates = settings_of(case)
    seconds = []
    for _ in range(repeats):
        model = resnet50()
        pruner = Pruner(model, settings, updates_per_epoch=updates)
        for update in range(1, min(updates, LAST)):
            drift(model)
            measured = timed(pruner.step)
            if update > 1:  # the first one puts the hooks on
                seconds.append(measured)
    return statistics.median(seconds)


class Native(prune.BasePruningMethod):
    """A layer's mask as a plain native method: the same mask function, none of the engine."""

    PRUNING_TYPE = "global"

    def __init__(self, layer: PrunedLayer, progress: float) -> None:
        self.method = layer.method_at(progress)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask in the dtype of native ones."""
        return self.method.compute_mask(t, default_mask).to(t.dtype)


def native_update(case: str, repeats: int) -> float:
    """Median seconds of a native re-application to all layers, with the engine's amounts."""
    settings, updates = settings_of(case)
    seconds = []
    for _ in range(repeats):
        model = resnet50()
        layers = list(Pruner(model, settings, updates_per_epoch=updates).layers.values())
        for update in range(1, min(updates, LAST)):
            drift(model)
            measured = timed(apply_natively, layers, update / updates)
            if update > 1:
                seconds.append(measured)
    return statistics.median(seconds)


class Sorted(prune.BasePruningMethod):
    """CK, and single weights of linear layers, as one writes them plainly, with stable sorts."""

    PRUNING_TYPE = "global"

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Zero where the smallest units of a column, or of a linear layer, are."""
        kept = (t * default_mask).abs()
        scores = kept.flatten(2).amax(2) if t.ndim > 2 else kept.reshape(-1, 1)
        units = self.kept_units(scores, count(self.amount, len(scores)))
        return default_mask * units.view(*t.shape[:2], *[1] * (t.ndim - 2))

    def kept_units(self, scores: Tensor, number: int) -> Tensor:
        """Zero for the `number` smallest of each column, of equal ones the first, else one."""
        gone = scores.argsort(dim=0, stable=True)[:number]
        return torch.ones_like(scores).scatter_(0, gone, 0.0)


class Partitioned(Sorted):
    """The same by NumPy's selection among int64 keys, of a score's bits and its index."""

    def kept_units(self, scores: Tensor, number: int) -> Tensor:
        if number == 0:
            return torch.ones_like(scores)
        keys = scores.t().contiguous().view(torch.int32).long().bitwise_left_shift_(32)
        keys += torch.arange(len(scores))
        cutoff = np.partition(keys.numpy(), number - 1, axis=1)[:, number - 1]
        return (keys > torch.from_numpy(cutoff)[:, None]).t().to(scores.dtype)


def independent_native_update(method: type[Sorted]) -> float:
    """Median seconds of a native re-application to all layers, as in the case ck."""
    settings, updates = settings_of("ck")
    model = resnet50()
    layers = Pruner(model, settings, updates_per_epoch=updates).layers.values()
    seconds = []
    for update in range(1, 8):
        drift(model)
        measured = timed(apply_independently, method, list(layers), AMOUNT * update / updates)
        if update > 1:
            seconds.append(measured)
    return statistics.median(seconds)


def apply_independently(method: type[Sorted], layers: list[PrunedLayer], amount: float) -> None:
    """`BasePruningMethod.apply` of a method that shares nothing with this package."""
    for layer in layers:
        method.apply(layer.module, "weight", amount)  # type: ignore[no-untyped-call]


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
        schedule = {"update_steps": list(range(1, COARSE + 1))}
        config: dict[str, Any] = {
            "scheduler": schedule,
            "granularity": "per_kernel",
            "initial_sparsity": 0.0,
            "target_sparsity": AMOUNT,
        }
        settings = pruning.MagnitudePrunerConfig.from_dict({"global_config": config})
        pruner = pruning.MagnitudePruner(model, settings)
        model = pruner.prepare(inplace=True)
        for update in range(1, COARSE):
            drift(model)
            measured = timed(pruner.step)
            if update > 1:
                seconds.append(measured)
    return statistics.median(seconds)


def training_step() -> float:
    """Median seconds of a forward and backward pass of the dense model."""
    model = resnet50()
    images, labels = torch.randn(16, 3, 160, 160), torch.randint(1000, (16,))

    def step() -> None:
        loss: Any = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    step()
    return statistics.median(timed(step) for _ in range(5))


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


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
