"""Whether a pruning is finished, and who asks: the pruner, saves, copies and averages."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from starfire_prune import Pruner, ck_structured, load_pruned, save_pruned, sparse
from starfire_prune.compact import compact, save_compact
from starfire_prune.export import export_onnx
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.marks import check_finished, is_finished
from tests.support.networks import SmallNet, hook_count, sgd, train_step
from tests.support.pruned_runs import PHASES, Run

UNFINISHED = {phase: updates for phase, updates in PHASES.items() if phase != "fixed"}
unfinished_phases = pytest.mark.parametrize("updates", UNFINISHED.values(), ids=UNFINISHED)
WAYS_OUT = (
    "Train on until `pruner.finished`; or make permanent what is reached by `pruner.remove()`; or "
    "pass `unfinished=True` to save or export the model as it is"
)


class Outer(nn.Module):
    """A module that holds the network, as Lightning's do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallNet()
        self.loss = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(images)
        return output


def fixed_outer(exclude: str = "loss") -> tuple[Outer, Pruner]:
    outer = Outer()
    settings = {"method": "ck", "amount": 0.6, "era_updates": [0, 1], "exclude": [exclude]}
    pruner = Pruner(outer, settings)
    pruner.step()
    return outer, pruner


# The pruner


@pytest.mark.parametrize("updates", PHASES.values(), ids=PHASES)
def test_a_pruner_is_finished_in_the_fixed_phase(updates):
    pruner = Run().train_until(updates).pruner
    assert pruner.finished == (pruner.phase == "fixed")
    if pruner.finished:
        pruner.check_finished()
    else:
        with pytest.raises(PruningError, match=r"^the pruning is not finished: "):
            pruner.check_finished()


@pytest.mark.parametrize(
    ("settings", "updates", "stand"),
    [
        (
            {},
            2,
            "it is in the phase dense, in epoch 0 after 2 updates of it; of era [1, 3], 0 of its 8 "
            "updates are done; the target sparsity is 0.00% now and 60.00% at the end of the era. "
            "Possible causes: `end_epoch(epoch)` was not called after each epoch, training stopped",
        ),
        (
            {},
            6,
            "it is in the phase era, in epoch 1 after 2 updates of it; of era [1, 3], 2 of its 8 "
            "updates are done; the target sparsity is 15.00% now and 60.00% at the end of the era. "
            "Possible causes: `end_epoch(epoch)` was not called after each epoch, training stopped",
        ),
        (
            {"era": None, "era_updates": [2, 10]},
            4,
            "it is in the phase era, after 4 updates; of era_updates [2, 10], 2 of its 8 updates "
            "are done; the target sparsity is 15.00% now and 60.00% at the end of the era. "
            "Possible causes: training stopped before the end of the era (early stopping, "
            "`max_steps`), or a resumed run did not load the pruner's state by `load_state_dict`, "
            "so that this pruner began again at the first epoch. ",
        ),
    ],
)
def test_the_error_says_where_the_pruning_stands(settings, updates, stand):
    with pytest.raises(PruningError) as caught:
        Run(**settings).train_until(updates).pruner.check_finished()
    assert str(caught.value).startswith(f"the pruning is not finished: {stand}")
    assert str(caught.value).endswith(WAYS_OUT)


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_forgotten_end_of_an_epoch_is_found(ended):
    run = Run(era=[1, 4])
    run.train_until(4 * ended)
    for index in range(20):
        train_step(run.model, run.optimizer, index)
        run.pruner.step()
    assert not run.pruner.finished
    cause = (
        f"Cause: `end_epoch({ended})` was not called, since epoch {ended} has more than the 4 "
        f"updates of `updates_per_epoch`. {WAYS_OUT}"
    )
    with pytest.raises(PruningError, match=f"{re.escape(cause)}$"):
        run.pruner.check_finished()


def test_a_pruner_that_began_again_is_not_finished(tmp_path):
    run = Run().train_until(13)
    resumed = Run(seed=1)
    resumed.model.load_state_dict(run.model.state_dict())
    with pytest.raises(PruningError, match="a resumed run did not load the pruner's state"):
        save_pruned(resumed.model, tmp_path / "model.safetensors")
    resumed.pruner.load_state_dict(run.pruner.state_dict())
    save_pruned(resumed.model, tmp_path / "model.safetensors")


def test_check_passes_within_the_era():
    Run().train_until(6).pruner.check()


# Saves


@unfinished_phases
@pytest.mark.parametrize("passed", [True, False], ids=["with its pruner", "without"])
def test_an_unfinished_model_is_not_saved(updates, passed, tmp_path: Path):
    run, path = Run().train_until(updates), tmp_path / "model.safetensors"
    options: dict[str, Any] = {"pruner": run.pruner} if passed else {}
    with pytest.raises(PruningError, match=r"^the pruning is not finished: "):
        save_pruned(run.model, path, **options)
    assert not path.exists()
    save_pruned(run.model, path, unfinished=True, **options)
    assert read_metadata(path)["finished"] is False


