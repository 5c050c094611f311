"""From a recipe to its run: launches, precisions, weights to start from, and what does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune.recipe.sections import Optimizer, Recipe
from starfire_prune.runs.folder import RunError
from starfire_prune.training.launch import create_accelerator
from starfire_prune.training.setup import Run, create_optimizer, prepare_run
from starfire_prune.training.train import train
from tests.support.processes import exported, same_exports
from tests.support.runs import (
    make_photographs,
    metrics_of,
    new_process,
    small_recipe,
    small_runs,
    train_killed,
    train_on,
)

LAUNCHES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that a finished run of the small recipe has exported."""
    folder = tmp_path_factory.mktemp("weights")
    with small_runs():
        train(small_recipe(folder, "seed=7"), folder / "run")
    return folder / "run" / "export" / "model.safetensors"


@pytest.fixture
def refusal(runs: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """The sentence with which a run of the small recipe is refused before it has a folder."""

    def refused(*overrides: str) -> str:
        with pytest.raises((RunError, ValueError)) as caught:
            train(small_recipe(tmp_path, *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def prepared(recipe: Recipe, folder: Path, *, fresh: bool = True) -> Run:
    """A run in a new process, before its first step."""
    new_process()
    return prepare_run(recipe, folder, create_accelerator(recipe, folder), fresh=fresh)


def photographs(root: Path) -> tuple[str, ...]:
    data = f"data={{name: folder, root: {root}, image_size: 16, batch_size: 8, workers: 0}}"
    return (data, "model.num_classes=2")


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in state.items()
    )


# What does not fit


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_classes=12",
            "model.num_classes (=12) must be the number of classes in the data, 10: "
            "correct it, or give other data",
        ),
        ("model.name=resnet19", "unknown model 'resnet19': did you mean resnet18"),
        (
            "model.options={depth: 3}",
            "resnet18 can't be built with the options {'depth': 3}: ResNet.__init__() got an "
            "unexpected keyword argument 'depth'",
        ),
        (
            "optimizer.name=sdg",
            "optimizer.name (='sdg') is not one of timm's optimizers; nearest: sgd",
        ),
        (
            "optimizer.options={nesterof: true}",
            "optimizer.options don't fit sgd: SGD.__init__() got an unexpected keyword argument "
            "'nesterof'",
        ),
        (
            "optimizer={name: adam, lr: 0.1, options: {betas: [2.0, 0.9]}}",
            "optimizer.options don't fit adam: Invalid beta parameter at index 0: 2.0",
        ),
        (
            "pruning.exclude=[layer9.*]",
            "pruning.exclude: the pattern 'layer9.*' matches no convolution",
        ),
        (
            "training.mixed_precision=fp16",
            "training.mixed_precision (=fp16) needs a GPU: on a CPU, set bf16 or no",
        ),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else None,
)
def test_what_does_not_fit_is_refused_in_a_sentence(override, message, refusal):
    assert message in refusal(override)


def test_an_optimizer_without_its_package_is_refused_in_a_sentence(refusal):
    sentence = refusal("optimizer.name=fusedsgd")
    assert sentence.startswith("optimizer.options don't fit fusedsgd: ")
    assert sentence.endswith("required for APEX optimizers")


def test_an_optimizer_takes_a_list_of_parameters_as_it_takes_a_model():
    weight = nn.Parameter(torch.zeros(3, 2))
    settings = Optimizer(name="adamw", lr=0.5, weight_decay=0.25, options={"eps": 0.125})
    (group,) = create_optimizer(settings, [weight]).param_groups
    assert group["params"] == [weight]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.25, 0.125)


# Launches


def test_processes_that_would_train_alone_are_refused(refusal, monkeypatch):
    for name in LAUNCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert refusal() == (
        "MASTER_ADDR (=10.0.0.1) announces several processes, but RANK and WORLD_SIZE are not set, "
        "so that each would train by itself: start CPU processes by torchrun --nproc_per_node N "
        "-m starfire_prune train …, or unset MASTER_ADDR for a single one"
    )


@pytest.mark.parametrize(
    ("variable", "kind"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
    ],
)
def test_a_launch_that_shards_weights_is_refused(variable, kind, refusal, monkeypatch):
    monkeypatch.setenv(variable, "true")
    assert refusal() == (
        f"launched with {kind}, which shards weights or replaces the optimizer, so that masks "
        f"can't be computed: launch with plain data parallelism, accelerate launch --multi_gpu"
    )


# Weights to start from


def test_a_run_starts_from_the_weights_of_a_file(runs, weights, tmp_path):
    run = prepared(small_recipe(tmp_path, f"model.pretrained={weights}"), tmp_path / "run")
    assert same(run.model.state_dict(), exported(weights.parent.parent))
    assert run.fresh_keys == ()


