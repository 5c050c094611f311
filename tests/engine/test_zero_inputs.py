"""The engine's use of channels that are always zero: columns of linear layers, free weights."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vgg import VGG
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from starfire_prune import Pruner, format_table
from starfire_prune.engine.settings import parse_pruning
from starfire_prune.methods.linear import FCStructured
from starfire_prune.structure import analysis
from starfire_prune.structure.graph import Graph, exported_graph
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.settings import RecipeError
from tests.support.networks import equal_states, sgd, snapshot, train_step

IMAGES = torch.zeros(2, 3, 8, 8)
DEAD = [0, 3]  # channels of the last convolution whose kernels are smallest
GRAPHS: dict[str, Graph] = {}


class Columns(nn.Module):
    """Two convolutions and a linear layer on the flattened image, 4x4 places a channel."""

    def __init__(self, bias: float = -0.1, mean: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(6)
            self.body = nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(10)
            self.head = nn.Linear(160, 10)
        with torch.no_grad():
            self.body.weight[DEAD] *= 1e-3
            self.bn2.bias.fill_(bias)
            self.bn2.running_mean[DEAD] = mean  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn1(self.stem(images)))
        features = torch.relu(self.bn2(self.body(features)))
        output: Tensor = self.head(features.flatten(1))
        return output


def settings(fc: object = None, **others: object) -> dict[str, object]:
    own = {"fc": fc} if fc else {}
    return {"method": "ck", "amount": 0.6, "era": [0, 1], "exclude": "stem", **own, **others}


def pruner_of(model: nn.Module, updates: int = 4, **options: Any) -> Pruner:
    example = options.pop("example_input", IMAGES)
    return Pruner(model, settings(**options), updates_per_epoch=updates, example_input=example)


def pruned(model: nn.Module, **options: Any) -> Pruner:
    """A pruner at the end of its era, with the weights as they were."""
    pruner = pruner_of(model, **options)
    for _ in range(4):
        pruner.step()
    return pruner


def columns(weight: Tensor) -> Tensor:
    """The weights of the head by the channel that they read, `(10, 10, 16)`."""
    return weight.detach().view(10, 10, 16)


@pytest.fixture(autouse=True)
def _one_export_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all tests export the same network, whose graph does not depend on its weights."""

    def exported_once(model: nn.Module, example: Any, training: bool) -> Graph:
        trained = [parameter.requires_grad for parameter in model.parameters()]
        inputs = [(value.shape, value.dtype) for value in example]
        key = f"{type(model)} {model} {trained} {inputs} {training}"
        if key not in GRAPHS:
            GRAPHS[key] = exported_graph(model, example, training)
        return GRAPHS[key]

    monkeypatch.setattr(analysis, "exported_graph", exported_once)


# The method dead_inputs


@pytest.mark.parametrize("then", ["fine", "block"])
def test_columns_behind_dead_channels_go_and_count(then):
    model = Columns()
    pruner = pruned(model, fc={"method": "dead_inputs", "then": then})
    assert not model.body.weight[DEAD].any()
    weight = columns(model.head.weight)
    assert not weight[:, DEAD].any()
    assert weight.flatten(1).any(1).all()
    zeros = int((weight == 0).sum())
    assert zeros == 960 if then == "fine" else abs(zeros - 960) <= 8
    pruner.check()


def test_by_fine_columns_go_for_their_magnitude_alone():
    model = Columns()
    pruned(model)
    assert columns(model.head.weight)[:, DEAD].any()


def test_columns_go_at_the_update_at_which_the_channel_dies():
    model = Columns()
    pruner = pruner_of(model, updates=8, fc={"method": "dead_inputs"}, resolution=0.0)
    for _ in range(8):
        pruner.step()
        masks = pruner.masks()
        dead = ~masks["body.weight"].flatten(1).any(1)
        kept = columns(masks["head.weight"].float())
        assert not kept[:, dead].any()
    assert dead[DEAD].all()


