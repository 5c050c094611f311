"""The analysis of constant channels on networks, compared with what they compute."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from starfire_prune import ck_structured
from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.graph import dense_copy
from tests.structure.probes import (
    NAN,
    NETWORKS,
    Probe,
    analyse,
    assert_constants,
    dead_then_norm,
    some,
    zeros_of,
)
from tests.support.networks import (
    SmallNet,
    equal_states,
    hook_count,
    one_epoch,
    snapshot,
    train_step,
)
from tests.support.sparse_networks import images, sparse_network


def observe(model: nn.Module, inputs: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What each convolution and linear layer reads, channels first, shape `(C, -1)`."""
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name, dim=dim: seen.append(
                        (name, args[0].detach().movedim(dim, 0).flatten(1))
                    )
                )
            )
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    yield from seen


@pytest.mark.parametrize("name", some("vgg16_bn", "densenet121", slow=NETWORKS))
def test_constants_are_what_networks_show(name):
    model = sparse_network(NETWORKS[name])
    channels = analyse(model.float(), 32)
    model.double()
    constant = 0
    for layer, seen in observe(model, images(torch.float64, 32, seed=1)):
        claimed = channels[layer].constant_inputs
        expected = channels[layer].inputs[claimed, None].expand(-1, seen.shape[1])
        torch.testing.assert_close(seen[claimed], expected, rtol=1e-5, atol=1e-5)
        constant += int(claimed.sum())
    assert constant > 20
    assert channels.unknown == ()


@pytest.mark.parametrize(
    "name", some("vgg16_bn", slow=("resnet50", "resnext50", "mobilenetv2", "densenet121"))
)
def test_zero_inputs_are_zero_in_training_and_in_eval(name):
    model = sparse_network(NETWORKS[name], dtype=torch.float32)
    zero = ChannelAnalysis(model, images(size=32)).zero_inputs()
    eval_only = {layer.name: layer.zero_inputs for layer in analyse(model, 32).layers}
    assert sum(int(inputs.sum()) for inputs in zero.values()) > 10
    assert any((eval_only[layer] & ~zero[layer]).any() for layer in zero)
    for mode in (True, False):
        for layer, seen in observe(model.train(mode), images(size=32, seed=1)):
            assert not seen[zero[layer]].any()


@pytest.mark.parametrize(
    ("beta", "running_mean", "in_eval", "in_both"),
    [
        (-2.0, 0.0, True, True),
        (-0.5, 0.0, False, False),  # eval: relu(1 - 0.5)
        (0.5, 3.0, True, False),  # eval: relu(1 - 3 + 0.5); training: relu(0.5)
        (0.5, 0.0, False, False),
    ],
)
def test_zero_in_eval_may_not_be_zero_in_training(beta, running_mean, in_eval, in_both):
    model = dead_then_norm(beta, running_mean)
    analysis = ChannelAnalysis(model, images(size=8))
    assert bool(analysis.run()["3"].zero_inputs[0]) is in_eval
    assert bool(analysis.zero_inputs()["3"][0]) is in_both


