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
from starfire_prune.engine.settings import Fc, Override, Pruning
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
    stores: list[dict[str, Any]] = [
        *(registry._METHODS, registry._PASSED),
        *(schedules._SCHEDULES, schedules._PASSED),
    ]
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


@dataclasses.dataclass(eq=False, kw_only=True)
class Anywhere(Coarse):
    applies_to: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)


@pytest.mark.parametrize("place", ["method", "fc", "overrides"])
def test_a_class_may_stand_wherever_a_name_may(place):
    settings: dict[str, dict[str, Any]] = {
        "method": {"method": Anywhere},
        "fc": {"method": "ck", "fc": {"method": Anywhere}},
        "overrides": {"method": "ck", "overrides": [{"layers": "2", "method": Anywhere}]},
    }
    layers = pruner_of(**settings[place]).layers
    assert Anywhere in {type(layer.method) for layer in layers.values()}


def test_classes_of_one_name_are_told_apart():
    twin = dataclasses.make_dataclass("Coarse", [], bases=(Coarse,), eq=False, kw_only=True)
    twin.__module__, twin.__qualname__ = Coarse.__module__, Coarse.__qualname__
    pruners = [pruner_of(method=own) for own in (Coarse, twin, Coarse)]
    assert [type(pruner.layers["0"].method) for pruner in pruners] == [Coarse, twin, Coarse]
    with pytest.raises(ValueError, match="saved under other settings of method"):
        pruners[1].load_state_dict(pruners[0].state_dict())


def test_a_class_of_a_function_needs_a_name():
    @dataclasses.dataclass(eq=False, kw_only=True)
    class Inner(Coarse):
        pass

    with pytest.raises(RecipeError, match=r"<locals>.Inner has no name that a checkpoint could"):
        pruner_of(method=Inner)
    register_method("inner")(Inner)
    assert pruner_of(method=Inner).pruning.method == "inner"


@dataclasses.dataclass(eq=False, kw_only=True)
class Options(Coarse):
    """Options that are required, made by a factory, and of tuples."""

    power: float
    window: tuple[int, int] = dataclasses.field(default_factory=lambda: (1, 2))


def test_an_option_without_default_is_required():
    with pytest.raises(RecipeError, match=r"^pruning: power: is required"):
        pruner_of(method=Options)


def test_an_option_may_have_a_factory_and_be_a_tuple():
    layer = pruner_of(method=Options, power=2.0).layers["0"]
    assert vars(layer.method)["window"] == (1, 2)
    layer = pruner_of(method=Options, power=2.0, window=[3, 4]).layers["0"]
    assert vars(layer.method)["window"] == (3, 4)


@pytest.mark.parametrize("name", ["era", "resolution", "layers", "options", "parts", "copy"])
def test_an_option_can_not_have_a_name_of_the_settings(name):
    method = dataclasses.make_dataclass(
        "Clash", [(name, int, 1)], bases=(Coarse,), eq=False, kw_only=True
    )
    with pytest.raises(TypeError, match=rf"Clash.{name} can't be an option: the settings"):
        register_method("clash")(method)


def test_reserved_names_are_those_of_the_sections():
    names = {name for own in (Pruning, Fc, Override) for name in (*dir(own), *own.model_fields)}
    assert {name for name in names if not name.startswith("_")} <= registry.RESERVED


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


class Plain(Coarse):
    more: int = 3


def test_options_without_the_dataclass_are_refused():
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


def test_a_lambda_needs_a_name():
    with pytest.raises(RecipeError, match=r"<lambda> has no name that a checkpoint could refer to"):
        pruner_of(method="ck", schedule=lambda progress: progress)


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