@pytest.mark.parametrize(("bias", "mean"), [(0.1, 5.0), (-0.1, -5.0)])
def test_columns_of_a_channel_that_is_zero_in_one_mode_alone_stay(bias, mean):
    """In eval mode it is bias - mean, in training the bias."""
    model = Columns(bias, mean)
    pruned(model, fc={"method": "dead_inputs"})
    assert not model.body.weight[DEAD].any()
    assert columns(model.head.weight)[:, DEAD].any()


def test_columns_that_have_gone_stay_gone_and_the_outputs_as_they_were():
    model = Columns()
    pruner = pruned(model, fc={"method": "dead_inputs"})
    optimizer = sgd(model)
    for index in range(3):
        train_step(model, optimizer, index)
        pruner.step()
    assert not columns(model.head.weight)[:, DEAD].any()
    pruner.check()


def test_convolutions_that_stand_for_linear_layers_count_as_such():
    cfg = [8, "M", 12, "M"]
    model = VGG(cfg, num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01, global_pool="avg")
    with torch.no_grad():
        model.features[4].weight[:3] *= 1e-3
        model.features[5].bias.fill_(-0.1)
    example = torch.zeros(2, 3, 28, 28)
    options = {"fc": {"method": "dead_inputs"}, "exclude": "features.0", "example_input": example}
    pruner = pruned(model, **options)
    methods = {name: layer.method_name for name, layer in pruner.layers.items()}
    assert methods == {
        "features.4": "ck",
        **dict.fromkeys(("pre_logits.fc1", "pre_logits.fc2", "head.fc"), "dead_inputs"),
    }
    fc1 = model.pre_logits.fc1.weight.detach()
    dead = ~model.features[4].weight.flatten(1).any(1)
    assert dead[:3].all()
    assert not fc1[:, dead].any()
    assert fc1.flatten(1).any(1).all()
    assert int((fc1 == 0).sum()) == int(0.6 * fc1.numel() + 0.5)


def test_why_all_columns_stay_is_told():
    pruner = pruned(Columns(bias=0.1), fc={"method": "dead_inputs"})
    assert pruner.kept_columns() == {
        "head": "none of its constant inputs is zero while training and in eval mode alike"
    }
    assert pruned(Columns(), fc={"method": "dead_inputs"}).kept_columns() == {}


def test_the_classifier_of_a_resnet_keeps_its_columns_since_its_input_is_a_sum():
    model = timm.create_model("test_resnet", num_classes=10)
    example = torch.zeros(2, 3, 32, 32)
    fc = {"method": "dead_inputs"}
    pruner = pruned(model, fc=fc, exclude="conv1*", amount=0.9, example_input=example)
    (reason,) = pruner.kept_columns().values()
    assert reason.startswith("its input comes from an addition in which ")
    assert int((model.fc.weight == 0).sum()) == int(0.9 * model.fc.weight.numel() + 0.5)


def test_columns_go_behind_channels_that_were_dead_before():
    model = Columns()
    with torch.no_grad():
        model.body.weight[DEAD] = 0.0
    pruned(model, fc={"method": "dead_inputs"}, exclude=["stem", "body"])
    assert not columns(model.head.weight)[:, DEAD].any()


def test_an_override_by_structure_counts():
    model = Columns()
    pruned(model, overrides=[{"layers": "head", "method": "dead_inputs", "amount": 0.7}])
    weight = columns(model.head.weight)
    assert not weight[:, DEAD].any()
    assert int((weight == 0).sum()) == 1120


# Free pruning


def test_free_takes_what_reads_zeros_beyond_the_amount():
    model = Columns()
    pruner = pruned(model, prune_dead_inputs=True)
    plain = Columns()
    pruned(plain)
    dead = ~plain.body.weight.flatten(1).any(1)
    assert dead[DEAD].all()
    lost = (columns(plain.head.weight) != 0)[:, dead]
    weight = columns(model.head.weight)
    assert not weight[:, dead].any()
    assert pruner.sparsity()["head"].dead_input_zeros == int(lost.sum()) > 0
    assert int((weight == 0).sum()) == 960 + int(lost.sum())
    assert f"dead inputs: {int(lost.sum())} of the " in format_table(pruner.sparsity())
    pruner.check()