class Minus(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x - self.value


def test_only_zeros_are_constant_after_dropout_in_training():
    model = Probe(nn.Sequential(nn.Dropout(), Minus(2.0)))
    zero = ChannelAnalysis(model, images(size=8)).zero_inputs()["reader"]
    assert analyse(model)["reader"].zero_inputs.tolist() == [True, False, False]
    assert zero.tolist() == [False, False, False]
    model.operation = nn.Dropout()
    model.source.bias.requires_grad_(False)  # type: ignore[union-attr]
    assert ChannelAnalysis(model, images(size=8)).zero_inputs()["reader"].tolist() == [0, 1, 0]


def test_runs_follow_the_weights():
    model = SmallNet()
    analysis = ChannelAnalysis(model, images(size=8))
    assert not analysis.run()["stem"].dead.any()
    with torch.no_grad():
        model.stem.weight[3] = 0
    assert analysis.run()["stem"].dead.nonzero().flatten().tolist() == [3]
    assert int(analysis.run()["body"].constant_inputs.sum()) == 1


def test_masks_of_hooks_count():
    model = SmallNet()
    analysis = ChannelAnalysis(model, images(size=8))
    mask = torch.ones_like(model.stem.weight)
    mask[5] = 0
    prune.custom_from_mask(model.stem, "weight", mask)  # type: ignore[no-untyped-call]
    assert analysis.run()["stem"].dead.nonzero().flatten().tolist() == [5]
    fresh = ChannelAnalysis(model, images(size=8)).run()  # exported with the hook in place
    assert fresh["stem"].dead.tolist() == analysis.run()["stem"].dead.tolist()


def test_the_analysis_does_not_change_a_model_within_the_era():
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = one_epoch(model, 8, method="ck", amount=0.8)
    for index in range(4):
        train_step(model, optimizer, index)
        pruner.step()
    before, hooks = snapshot(model), hook_count(model)
    analysis = ChannelAnalysis(model, images(size=8))
    analysis.zero_inputs()
    assert equal_states(before, snapshot(model))
    assert hook_count(model) == hooks
    assert model.training
    for index in range(4, 8):
        train_step(model, optimizer, index)
        pruner.step()
    assert pruner.phase == "fixed"
    dead = ~model.body.weight.flatten(1).any(1)
    assert torch.equal(analysis.run()["body"].dead, dead)


@pytest.mark.parametrize("method", [prune.l1_unstructured, ck_structured])
def test_dense_copy_is_independent_and_without_hooks(method):
    conv = method(nn.Conv2d(2, 8, 3), "weight", amount=0.5)
    order = list(conv._parameters)
    twin: Any = dense_copy(conv)
    assert not prune.is_pruned(twin)
    assert prune.is_pruned(conv)
    assert torch.equal(twin.weight, conv.weight)
    assert list(twin._parameters) == [name.removesuffix("_orig") for name in order]


@pytest.mark.parametrize("batch", [1, 5])
def test_the_example_may_be_of_any_batch_size(batch):
    model = SmallNet()
    ck_structured(model.stem, amount=0.9)
    channels = ChannelAnalysis(model, images(size=8)[:1].expand(batch, -1, -1, -1)).run()
    expected = analyse(model)
    assert expected["body"].constant_inputs.any()
    for layer in expected.layers:
        assert torch.equal(layer.constant_inputs, channels[layer.name].constant_inputs)


def test_wrapped_models_are_unwrapped():
    model = nn.DataParallel(SmallNet())
    assert [layer.name for layer in analyse(model).layers] == ["stem", "body", "point", "head"]


class Twice(nn.Module):
    """A layer that is called on a constant and on a varying channel."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 3, 1)
        self.shared = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.source.weight[:2] = 0

    def forward(self, x: Tensor) -> Tensor:
        features = self.source(x)
        return torch.add(self.shared(features), self.shared(features.flip(1)))


def test_the_constants_of_a_shared_layer_hold_in_every_call():
    model = Twice()
    with torch.no_grad():
        model.source.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[union-attr]
    layer = ChannelAnalysis(model, images(size=8)).run()
    assert "aten.flip" in layer.unknown[0]
    assert_constants(layer["shared"].inputs.tolist(), [NAN, NAN, NAN])


def test_weights_that_are_computed_pass_constants_on():
    model = Probe(lambda x: x)
    middle = weight_norm(nn.Conv2d(3, 3, 1, bias=False))
    with torch.no_grad():
        middle.parametrizations.weight.original1[0, 1:] = 0
    model.operation = middle
    expected = float(2 * middle.weight.detach()[0, 0])
    assert_constants(analyse(model)["reader"].inputs.tolist(), [expected, NAN, NAN])


def test_unknown_operations_vary_and_are_reported():
    channels = analyse(Probe(lambda x: torch.cumsum(x, 2)))
    assert channels["reader"].inputs.isnan().all()
    assert channels.unknown == ("aten.cumsum.default in the model",)
    assert "no rule for" in str(channels["reader"].reason)


def test_transposed_convolutions_are_reported():
    channels = analyse(Probe(lambda x: functional.conv_transpose2d(x, torch.ones(3, 3, 1, 1))))
    assert "conv_transpose2d" in channels.unknown[0]


def test_unknown_operations_name_their_module():
    model = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert (
        "aten.linalg_vector_norm.default in stages.0.blocks.0.mlp.grn" in analyse(model, 32).unknown
    )


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("vgg16_bn", "3", "every output channel of 0.40 has a weight that reads a varying channel"),
        ("convnext", "stem.0", "it reads the model's input"),
        ("convnext", "head.fc", "head.norm, a norm over channels, which mixes them"),
    ],
)
def test_reasons_say_why_all_inputs_vary(name, layer, reason):
    assert reason in str(analyse(NETWORKS[name](), 32)[layer].reason)


def test_layers_that_read_constants_have_no_reason():
    assert analyse(Probe(functional.relu))["reader"].reason is None


def test_layers_are_found_by_name_or_refused():
    with pytest.raises(KeyError, match="no convolution or linear layer 'nothing'"):
        analyse(SmallNet())["nothing"]


def test_autocast_around_the_analysis_changes_nothing():
    model = Probe(functional.relu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ChannelAnalysis(model, images(size=8))
        found = inside.run()["reader"].inputs
        assert inside.zero_inputs()["reader"].tolist() == zeros_of(model)
    assert_constants(found.tolist(), [2, 0, NAN])


def test_operations_that_hold_a_graph_vary_and_are_reported():
    def branch(x: Tensor) -> Tensor:
        output: Tensor = torch.cond(x.sum() > 0, torch.relu, torch.neg, (x,))
        return output

    class Branching(Probe):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.reader(branch(x))
            return output

    channels = analyse(Branching(lambda x: x))
    assert channels["reader"].inputs.isnan().all()
    assert any(name.startswith("cond in ") for name in channels.unknown)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.Linear(8, 4)])
def test_a_model_may_be_a_layer_itself(layer):
    analysis = ChannelAnalysis(layer, images(size=8))
    assert [found.name for found in analysis.run().layers] == [""]
    assert not analysis.zero_inputs()[""].any()


class Auxiliary(Probe):
    """A head for one mode beside the reader."""

    def __init__(self, while_training: bool) -> None:
        super().__init__(functional.relu)
        self.head = nn.Conv2d(3, 4, 1)
        self.while_training = while_training
        self.source.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        features = self.operation(self.source(x))
        output: Tensor = self.reader(features)
        return output + self.head(features) if self.training is self.while_training else output


@pytest.mark.parametrize("while_training", [True, False])
def test_layers_used_in_one_mode_only_have_no_zero_inputs(while_training):
    zeros = ChannelAnalysis(Auxiliary(while_training), images(size=8)).zero_inputs()
    assert zeros["reader"].tolist() == [False, True, False]
    assert zeros["head"].tolist() == [False, False, False]


def test_copies_of_an_analysis_follow_the_model_they_are_copied_with():
    model = Probe(functional.relu)
    analysis = ChannelAnalysis(model, images(size=8))
    analysis.zero_inputs()
    twin, other = copy.deepcopy((model, analysis))
    with torch.no_grad():
        twin.source.bias[0] = 3.0  # type: ignore[index]
    assert_constants(other.run()["reader"].inputs.tolist(), [3, 0, NAN])
    assert_constants(analysis.run()["reader"].inputs.tolist(), [2, 0, NAN])
