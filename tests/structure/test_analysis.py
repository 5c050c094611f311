"""The analysis of constant channels: golden constants of each rule, and networks as they run."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from starfire_prune import ck_structured, fc_structure_mask, fc_structured
from starfire_prune.structure import rules
from starfire_prune.structure.analysis import ChannelAnalysis
from starfire_prune.structure.channels import ConstantChannels
from starfire_prune.structure.graph import dense_copy
from tests.support.networks import (
    SmallNet,
    equal_states,
    hook_count,
    one_epoch,
    snapshot,
    train_step,
)
from tests.support.sparse_networks import NARROW, images, named, sparse_network

NAN = math.nan


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The networks are too small for several threads."""


class Probe(nn.Module):
    """An operation between a layer with two dead channels, constantly 2 and 0, and a reader."""

    def __init__(self, operation: Callable[[Tensor], Tensor], size: int = 8) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 3, 1)
        self.operation = operation
        features = operation(torch.zeros(2, 3, size, size)).shape
        self.reader = (
            nn.Linear(features[-1], 4) if len(features) == 2 else nn.Conv2d(features[1], 4, 1)
        )
        with torch.no_grad():
            self.source.weight[:2] = 0
            self.source.bias.copy_(torch.tensor([2.0, 0.0, 1.0]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.operation(self.source(x)))
        return output


def analyse(model: nn.Module, size: int = 8) -> ConstantChannels:
    return ChannelAnalysis(model, images(size=size)).run()


def assert_constants(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, nan_ok=True)


def weight_of(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# What the reader finds in place of the constants 2, 0 and a varying channel
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "relu": (functional.relu, [2, 0, NAN]),
    "negative relu": (lambda x: functional.relu(-x), [0, 0, NAN]),
    "relu6": (lambda x: functional.relu6(5 * x), [6, 0, NAN]),
    "silu": (functional.silu, [2 / (1 + math.exp(-2)), 0, NAN]),
    "gelu": (functional.gelu, [1.9544997, 0, NAN]),
    "hardswish": (functional.hardswish, [5 / 3, 0, NAN]),
    "sigmoid": (torch.sigmoid, [1 / (1 + math.exp(-2)), 0.5, NAN]),
    "in place": (lambda x: (x + 1).relu_().mul_(2), [6, 2, NAN]),
    "shifted and scaled": (lambda x: 3 * x - 1, [5, -1, NAN]),
    "added constants": (lambda x: x + x.flip(1)[:, [1, 1, 1]] * 0 + x, [4, 0, NAN]),
    "added to a varying one": (lambda x: x + x[:, 2:], [NAN, NAN, NAN]),
    "zero times a varying one": (lambda x: x * x[:, 2:], [NAN, 0, NAN]),
    "a gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), [1.7615942, 0, NAN]),
    "max pool, padded": (lambda x: functional.max_pool2d(x, 3, 2, 1), [2, 0, NAN]),
    "average pool": (lambda x: functional.avg_pool2d(x, 2), [2, 0, NAN]),
    "average pool, padded": (lambda x: functional.avg_pool2d(x, 3, 2, 1), [NAN, 0, NAN]),
    "average pool, padding not counted": (
        lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        [2, 0, NAN],
    ),
    "average pool, ceil mode": (
        lambda x: functional.avg_pool2d(x, 3, 2, ceil_mode=True),
        [2, 0, NAN],
    ),
    "average pool, another divisor": (
        lambda x: functional.avg_pool2d(x, 2, divisor_override=3),
        [NAN, 0, NAN],
    ),
    "adaptive average pool": (lambda x: functional.adaptive_avg_pool2d(x, 3), [2, 0, NAN]),
    "padded by zeros": (lambda x: functional.pad(x, (1, 1, 1, 1)), [NAN, 0, NAN]),
    "padded by two": (lambda x: functional.pad(x, (1, 1, 1, 1), value=2.0), [2, NAN, NAN]),
    "padded by reflection": (lambda x: functional.pad(x, (1, 1, 1, 1), "reflect"), [2, 0, NAN]),
    "upsampled": (lambda x: functional.interpolate(x, scale_factor=2), [2, 0, NAN]),
    "flattened": (lambda x: functional.max_pool2d(x, 4).flatten(1), [2] * 4 + [0] * 4 + [NAN] * 4),
    "mean over the image": (lambda x: x.mean((2, 3)), [2, 0, NAN]),
    "sum over the image": (lambda x: x.sum((2, 3)), [NAN, 0, NAN]),
    "sum over the batch": (lambda x: x.sum(0, keepdim=True), [NAN, 0, NAN]),
    "sum over constant channels": (lambda x: x[:, :2].sum(1, keepdim=True), [2]),
    "mean over channels": (lambda x: x.mean(1, keepdim=True), [NAN]),
    "mean over constant channels": (lambda x: x[:, :2].mean(1, keepdim=True), [1]),
    "concatenated": (lambda x: torch.cat([x, 1 - x], 1), [2, 0, NAN, -1, 1, NAN]),
    "permuted": (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), [2, 0, NAN]),
    "split": (lambda x: torch.split(x, [1, 2], 1)[1], [0, NAN]),
    "chunks": (lambda x: x.chunk(3, 1)[0], [2]),
    "shuffled by reshaping": (
        lambda x: torch.cat([x, 3 + x], 1).view(-1, 2, 3, 8, 8).transpose(1, 2).flatten(1, 2),
        [2, 5, 0, 3, NAN, NAN],
    ),
    "dropout": (lambda x: functional.dropout(x, 0.5, training=False), [2, 0, NAN]),
    "layer norm": (lambda x: functional.layer_norm(x, x.shape[1:]), [NAN, NAN, NAN]),
    "group norm": (lambda x: functional.group_norm(x, 1), [NAN, NAN, NAN]),
    "batch norm": (
        lambda x: functional.batch_norm(
            x, torch.ones(3), torch.full((3,), 4.0), torch.ones(3), torch.full((3,), 3.0), eps=0.0
        ),
        [3.5, 2.5, NAN],
    ),
    "batch norm of weight zero": (
        lambda x: functional.batch_norm(
            x, torch.zeros(3), torch.ones(3), torch.zeros(3), torch.arange(3.0)
        ),
        [0, 1, 2],
    ),
    "convolution": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(1, 1, 0)),
        [18],
    ),
    "padded convolution": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(1, 1, 0), padding=1),
        [NAN],
    ),
    "padded convolution of zeros": (
        lambda x: functional.conv2d(x, torch.ones(1, 3, 3, 3) * weight_of(0, 1, 0), padding=1),
        [0],
    ),
    "convolution, same padding": (
        lambda x: functional.conv2d(x, torch.ones(3, 1, 3, 3), padding="same", groups=3),
        [NAN, 0, NAN],
    ),
    "depthwise convolution": (
        lambda x: functional.conv2d(x, torch.ones(3, 1, 2, 2), torch.ones(3), groups=3),
        [9, 1, NAN],
    ),
    "known weights": (lambda x: x * torch.arange(3.0).view(1, 3, 1, 1).exp(), [2, 0, NAN]),
    "not finite": (lambda x: 1 / x, [0.5, NAN, NAN]),
    "times infinity": (lambda x: x * torch.tensor(math.inf), [NAN, NAN, NAN]),
    "times no number": (lambda x: x * torch.tensor(NAN), [NAN, NAN, NAN]),
    "a convolution by infinity": (
        lambda x: functional.conv2d(x, torch.full((1, 3, 1, 1), math.inf) * weight_of(1, 1, 1)),
        [NAN],
    ),
    "to half": (lambda x: (x + 1e-5).half().float(), [2, 2**-24 * 168, NAN]),
    "to integers": (lambda x: (x * 0.2).int().float(), [NAN, NAN, NAN]),
    "to booleans": (lambda x: x.bool().float(), [NAN, NAN, NAN]),
    "indices of maxima": (
        lambda x: functional.max_pool2d(x, 2, return_indices=True)[1].float(),
        [NAN, NAN, NAN],
    ),
    "a random factor": (lambda x: x * torch.rand_like(torch.ones(3, 1, 1)), [NAN, 0, NAN]),
    "a weight that is computed": (
        lambda x: functional.conv2d(x, x.mean((2, 3))[:, :, None, None] * torch.ones(2, 3, 1, 1)),
        [NAN, NAN],
    ),
}