@pytest.mark.parametrize("training", [False, True])
def test_free_changes_no_output(training):
    outputs = []
    for free in (False, True):
        model = Columns()
        pruned(model, prune_dead_inputs=free)
        torch.manual_seed(1)
        outputs.append(model.train(training)(torch.randn(4, 3, 8, 8)))
    torch.testing.assert_close(*outputs)


def test_free_follows_the_channels_that_die_of_it():
    model: Any = nn.Sequential(
        nn.Conv2d(3, 10, 1, bias=False),
        nn.Conv2d(10, 10, 1, bias=False),
        nn.Conv2d(10, 10, 1, bias=False),
    )
    with torch.no_grad():
        for index, layer in enumerate(model):
            layer.weight.fill_(1.0)
            layer.weight.view(-1)[::7] += 0.1 * (index + 1)
        model[0].weight[:5] = 1e-3  # dies by magnitude
        model[1].weight[:4] = 0.0
        model[1].weight[:4, :5] = 5.0  # reads nothing but what dies
    before = copy.deepcopy(model)
    pruner = Pruner(
        model,
        {"method": "ck", "amount": 0.5, "era": [0, 1], "prune_dead_inputs": True},
        updates_per_epoch=1,
        example_input=torch.zeros(1, 3, 4, 4),
    )
    pruner.step()
    assert before[2].weight.all()
    assert not model[1].weight[:, :5].any()
    assert not model[1].weight[:4].any()
    assert not model[2].weight[:, :4].any()
    assert pruner.sparsity()["2"].dead_input_zeros > 0


def all_dead(model: Any) -> Any:
    """With a last batch norm that gives -100 whatever it reads, and is not trained."""
    with torch.no_grad():
        model.bn2.bias.fill_(-100.0)
        model.bn2.weight.fill_(0.0).requires_grad_(False)
    for parameter in model.bn2.parameters():
        parameter.requires_grad_(False)
    return model


def test_each_output_neuron_keeps_a_weight_all_the_same():
    model = all_dead(Columns())
    pruned(model, prune_dead_inputs=True)
    assert (model.head.weight != 0).sum(1).tolist() == [1] * 10


def test_a_convolution_that_would_lose_all_weights_by_it_is_named():
    model = nn.Sequential(all_dead(Columns()).bn2, nn.ReLU(), nn.Conv2d(10, 10, 1))
    settings = {"method": "ck", "amount": 0.5, "era": [0, 1], "prune_dead_inputs": True}
    example = torch.zeros(2, 10, 4, 4)
    pruner = Pruner(model, settings, updates_per_epoch=1, example_input=example)
    with pytest.raises(
        PruningError, match=r"^layer 2 would lose all its weights by `prune_dead_inputs`, since"
    ):
        pruner.step()


def test_without_free_nothing_is_taken():
    pruner = pruned(Columns())
    assert pruner.sparsity().dead_input_zeros == 0
    assert "dead inputs" not in format_table(pruner.sparsity())


# State, mirrors, ranks


@pytest.mark.parametrize("done", [2, 4])
def test_a_resumed_pruner_goes_on_with_the_same_bits(done):
    options: dict[str, Any] = {"fc": {"method": "dead_inputs"}, "prune_dead_inputs": True}
    whole = Columns()
    pruner = pruner_of(whole, **options)
    optimizer = sgd(whole)
    for index in range(6):
        if index == done:
            state, weights = copy.deepcopy((pruner.state_dict(), whole.state_dict()))
            momentum = copy.deepcopy(optimizer.state_dict())
        train_step(whole, optimizer, index)
        pruner.step()
    resumed = Columns()
    again = pruner_of(resumed, **options)
    again.load_state_dict(state)
    resumed.load_state_dict(weights)
    other = sgd(resumed)
    other.load_state_dict(momentum)
    for index in range(done, 6):
        train_step(resumed, other, index)
        again.step()
    assert equal_states(snapshot(resumed), snapshot(whole))
    assert again.sparsity() == pruner.sparsity()