def test_without_them_it_starts_from_random_weights(runs, weights, tmp_path):
    run = prepared(small_recipe(tmp_path), tmp_path / "run")
    assert not same(run.model.state_dict(), exported(weights.parent.parent))


def test_an_average_starts_from_the_weights_of_the_file_too(runs, weights, tmp_path):
    settings = (f"model.pretrained={weights}", "training.ema={}")
    run = prepared(small_recipe(tmp_path, *settings), tmp_path / "run")
    assert run.average is not None
    assert same(run.average.module.state_dict(), exported(weights.parent.parent))


def test_a_classifier_of_other_classes_is_new(runs, weights, tmp_path):
    settings = photographs(make_photographs(tmp_path / "photographs"))
    recipe = small_recipe(tmp_path, *settings, f"model.pretrained={weights}")
    run = prepared(recipe, tmp_path / "run")
    state = run.model.state_dict()
    assert run.fresh_keys == ("fc.weight", "fc.bias")
    assert state["fc.weight"].shape == (2, 16)
    others = exported(weights.parent.parent)
    assert all(torch.equal(state[name], others[name]) for name in state.keys() - run.fresh_keys)


def test_a_new_classifier_is_the_one_of_the_seed(runs, weights, tmp_path):
    settings = photographs(make_photographs(tmp_path / "photographs"))
    random = prepared(small_recipe(tmp_path, *settings), tmp_path / "run")
    recipe = small_recipe(tmp_path, *settings, f"model.pretrained={weights}")
    pretrained = prepared(recipe, tmp_path / "run")
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(pretrained.model.state_dict()[name], random.model.state_dict()[name])


def test_a_pretrained_run_prunes_and_ends_as_sparse_as_asked(runs, weights, tmp_path):
    train(small_recipe(tmp_path, f"model.pretrained={weights}"), tmp_path / "run")
    assert metrics_of(tmp_path / "run")[-1]["sparsity"] == pytest.approx(0.6, abs=0.02)


def test_a_resumed_run_does_not_load_them_again(runs, weights, tmp_path):
    file = tmp_path / "start.safetensors"
    file.write_bytes(weights.read_bytes())
    recipe = small_recipe(tmp_path, f"model.pretrained={file}")
    train_on(recipe, tmp_path / "whole")
    train_killed(recipe, tmp_path / "broken", 2, "within the epoch")
    file.unlink()
    train_on(recipe, tmp_path / "broken")
    assert same_exports(tmp_path / "broken", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_loads_them_again(runs, weights, tmp_path):
    recipe = small_recipe(tmp_path, f"model.pretrained={weights}")
    train_on(recipe, tmp_path / "whole")
    train_killed(recipe, tmp_path / "broken", 0, "within the epoch")
    train_on(recipe, tmp_path / "broken")
    assert same_exports(tmp_path / "broken", tmp_path / "whole")


def test_a_missing_file_of_weights_is_refused_with_its_path(refusal, tmp_path):
    assert refusal(f"model.pretrained={tmp_path}/none.safetensors") == (
        f"model.pretrained: there is no file {tmp_path}/none.safetensors"
    )


def test_a_file_that_is_no_safetensors_file_is_refused_with_its_path(refusal, tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"fc.bias": torch.zeros(10)}, file)
    sentence = refusal(f"model.pretrained={file}")
    assert sentence.startswith(f"model.pretrained: {file} is not a complete safetensors file (")
    assert sentence.endswith(
        "): restore it, export it again, or convert it by safetensors.torch.save_file"
    )


def test_the_weights_of_another_model_are_refused_with_their_path(refusal, weights, tmp_path):
    options = "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 24]}"
    sentence = refusal(f"model.pretrained={weights}", f"model.options={options}")
    assert sentence.startswith(
        f"model.pretrained: {weights} is of another model: it has other shapes: "
        f"layer4.0.conv1.weight (16, 16, 3, 3) instead of (24, 16, 3, 3), "
    )
    assert sentence.endswith(" and 12 more")


def test_a_file_of_a_part_of_the_model_is_refused_with_its_path(refusal, weights, tmp_path):
    file = tmp_path / "part.safetensors"
    save_file({"conv1.weight": exported(weights.parent.parent)["conv1.weight"]}, file)
    sentence = refusal(f"model.pretrained={file}")
    assert sentence.startswith(f"model.pretrained: {file} is of another model: it lacks bn1.weight")