def test_a_finished_model_has_no_word_of_it_in_its_file(tmp_path):
    run, path = Run().train_until(13), tmp_path / "model.safetensors"
    for unfinished in (False, True):
        save_pruned(run.model, path, pruner=run.pruner, unfinished=unfinished)
        assert "finished" not in read_metadata(path)


def test_a_model_whose_pruner_is_gone_is_not_saved(tmp_path):
    model = Run().train_until(6).model
    with pytest.raises(PruningError, match=r"^the pruning is not finished: "):
        save_pruned(model, tmp_path / "model.safetensors")


def test_models_without_a_pruner_are_saved(tmp_path):
    model = SmallNet()
    save_pruned(model, tmp_path / "dense.safetensors")
    ck_structured(model.body, amount=0.5)
    save_pruned(model, tmp_path / "by_hand.safetensors")


def test_part_of_an_unfinished_model_and_what_holds_it_are_unfinished():
    outer = Outer()
    pruner = Pruner(outer.model, {"method": "ck", "amount": 0.6, "era_updates": [1, 2]})
    for model in (outer, outer.model, outer.model.body, nn.DataParallel(outer)):
        with pytest.raises(PruningError, match="the pruning is not finished"):
            check_finished(model)
    check_finished(outer.loss)
    assert not pruner.finished


# Other ways of passing a model on


def test_an_unfinished_model_is_neither_compiled_nor_compacted_nor_exported(tmp_path):
    run, images = Run().train_until(6), torch.zeros(2, 3, 8, 8)
    calls = (
        lambda: sparse.compile(run.model, images),
        lambda: compact(run.model, images),
        lambda: save_compact(run.model, tmp_path / "small", images, {"name": "x"}),
        lambda: export_onnx(run.model, tmp_path / "model.onnx", (3, 8, 8)),
    )
    for call in calls:
        with pytest.raises(PruningError, match=r"^the pruning is not finished: "):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("native_kernels")
def test_an_unfinished_model_is_compiled_and_compacted_on_request(tmp_path):
    run, images = Run().train_until(6), torch.rand(2, 3, 8, 8)
    run.model.eval()
    expected = run.model(images)
    for model in (
        sparse.compile(run.model, images, unfinished=True),
        compact(run.model, images, unfinished=True)[0],
    ):
        torch.testing.assert_close(model(images), expected)


def test_a_finished_model_is_compacted_into_one_that_is_saved(tmp_path):
    run = Run(method="filter").train_until(13)
    smaller, _ = compact(run.model, torch.zeros(2, 3, 8, 8))
    save_pruned(smaller, tmp_path / "small.safetensors")
    unfinished, _ = compact(Run().model, torch.zeros(2, 3, 8, 8), unfinished=True)
    assert not is_finished(unfinished)


# Copies and averages


@unfinished_phases
def test_a_copy_of_an_unfinished_model_remains_unfinished(updates):
    run = Run().train_until(updates)
    best = copy.deepcopy(run.model)
    assert not is_finished(best)
    run.train_until(13)
    assert is_finished(run.model)
    with pytest.raises(PruningError, match="weights are from before the end of the era"):
        check_finished(best)


def test_a_copy_that_gets_finished_weights_is_finished():
    run = Run()
    other = copy.deepcopy(run.model)
    run.train_until(13)
    other.load_state_dict(run.model.state_dict())
    check_finished(other)


def test_a_copy_of_a_finished_model_is_finished():
    check_finished(copy.deepcopy(Run().train_until(13).model))


def test_dense_weights_in_a_finished_model_are_found(tmp_path):
    run = Run()
    before = copy.deepcopy(run.model.state_dict())
    run.train_until(13)
    with torch.no_grad():
        run.model.body.weight.copy_(before["body.weight"])
    message = "^layer body has 0 weights that are zero, but its finished pruning has 504: "
    with pytest.raises(PruningError, match=message):
        save_pruned(run.model, tmp_path / "model.safetensors")


def test_a_pruner_copied_with_its_model_finishes_by_itself():
    run = Run().train_until(6)
    other = copy.deepcopy(run)
    other.train_until(13)
    check_finished(other.model)
    assert not is_finished(run.model)


def test_an_average_is_as_finished_as_the_model_if_it_is_mirrored():
    run = Run()
    mirrored, forgotten = copy.deepcopy(run.model), copy.deepcopy(run.model)
    run.pruner.mirror(mirrored)
    assert not is_finished(mirrored)
    run.train_until(13)
    check_finished(mirrored)
    with pytest.raises(PruningError, match=r"follow averages by pruner.mirror\(\)"):
        check_finished(forgotten)