@pytest.mark.parametrize(
    "options", [{"fc": {"method": "dead_inputs"}}, {"prune_dead_inputs": True}]
)
def test_an_average_follows(options):
    model = Columns()
    average = ModelEmaV3(model, decay=0.9)
    pruner = pruner_of(model, **options)
    pruner.mirror(average.module)
    optimizer = sgd(model)
    for index in range(6):
        train_step(model, optimizer, index)
        pruner.step()
        average.update(model)
    assert pruner.sparsity().dead_input_zeros > 0 or "prune_dead_inputs" not in options
    assert pruner.sparsity(average.module) == pruner.sparsity()
    pruner.check()


def prune_on_a_rank(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = Columns(mean=-5.0 * rank)  # on rank 1 the dead channels are no zeros in eval mode
    pruner = pruned(model, fc={"method": "dead_inputs"}, prune_dead_inputs=True)
    (folder / f"rank{rank}").write_text(pruner.mask_hash())
    assert not columns(model.head.weight)[:, DEAD].any()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_take_what_rank_0_finds(tmp_path):
    spawn(prune_on_a_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert one == other


# Refusals


@pytest.mark.parametrize(
    "options",
    [
        {"prune_dead_inputs": True},
        {"fc": {"method": "dead_inputs"}},
        {"overrides": [{"layers": "head", "method": "dead_inputs"}]},
    ],
)
def test_a_missing_example_is_refused(options):
    with pytest.raises(
        ValueError, match=r"^`example_input` \(=None\) is needed by `prune_dead_inputs: true` "
    ):
        pruner_of(Columns(), example_input=None, **options)


def test_an_example_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"^`example_input` must be a tensor such as .* list$"):
        pruner_of(Columns(), example_input=[IMAGES], prune_dead_inputs=True)


def test_what_cannot_be_exported_in_training_mode_is_refused_at_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    settings = {"method": "ck", "amount": 0.5, "era": [0, 1], "prune_dead_inputs": True}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        Pruner(model, settings, updates_per_epoch=1, example_input=torch.zeros(1, 3, 8, 8))


def test_a_layer_that_no_forward_pass_reaches_is_left_alone():
    model = Columns()
    model.unused = nn.Linear(8, 8)
    pruner = pruned(model, prune_dead_inputs=True)
    assert pruner.sparsity()["unused"].dead_input_zeros == 0


def test_a_model_that_cannot_be_exported_is_refused():
    class Branching(Columns):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if images.sum() > 0 else images

    with pytest.raises(ValueError, match=r"need the model's graph, which torch\.export can't make"):
        pruner_of(Branching(), prune_dead_inputs=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fc": {"then": "block"}},
            "fc.then: unknown key (got 'block'); it is an option of dead_inputs",
        ),
        (
            {"fc": {"method": "dead_inputs", "block_size": [2, 2]}},
            "fc.block_size: has no effect with then fine (got [2, 2]); remove it",
        ),
        ({"fc": {"method": "dead_inputs", "then": "random"}}, "fc.then: must be one of"),
    ],
)
def test_options_of_other_methods_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_pruning(settings(**options))


def test_structure_then_block_takes_a_block_size():
    fc = {"method": "dead_inputs", "then": "block", "block_size": [2, 2]}
    parsed = parse_pruning(settings(fc=fc)).fc
    assert parsed != "none"
    assert parsed.options["block_size"] == (2, 2)


@dataclasses.dataclass(eq=False, kw_only=True)
class OwnDeadInputs(FCStructured):
    """A method of a user that reads the channels that are always zero."""


def test_a_users_method_gets_the_columns_that_read_zeros():
    one, other = Columns(), Columns()
    pruned(one, fc={"method": "dead_inputs"})
    pruned(other, fc={"method": OwnDeadInputs})
    assert torch.equal(one.head.weight == 0, other.head.weight == 0)
