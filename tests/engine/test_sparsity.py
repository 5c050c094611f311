"""Zeros are counted on the weights that a forward pass uses, whatever pruning has made of them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from starfire_prune import ck_structured, format_table, measure_sparsity, window_structured
from starfire_prune.engine.sparsity import LayerSparsity, Sparsity
from starfire_prune.utils.modules import effective_weight


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.BatchNorm2d(10),
        nn.ConvTranspose2d(10, 10, 2),
        nn.Conv2d(10, 4, 1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def test_a_dense_network_has_no_zeros():
    sparsity = measure_sparsity(network())
    assert [layer.zeros for layer in sparsity.layers] == [0, 0, 0, 0]
    assert (sparsity.network, sparsity.selected) == (0.0, 0.0)


@pytest.mark.parametrize("removed", [False, True])
def test_counts_of_a_hooked_layer_and_after_removal(removed):
    model = network()
    ck_structured(model[0], amount=0.6)
    if removed:
        prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    assert measure_sparsity(model)["0"] == LayerSparsity(
        name="0",
        kind="conv",
        shape=(10, 3, 3, 3),
        zeros=6 * 3 * 9,
        total=270,
        pruned_kernels=18,
        dead_outputs=dead_rows(model[0]),
        selected=True,
    )


def dead_rows(conv: nn.Module) -> int:
    return int((~effective_weight(conv).flatten(1).any(1)).sum())


@pytest.mark.parametrize("removed", [False, True])
def test_counts_of_torchs_own_pruning(removed):
    model = network()
    prune.l1_unstructured(model[5], "weight", 7)  # type: ignore[no-untyped-call]
    prune.ln_structured(model[0], "weight", 4, n=2, dim=0)  # type: ignore[no-untyped-call]
    if removed:
        prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    sparsity = measure_sparsity(model)
    assert sparsity["5"].zeros == 7
    assert (sparsity["0"].zeros, sparsity["0"].dead_outputs) == (4 * 27, 4)
    assert sparsity["0"].pruned_kernels == 12


def test_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 2, 2, bias=False), nn.Linear(3, 2))
    weight = torch.tensor([[[[0, 0], [0, 0]], [[1, 0], [0, 0]]], [[[0, 0]] * 2] * 2])
    model[0].weight.data = weight.float()
    model[1].weight.data = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    conv, linear = measure_sparsity(model).layers
    assert (conv.zeros, conv.total, conv.pruned_kernels, conv.dead_outputs) == (15, 16, 3, 1)
    assert (linear.zeros, linear.total, linear.pruned_kernels, linear.dead_outputs) == (5, 6, 0, 1)
    assert (conv.sparsity, linear.sparsity) == (15 / 16, 5 / 6)


def test_trap_08_the_stale_weight_is_not_read():
    conv: Any = window_structured(nn.Conv2d(4, 8, 3), amount=0.2)
    conv.weight_mask[:4] = False
    conv.weight_orig.data[7] = 0.0
    found = measure_sparsity(nn.Sequential(conv))["0"]
    assert found.dead_outputs == 5
    assert found.zeros == 5 * 36 + 3 * 4 * 2
    assert int((conv.weight == 0).sum()) == 8 * 4 * 2


def test_effective_weight_is_detached_and_masked():
    conv = nn.Conv2d(4, 8, 3)
    assert torch.equal(effective_weight(conv), conv.weight)
    ck_structured(conv, amount=0.5)
    assert not effective_weight(conv).requires_grad
    assert torch.equal(effective_weight(conv), conv.weight)


def test_weights_that_are_not_finite_are_no_zeros():
    model = nn.Sequential(nn.Linear(4, 4))
    model.get_parameter("0.weight").data.fill_(torch.nan)
    assert measure_sparsity(model).network == 0.0


def test_computed_weights_are_counted():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    assert [layer.total for layer in measure_sparsity(model).layers] == [108, 144]


def test_network_counts_all_layers_and_selected_those_that_are_pruned():
    model = network()
    ck_structured(model[0], amount=0.6)
    sparsity = measure_sparsity(model, selected=["0"])
    assert [layer.selected for layer in sparsity.layers] == [True, False, False, False]
    assert sparsity.selected == 162 / 270
    assert sparsity.network == 162 / (270 + 400 + 40 + 20)
    assert measure_sparsity(model).selected == sparsity.network


def test_compiled_models_have_plain_names():
    model = torch.compile(network())
    found = measure_sparsity(model)  # type: ignore[arg-type]
    assert [layer.name for layer in found.layers] == ["0", "2", "3", "5"]


def test_a_layer_is_found_by_its_name():
    sparsity = measure_sparsity(network())
    assert sparsity["3"].shape == (4, 10, 1, 1)
    with pytest.raises(KeyError, match="no convolution or linear layer '1'"):
        sparsity["1"]


def test_a_model_without_layers():
    sparsity = measure_sparsity(nn.ReLU())
    assert (sparsity.layers, sparsity.network, sparsity.selected) == ((), 0.0, 0.0)
    assert format_table(sparsity).splitlines()[0].startswith("layer")


TABLE = """\
layer         kind    shape           zeros  sparsity  pruned kernels  dead outputs
------------  ------  --------  -----------  --------  --------------  ------------
stem          conv    64x3x3x3  864 / 1,728    50.00%        96 / 192        0 / 64
head (dense)  linear  10x64         0 / 640     0.00%                        0 / 10
sparsity: 50.00% of the pruned layers' weights, 36.49% of all convolution and linear weights"""