@pytest.mark.parametrize("updates", PHASES.values(), ids=PHASES)
def test_a_pickled_model_has_no_mark(updates):
    run = Run().train_until(updates)
    check_finished(pickle.loads(pickle.dumps(run.model)))
    model, pruner = pickle.loads(pickle.dumps((run.model, run.pruner)))
    assert is_finished(model) == pruner.finished


def test_a_pickled_mark_does_not_need_the_package():
    pickled = pickle.dumps(Run().model.body)
    assert b"_starfire_prune_mark" in pickled
    assert b"starfire_prune." not in pickled


def test_another_pruner_takes_the_place_of_one_that_did_not_finish():
    model = SmallNet()
    Pruner(model, {"method": "ck", "amount": 0.6, "era_updates": [5, 9]})
    pruner = Pruner(model, {"method": "ck", "amount": 0.6, "era_updates": [0, 1]})
    pruner.step()
    check_finished(model)


def test_a_layer_that_another_program_has_changed_is_left_to_it():
    run = Run().train_until(13)
    run.model.head.weight = nn.Parameter(torch.ones(4, 8))
    check_finished(run.model)


# Removal


@pytest.mark.parametrize("updates", PHASES.values(), ids=PHASES)
def test_remove_makes_permanent_what_is_reached(updates, tmp_path):
    run = Run()
    average = copy.deepcopy(run.model)
    run.pruner.mirror(average)
    run.train_until(updates)
    zeros = {name: ~mask for name, mask in run.pruner.masks().items()}
    run.pruner.remove()
    for model in (run.model, average):
        assert hook_count(model) == 0
        assert list(model.state_dict()) == list(SmallNet().state_dict())
        assert not any(model.get_parameter(name)[own].any() for name, own in zeros.items())
        save_pruned(model, tmp_path / "model.safetensors")
        nn.utils.fusion.fuse_conv_bn_eval(model.eval().body, model.bn2.eval())
    optimizer = sgd(run.model)
    train_step(run.model, optimizer, 0)  # plain training, in which pruned weights may come back
    assert len(load_pruned(tmp_path / "model.safetensors")) == len(SmallNet().state_dict())


@pytest.mark.parametrize("updates", PHASES.values(), ids=PHASES)
def test_a_removed_pruner_refuses_everything(updates, tmp_path):
    run = Run().train_until(updates)
    pruner, state = run.pruner, run.pruner.state_dict()
    pruner.remove()
    calls = (
        pruner.step,
        pruner.check,
        pruner.masks,
        pruner.state_dict,
        lambda: pruner.end_epoch(pruner.epoch),
        lambda: pruner.load_state_dict(state),
        lambda: pruner.mirror(SmallNet()),
        lambda: save_pruned(run.model, tmp_path / "model.safetensors", pruner=pruner),
    )
    for call in calls:
        with pytest.raises(PruningError, match=r"^the pruner is detached from its model since"):
            call()


# A part of the pruned model


def test_the_inner_module_is_saved_with_the_pruner_of_the_outer_one(tmp_path):
    outer, pruner = fixed_outer()
    save_pruned(outer.model, tmp_path / "inner.safetensors", pruner=pruner)
    save_pruned(outer, tmp_path / "outer.safetensors", pruner=pruner)
    inner = read_metadata(tmp_path / "inner.safetensors")
    whole = read_metadata(tmp_path / "outer.safetensors")
    assert list(inner["weights"]) == [
        f"{name}.weight" for name in ("stem", "body", "point", "head")
    ]
    assert {f"model.{name}": own for name, own in inner["weights"].items()} == whole["weights"]
    assert inner["weights"]["body.weight"]["method"] == "ck"
    SmallNet().load_state_dict(load_pruned(tmp_path / "inner.safetensors"))
    assert pruner.sparsity(outer.model).selected == pruner.sparsity().selected


def test_the_inner_module_of_a_mirror_is_saved(tmp_path):
    outer = Outer()
    settings = {"method": "ck", "amount": 0.6, "era_updates": [0, 1], "exclude": ["loss"]}
    pruner = Pruner(outer, settings)
    average = copy.deepcopy(outer)
    pruner.mirror(average)
    pruner.step()
    save_pruned(average.model, tmp_path / "inner.safetensors", pruner=pruner)
    assert read_metadata(tmp_path / "inner.safetensors")["weights"]["head.weight"]["zeros"] == 48


def test_a_part_without_all_pruned_layers_is_refused(tmp_path):
    outer, pruner = fixed_outer(exclude="model.head")
    message = (
        "the pruned layer loss is not part of the SmallNet that is passed with its pruner: pass "
        "the model that the pruner prunes, or a part of it that holds all pruned layers"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        save_pruned(outer.model, tmp_path / "inner.safetensors", pruner=pruner)


def test_another_model_is_refused(tmp_path):
    _, pruner = fixed_outer()
    message = "^the SmallNet that is passed with a pruner has no layer model.stem with a weight of"
    with pytest.raises(ValueError, match=message):
        save_pruned(SmallNet(), tmp_path / "inner.safetensors", pruner=pruner)