def test_timms_weights_without_a_network_are_refused_in_a_sentence(refusal, runs):
    def fail(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to\n'https://huggingface.co'")

    runs.setattr("timm.models._builder.load_pretrained", fail)
    assert refusal("model={name: resnet18.a1_in1k, num_classes: 10, pretrained: true}") == (
        "model.pretrained: timm's weights of resnet18.a1_in1k can't be had (We couldn't "
        "connect to 'https://huggingface.co'): give a safetensors file"
    )


def test_timms_weights_of_a_model_without_any_are_refused(refusal):
    sentence = refusal("model={name: resnet50_v1, num_classes: 10, pretrained: true}")
    assert sentence == (
        "model.pretrained: resnet50_v1 has no pretrained weights: give a safetensors file, or use "
        "pretrained=False"
    )


# Losses and mixing


def test_labels_are_smoothed_in_training_and_not_in_evaluation(runs, tmp_path):
    run = prepared(small_recipe(tmp_path, "training.label_smoothing=0.3"), tmp_path / "run")
    assert run.mixing is None
    assert isinstance(run.train_loss, nn.CrossEntropyLoss)
    assert isinstance(run.loss, nn.CrossEntropyLoss)
    assert run.train_loss.label_smoothing == 0.3
    assert run.loss.label_smoothing == 0.0  # comparable between runs


MIXES = {
    "mixup": ("training.mixup=0.4",),
    "cutmix": ("training.cutmix=1.0",),
    "both": ("training.mixup=0.4", "training.cutmix=1.0"),
}


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("kind", MIXES)
def test_batches_of_any_size_are_mixed_with_shares_that_add_up_to_one(kind, size, runs, tmp_path):
    run = prepared(small_recipe(tmp_path, *MIXES[kind]), tmp_path / "run")
    images = torch.rand(size, 3, 6, 6)
    assert run.mixing is not None
    mixed, shares = run.mixing(images, torch.arange(size))
    assert mixed.shape == images.shape
    assert shares.shape == (size, 10)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * size)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_share_of_a_class_is_that_of_its_image(kind, runs, tmp_path):
    run = prepared(small_recipe(tmp_path, *MIXES[kind]), tmp_path / "run")
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 20)  # as bright as their label
    assert run.mixing is not None
    mixed, shares = run.mixing(images.clone(), torch.arange(4))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, :4] @ torch.arange(4.0))


def test_mixup_and_cutmix_take_turns_at_random(runs, tmp_path):
    run = prepared(small_recipe(tmp_path, *MIXES["both"]), tmp_path / "run")
    images = torch.eye(2)[:, :, None, None].expand(2, 2, 20, 20)
    torch.manual_seed(0)
    assert run.mixing is not None
    mixed = [run.mixing(images.clone(), torch.arange(2))[0] for _ in range(200)]
    binary = sum(bool(((batch == 0) | (batch == 1)).all()) for batch in mixed)
    assert 70 < binary < 130  # cutmix copies pixels


def test_mixed_labels_are_smoothed_as_timm_smooths_them(runs, tmp_path):
    settings = ("training.mixup=0.4", "training.label_smoothing=0.3")
    run = prepared(small_recipe(tmp_path, *settings), tmp_path / "run")
    logits, labels, share = torch.randn(6, 10), torch.randint(0, 10, (6,)), 0.7
    hard = functional.one_hot(labels, 10).float()
    found = run.train_loss(logits, share * hard + (1 - share) * hard.flip(0))
    smoothed = mixup_target(labels, 10, share, smoothing=0.3)
    torch.testing.assert_close(found, SoftTargetCrossEntropy()(logits, smoothed))


# Counting


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 4), (3, 2), (4, 1), (9, 1)])
def test_updates_of_an_epoch_are_its_batches_by_the_accumulation(
    accumulation, updates, runs, tmp_path
):
    recipe = small_recipe(tmp_path, f"training.gradient_accumulation={accumulation}")
    assert prepared(recipe, tmp_path / "run").updates_per_epoch == updates


def test_dense_training_has_no_pruner(runs, tmp_path):
    assert prepared(small_recipe(tmp_path, "pruning=none"), tmp_path / "run").pruner is None


def test_without_an_average_there_is_none(runs, tmp_path):
    assert prepared(small_recipe(tmp_path), tmp_path / "run").average is None


def test_the_threads_of_the_recipe_are_set(runs, tmp_path):
    recipe = small_recipe(tmp_path, "training.threads=2")
    create_accelerator(recipe, tmp_path / "run")
    assert torch.get_num_threads() == 2


def test_compiling_makes_room_for_the_graphs_of_a_run(runs, tmp_path):
    with torch._dynamo.config.patch(cache_size_limit=8):
        create_accelerator(small_recipe(tmp_path, "training.compile=true"), tmp_path / "run")
        assert torch._dynamo.config.cache_size_limit == 16
