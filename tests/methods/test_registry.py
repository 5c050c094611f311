"""Methods and schedules of a user: registered under a name, or passed as they are."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from starfire_prune import Pruner, load_pruned, masks
from starfire_prune.methods import registry, schedules
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.registry import METHODS, method_class, method_options, register_method
from starfire_prune.methods.schedules import SCHEDULES, register_schedule, schedule_name
from starfire_prune.recipe.load import load_recipe
from starfire_prune.training.train import train
from starfire_prune.utils.settings import RecipeError
from tests.support.runs import metrics_of, small_recipe

SETTINGS = {"amount": 0.5, "era": [0, 1]}


@dataclasses.dataclass(eq=False, kw_only=True)
class Coarse(MaskMethod):
    """Prune single weights whose magnitudes are rounded."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)

    digits: Annotated[int, Field(ge=0, description="digits that are kept")] = 2

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        rounded = t.round(decimals=self.digits)
        return masks.magnitude_mask(rounded, self.amount, mask=default_mask)


def late(progress: float) -> float:
    return progress**3


@pytest.fixture(autouse=True)
def restored_registries() -> Iterator[None]:
    stores: list[dict[str, Any]] = [registry._METHODS, schedules._SCHEDULES]
    before = [dict(store) for store in stores]
    yield
    for store, entries in zip(stores, before, strict=True):
        store.clear()
        store.update(entries)


def pruner_of(**settings: Any) -> Pruner:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    return Pruner(model, {**SETTINGS, **settings}, updates_per_epoch=2)


# Methods


def test_a_class_is_a_method():
    pruner = pruner_of(method=Coarse, digits=1)
    weight: Any = pruner.layers["0"].module.weight
    expected = masks.magnitude_mask(weight.detach().round(decimals=1), 0.25)
    pruner.step()
    assert torch.equal(pruner.masks()["0.weight"], expected)


def test_a_registered_name_is_a_method():
    register_method("coarse")(Coarse)
    layer = pruner_of(method="coarse", digits=1).layers["0"]
    assert (layer.method_name, type(layer.method)) == ("coarse", Coarse)


def test_a_class_that_is_not_registered_gets_its_full_name():
    assert pruner_of(method=Coarse).pruning.method == f"{__name__}.Coarse"


@pytest.mark.parametrize("place", ["method", "fc", "overrides"])
def test_a_class_may_stand_wherever_a_name_may(place):
    @dataclasses.dataclass(eq=False, kw_only=True)
    class Anywhere(Coarse):
        applies_to: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)

    settings: dict[str, dict[str, Any]] = {
        "method": {"method": Anywhere},
        "fc": {"method": "ck", "fc": {"method": Anywhere}},
        "overrides": {"method": "ck", "overrides": [{"layers": "2", "method": Anywhere}]},
    }
    layers = pruner_of(**settings[place]).layers
    assert Anywhere in {type(layer.method) for layer in layers.values()}


def test_its_fields_are_options_with_their_ranges():
    assert list(method_options(Coarse)) == ["digits"]
    with pytest.raises(RecipeError, match=r"^pruning: digits: must be at least 0 \(got -1\)$"):
        pruner_of(method=Coarse, digits=-1)
    with pytest.raises(RecipeError, match=r"^pruning: scope: unknown key"):
        pruner_of(method=Coarse, scope="layer")


def test_it_prunes_only_what_it_applies_to():
    with pytest.raises(RecipeError, match=r"fc.method: must be one of fine, block,"):
        pruner_of(method="ck", fc={"method": Coarse})


def test_a_recipe_with_a_users_method_trains_resumes_and_exports(runs, tmp_path):
    register_method("coarse")(Coarse)
    register_schedule("late")(late)
    overrides = ("pruning.method=coarse", "pruning.digits=1", "pruning.schedule=late")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(small_recipe(tmp_path, *overrides), whole)
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(small_recipe(tmp_path, *overrides), killed)
    train(small_recipe(tmp_path, *overrides), killed)
    one, other = (load_pruned(run / "export" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(whole)[-1]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert load_recipe(whole / "recipe.yaml").pruning == small_recipe(tmp_path, *overrides).pruning


def _stop_after(patch: pytest.MonkeyPatch, epochs: int) -> None:
    end_epoch = Pruner.end_epoch

    def stopping(pruner: Pruner, epoch: int) -> None:
        if epoch == epochs:
            raise KeyboardInterrupt
        end_epoch(pruner, epoch)

    patch.setattr(Pruner, "end_epoch", stopping)


def test_a_name_of_another_class_is_refused():
    with pytest.raises(ValueError, match=r"^the name 'ck' is that of .*CKStructured: choose"):
        register_method("ck")(Coarse)


def test_a_class_may_be_registered_again():
    register_method("coarse")(Coarse)
    assert register_method("coarse")(Coarse) is METHODS["coarse"]


def test_options_without_the_dataclass_are_refused():
    class Plain(Coarse):
        more: int = 3

    with pytest.raises(RecipeError, match=r"Plain\.more is annotated but not a field: decorate"):
        pruner_of(method=Plain)


@pytest.mark.parametrize("method", [nn.Conv2d, int])
def test_a_class_that_is_not_a_method_is_refused(method):
    with pytest.raises(RecipeError, match=r"must be a class that derives from MaskMethod"):
        pruner_of(method=method)


def test_an_unknown_name_lists_the_methods():
    with pytest.raises(ValueError, match=r"^`method` \(='cj'\) must be one of window, ck, intra"):
        method_class("cj")


# Schedules


def test_a_function_is_a_schedule():
    pruner = pruner_of(method="ck", schedule=late)
    pruner.step()
    assert pruner.target_sparsity == 0.5 * 0.125
    assert pruner.pruning.schedule == f"{__name__}.late"


def test_a_registered_schedule_has_its_name():
    register_schedule("late")(late)
    assert schedule_name(late) == "late"
    assert pruner_of(method="ck", schedule="late").pruning.schedule_function is late
    assert SCHEDULES["late"] is late


@pytest.mark.parametrize("schedule", [lambda progress: 0.5, lambda progress: 1 - progress])
def test_a_schedule_that_does_not_rise_from_0_to_1_is_refused(schedule):
    with pytest.raises(RecipeError, match=r"must rise from 0 to 1: it gives"):
        pruner_of(method="ck", schedule=schedule)


def test_two_different_schedules_of_one_name_are_refused():
    register_schedule("mine")(late)
    with pytest.raises(ValueError, match=r"^the name 'mine' is that of .*late: choose another"):
        register_schedule("mine")(lambda progress: progress)


def test_the_exported_file_names_the_users_method(runs, tmp_path: Path):
    register_method("coarse")(Coarse)
    train(small_recipe(tmp_path, "pruning.method=coarse"), tmp_path / "run")
    assert "coarse" in (tmp_path / "run" / "recipe.yaml").read_text()
