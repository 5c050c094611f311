"""What holds of every method: a registered method is tested here without a line of its own."""

import copy
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from starfire_prune import Pruner, load_pruned, masks, save_pruned
from starfire_prune.methods.base import CONVOLUTIONS, LINEAR, MaskMethod
from starfire_prune.methods.registry import METHODS, applies_to_any
from tests.support.networks import SmallNet, equal_states, snapshot, train_step
from tests.support.pruned_runs import LAST, PHASES, Run, assert_same


@dataclasses.dataclass(eq=False, kw_only=True)
class Coarse(MaskMethod):
    """Prune single weights whose magnitudes are rounded, as a user of the package might."""

    digits: Annotated[int, Field(ge=0, description="digits that are kept")] = 1

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        rounded = t.round(decimals=self.digits)
        return masks.magnitude_mask(rounded, self.amount, mask=default_mask)


def late(progress: float) -> float:
    return progress**2


def settings_of(method: type[MaskMethod]) -> dict[str, Any]:
    """Settings under which a method prunes the layers that it applies to."""
    name = next(name for name, own in [*METHODS.items(), ("", Coarse)] if own is method)
    settings: dict[str, Any] = {"resolution": 0.0}
    if applies_to_any(method, CONVOLUTIONS):
        settings["method"] = name or method
    if applies_to_any(method, LINEAR):
        settings["fc"] = {"method": name or method}
    return settings


SETTINGS = {
    **{name: settings_of(method) for name, method in METHODS.items()},
    "a method and a schedule of a user's": {**settings_of(Coarse), "schedule": late},
}
# Each run under dead_inputs exports its model; tests/engine/test_zero_inputs.py has quicker ones
EXPORTING = "dead_inputs"
every_method = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(own, id=name, marks=[pytest.mark.slow] if name == EXPORTING else [])
        for name, own in SETTINGS.items()
    ],
)


@every_method
@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_a_resumed_run_equals_the_one_that_was_not_interrupted(settings, n_updates):
    run = Run(**settings).train_until(n_updates)
    resumed = Run(seed=1, **settings).resume(run)
    assert_same(run.train_until(LAST), resumed.train_until(LAST))


@every_method
def test_masks_only_lose_weights(settings):
    run = Run(**settings)
    before: dict[str, Tensor] = {}
    for until in range(1, LAST + 1):
        now = {name: mask.clone() for name, mask in run.train_until(until).pruner.masks().items()}
        assert not any((now[name] & ~mask).any() for name, mask in before.items())
        before = now


@every_method
def test_the_final_masks_have_the_counts_of_the_method(settings):
    pruner = Run(**settings).train_until(LAST).pruner
    for layer in pruner.layers.values():
        pruned, units = max(layer.method_at(1.0).counts(layer.shape))
        if units == layer.shape.numel():  # single weights of the layer
            mask = pruner.masks()[f"{layer.name}.weight"]
            assert int((~mask).sum()) == pytest.approx(pruned, abs=units / layer.shape[0])
            assert pruned > 0
        assert pruned < units


@every_method
def test_pruned_weights_are_exactly_zero_after_the_era(settings):
    run = Run(**settings).train_until(PHASES["fixed"])
    zeros = {name: ~mask for name, mask in run.pruner.masks().items()}
    assert any(own.any() for own in zeros.values())
    for until in range(PHASES["fixed"] + 1, LAST + 1):
        run.train_until(until)
        assert not any(run.model.get_parameter(name)[own].any() for name, own in zeros.items())
    run.pruner.check()


@every_method
@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_an_exported_file_holds_the_weights_that_the_model_computes_with(
    settings, n_updates, tmp_path: Path
):
    run = Run(**settings).train_until(n_updates)
    path, unfinished = tmp_path / "model.safetensors", not run.pruner.finished
    save_pruned(run.model, path, pruner=run.pruner, unfinished=unfinished)
    fresh = SmallNet(seed=1)
    fresh.load_state_dict(load_pruned(tmp_path / "model.safetensors"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(fresh.eval()(images), run.model.eval()(images))


@every_method
def test_a_mirrored_copy_ends_with_the_same_zeros(settings):
    run = Run(**settings)
    average = copy.deepcopy(run.model)
    run.pruner.mirror(average)
    for _ in range(LAST):
        run.train_until(run.n_updates + 1)
    run.pruner.check()
    for name, mask in run.pruner.masks().items():
        assert not average.get_parameter(name)[~mask].any()
    assert list(snapshot(average)) == list(snapshot(run.model))


@every_method
@pytest.mark.parametrize("n_updates", PHASES.values(), ids=PHASES)
def test_a_copied_model_computes_the_same(settings, n_updates):
    run = Run(**settings).train_until(n_updates)
    copied = copy.deepcopy(run.model)
    assert equal_states(snapshot(copied), snapshot(run.model))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(copied.eval()(images), run.model.eval()(images))


@every_method
def test_the_same_weights_have_the_same_masks(settings):
    hashes = {Run(**settings).train_until(PHASES["era"]).pruner.mask_hash() for _ in range(2)}
    assert len(hashes) == 1


@dataclasses.dataclass(eq=False, kw_only=True)
class Forgetful(MaskMethod):
    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """The largest weights are kept at first, and then the smallest."""
        is_first = default_mask is None or bool(default_mask.all())
        return masks.magnitude_mask(t if is_first else 1 / (1e-3 + t.abs()), self.amount)


def test_a_method_that_gives_weights_back_never_revives_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    settings = {"method": Forgetful, "amount": 0.5, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=4)
    pruner.step()
    first = {name: mask.clone() for name, mask in pruner.masks().items()}
    train_step(nn.Sequential(model, nn.Flatten()), torch.optim.SGD(model.parameters(), 0.1), 0)
    pruner.step()
    assert not any((mask & ~first[name]).any() for name, mask in pruner.masks().items())