class Probes(nn.ModuleList):
    """Probes side by side: they are exported together, which takes less time."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [probe(x) for probe in self]


@pytest.fixture(scope="module")
def operations() -> dict[str, list[float]]:
    """What the reader finds after each of the operations."""
    channels = analyse(Probes([Probe(operation) for operation, _ in OPERATIONS.values()]))
    return {
        name: channels[f"{index}.reader"].inputs.tolist() for index, name in enumerate(OPERATIONS)
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_carry_constants(name, operations):
    assert_constants(operations[name], OPERATIONS[name][1])


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


NETWORKS = {
    **NARROW,
    "efficientnet": named("efficientnet_lite0"),
    "se-resnet": named("seresnet50", channels=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
    "convnext": named("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}


def some(*names: str, slow: Iterable[str]) -> list[Any]:
    """Names of networks, those among `slow` that are not given before only as slow tests."""
    others = [name for name in slow if name not in names]
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


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


def dead_then_norm(beta: float, running_mean: float = 0.0) -> nn.Sequential:
    """A dead channel, constantly 1, through a batch norm and a ReLU into a convolution."""
    conv, norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.bias.fill_(1.0)  # type: ignore[union-attr]
        norm.bias.fill_(beta)
        norm.running_mean.fill_(running_mean)  # type: ignore[union-attr]
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(2, 4, 1))


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


def test_dropout_leaves_zeros_alone_in_training():
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


def test_a_model_in_the_middle_of_the_era_is_left_alone():
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


def test_of_a_shared_layer_what_holds_in_every_call_counts():
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


# ---------------------------------------------------------------------------------------------
# What is not constant
# ---------------------------------------------------------------------------------------------


class Between(nn.Module):
    """An expression of a dead channel of zeros and a varying one, a parameter and a buffer."""

    def __init__(self, expression: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.source = nn.Conv2d(3, 2, 1, bias=False)
        self.reader = nn.Conv2d(2, 4, 1)
        self.expression = expression
        self.alpha = nn.Parameter(torch.full((2, 1, 1), 0.5))
        self.register_buffer("n", torch.full((2, 1, 1), 0.5))
        with torch.no_grad():
            self.source.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.reader(self.expression(self, self.source(x)))
        return output


def zeros_of(model: nn.Module, layer: str = "reader", size: int = 8) -> list[bool]:
    zeros: list[bool] = ChannelAnalysis(model, images(size=size)).zero_inputs()[layer].tolist()
    return zeros


RANDOM: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout of a parameter": lambda m, x: 0 * x + functional.dropout(m.alpha, 0.5, m.training),
    "like a parameter": lambda m, x: 0 * x + torch.rand_like(m.alpha),
    "drawn by a buffer": lambda m, x: 0 * x + torch.bernoulli(m.n),
}


@pytest.mark.parametrize("expression", RANDOM.values(), ids=RANDOM)
def test_random_numbers_vary_and_are_not_drawn(expression):
    model = Between(expression).train()
    analysis = ChannelAnalysis(model, images(size=8))
    before = torch.get_rng_state()
    zeros = analysis.zero_inputs()["reader"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not zeros.any()


def count(module: Any, x: Tensor) -> Tensor:
    module.n.add_(1)
    output: Tensor = 0 * x + module.n
    return output


def test_buffers_that_the_forward_pass_changes_vary():
    assert analyse(Between(lambda m, x: 0 * x + m.n))["reader"].inputs.tolist() == [0.5, 0.5]
    assert analyse(Between(count))["reader"].inputs.isnan().all()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_running_means_that_more_than_a_norm_reads_vary_while_training(elsewhere):
    def normalized(module: Any, x: Tensor) -> Tensor:
        output: Tensor = 0 * module.norm(x)
        return output + module.norm.running_mean.view(1, -1, 1, 1) if elsewhere else output

    model = Between(normalized)
    model.norm = nn.BatchNorm2d(2)
    assert zeros_of(model) == [not elsewhere] * 2


TRAINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scale": lambda m, x: x * m.alpha,
    "scale, reshaped": lambda m, x: x * m.alpha.view(1, -1, 1, 1),
    "shift": lambda m, x: functional.gelu(0 * x + m.alpha),
    "weight of a norm": lambda m, x: functional.batch_norm(
        x, None, None, m.alpha.view(-1), training=True
    ),
    "bias of a norm": lambda m, x: functional.batch_norm(
        0 * x, None, None, None, m.alpha.view(-1), training=True
    ),
}


@pytest.mark.parametrize("expression", TRAINED.values(), ids=TRAINED)
def test_zeros_of_trained_vectors_are_no_zeros(expression):
    model = Between(expression)
    with torch.no_grad():
        model.alpha.fill_(0.0)
    assert not zeros_of(model)[1]
    assert analyse(model)["reader"].zero_inputs.all()
    model.alpha.requires_grad_(False)
    assert zeros_of(model) == [True, True]


def test_the_zero_bias_of_a_convolution_is_no_zero_while_it_is_trained():
    model = Between(lambda m, x: x)
    model.source.bias = nn.Parameter(torch.zeros(2))
    assert zeros_of(model) == [False, False]
    model.source.bias.requires_grad_(False)
    assert zeros_of(model) == [True, False]


def test_a_norm_takes_the_zero_bias_of_a_dead_channel_off():
    model = dead_then_norm(beta=-1.0)
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    assert zeros_of(model, "3") == [True, False]


def test_zeros_under_masks_are_zeros():
    model = Between(lambda m, x: x * m.alpha)
    mask = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    prune.custom_from_mask(model, "alpha", mask)  # type: ignore[no-untyped-call]
    assert zeros_of(model) == [True, True]


def test_weights_from_the_input_vary():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.mean(1).flatten(1)
            output: Tensor = self.reader(functional.linear(0 * rows, rows[:1].expand(4, -1)))
            return output

    assert analyse(Computed())["reader"].inputs.isnan().all()


@pytest.mark.slow
def test_conditional_convolutions_vary():
    model = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10)
    assert analyse(model, 32)["classifier"].inputs.isnan().all()


# ---------------------------------------------------------------------------------------------
# Analyses of all kinds of models
# ---------------------------------------------------------------------------------------------


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
def test_layers_of_one_mode_alone_have_no_zero_inputs(while_training):
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


# ---------------------------------------------------------------------------------------------
# The structure of fully connected layers
# ---------------------------------------------------------------------------------------------


def test_columns_behind_dead_channels_of_a_vgg_go_and_count():
    model: Any = sparse_network(NARROW["vgg16_bn"], share=0.5)
    columns = ChannelAnalysis(model, images(torch.float64, 32)).zero_inputs()["3"]
    weight = model[3].weight
    assert 0 < int(columns.sum()) < len(columns)
    assert torch.equal(columns.view(-1, 4).all(1), columns.view(-1, 4).any(1))  # whole channels
    mask = fc_structure_mask(weight, 0.7, columns)
    assert not mask[:, columns].any()
    assert int((~mask).sum()) == math.floor(0.7 * weight.numel() + 0.5)
    assert mask.any(1).all()


def test_columns_of_a_resnet_stay():
    model: Any = sparse_network(NARROW["resnet18"], amount=0.6, share=0.0)
    analysis = ChannelAnalysis(model, images(torch.float64, 32))
    layer = analysis.run()["fc"]
    assert not analysis.zero_inputs()["fc"].any()
    assert str(layer.reason).endswith("an addition in which both sides vary")


def test_fc_structured_takes_the_columns_of_dead_channels():
    conv = nn.Conv2d(3, 6, 3, bias=False)
    with torch.no_grad():
        conv.weight[[1, 4]] = 0
    linear: Any = fc_structured(nn.Linear(24, 8), amount=0.5, previous=conv)
    dead = torch.tensor([1, 4]).repeat_interleave(4) * 4 + torch.arange(4).repeat(2)
    assert not linear.weight_mask[:, dead].any()
    assert int((~linear.weight_mask).sum()) == 96


def test_fc_structured_reads_the_mask_of_the_layer_before():
    conv = ck_structured(nn.Conv2d(1, 6, 3), amount=4)
    linear: Any = fc_structured(nn.Linear(6, 8), amount=0.0, previous=conv)
    assert int((~linear.weight_mask).sum()) == 4 * 8


def test_fc_structured_refuses_layers_that_do_not_fit():
    linear = nn.Linear(25, 8)
    with pytest.raises(ValueError, match=r"`in_features` \(=25\) must be a multiple of .* \(=6\)"):
        fc_structured(linear, amount=0.5, previous=nn.Conv2d(1, 6, 3))
    assert not prune.is_pruned(linear)


def test_the_analysis_is_of_the_rules_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(rules.RULES, torch.ops.aten.relu.default)
    channels = analyse(Probe(functional.relu))
    assert channels.unknown == ("aten.relu.default in the model",)
    assert copy.copy(channels["reader"]).inputs.isnan().all()