def test_the_table():
    stem = LayerSparsity("stem", "conv", (64, 3, 3, 3), 864, 1728, 96, 0, True)
    head = LayerSparsity("head", "linear", (10, 64), 0, 640, 0, 0, False)
    assert format_table(Sparsity((stem, head))) == TABLE


def test_the_table_explains_dead_outputs_where_there_are_some():
    head = LayerSparsity("head", "linear", (10, 64), 64, 640, 0, 1, True)
    explained = "dead outputs: channels whose weights are all zero, so that their value is constant"
    assert format_table(Sparsity((head,))).splitlines()[-2] == explained


def test_the_table_ends_with_both_totals():
    model = network()
    ck_structured(model[0], amount=0.6)
    lines = format_table(measure_sparsity(model, selected=["0"])).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["0", "2", "3", "5"]
    assert lines[-1] == (
        "sparsity: 60.00% of the pruned layers' weights, "
        "22.19% of all convolution and linear weights"
    )


# What is counted


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_counted_by_their_outputs(groups):
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    with torch.no_grad():
        conv.weight[:, 1] = 0  # an output channel of each group
        conv.weight[0] = 0  # what reads an input channel
    found = measure_sparsity(nn.Sequential(conv))["0"]
    outputs = 6 // groups
    assert (found.kind, found.shape) == ("conv", (6, 4 // groups, 3, 3))
    assert found.dead_outputs == groups
    assert found.pruned_kernels == 4 + outputs - 1
    assert found.zeros == 9 * found.pruned_kernels


@pytest.mark.parametrize("own", [{}, {"kdim": 6, "vdim": 4}])
def test_the_projections_of_attention_are_counted(own):
    attention = nn.MultiheadAttention(8, 2, bias=False, **own)
    sparsity = measure_sparsity(nn.ModuleDict({"attention": attention}))
    total = sum(weight.numel() for weight in attention.parameters())
    assert sum(layer.total for layer in sparsity.layers) == total
    assert {layer.kind for layer in sparsity.layers} == {"linear"}
    assert sparsity["attention.out_proj"].shape == (8, 8)
    assert not sparsity.left_out


class Experts(nn.Module):
    """A convolution of its own kind, as timm's CondConv2d is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 216))
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))


def test_every_weight_is_counted_or_left_out_once():
    model = nn.ModuleDict(
        {
            "norm": parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False)),
            "spectral": nn.utils.spectral_norm(nn.Linear(4, 4, bias=False)),
            "experts": Experts(),
            "more": Experts(),
            "lstm": nn.LSTM(4, 5, bias=False),
            "embed": nn.Embedding(10, 8),
            "tied": nn.Embedding(10, 8),
            "head": nn.Linear(8, 10, bias=False),
            "bilinear": nn.Bilinear(3, 4, 5, bias=False),
        }
    )
    head: Any = model["head"]
    head.weight = model["tied"].weight
    prune.l1_unstructured(model["embed"], "weight", 7)  # type: ignore[no-untyped-call]
    sparsity = measure_sparsity(model)
    assert [layer.name for layer in sparsity.layers] == ["norm", "spectral", "head"]
    assert {weight.name: weight.total for weight in sparsity.left_out} == {
        "experts.weight": 864,
        "more.weight": 864,
        "lstm.weight_ih_l0": 80,
        "lstm.weight_hh_l0": 100,
        "embed.weight": 80,
        "bilinear.weight": 60,
    }
    assert format_table(sparsity).endswith(
        "of all convolution and linear weights, without 1,728 weights of Experts, 180 of LSTM, "
        "80 of Embedding and 60 of Bilinear"
    )


@pytest.mark.slow
def test_timms_conditional_convolutions_are_left_out():
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10)
    sparsity = measure_sparsity(model)
    counted = sum(layer.total for layer in sparsity.layers)
    left_out = sum(weight.total for weight in sparsity.left_out)
    assert {weight.module for weight in sparsity.left_out} == {"CondConv2d"}
    assert counted + left_out == sum(w.numel() for w in model.parameters() if w.ndim > 1)
