"""Which layers are pruned, how each of them is, and what is refused."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from starfire_prune import Pruner, ck_structured, masks
from starfire_prune.engine.selection import PrunedLayer, select_layers
from starfire_prune.engine.settings import Pruning, parse_pruning
from starfire_prune.methods.conv import CKStructured, InterStructured
from starfire_prune.methods.linear import FCBlock, FCFine
from starfire_prune.methods.schedules import linear
from starfire_prune.utils.modules import clean_name, layer_weight, prunable_layers, unwrap
from starfire_prune.utils.settings import RecipeError


class Block(nn.Module):
    """An inverted residual: 1x1, depthwise 3x3, 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.project = nn.Conv2d(16, 8, 1)


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "bn": nn.BatchNorm2d(8),
            "block": Block(),
            "grouped": nn.Conv2d(8, 12, 3, groups=2),
            "up": nn.ConvTranspose2d(12, 12, 2),
            "line": nn.Conv1d(12, 6, 5),
            "volume": nn.Conv3d(6, 6, 2),
            "hidden": nn.Linear(12, 16),
            "head": nn.Linear(16, 10),
        }
    )


ALL = [
    "stem",
    "block.expand",
    "block.depthwise",
    "block.project",
    "grouped",
    "line",
    "volume",
    "hidden",
    "head",
]
DEFAULT = [name for name in ALL if name != "block.depthwise"]


def settings(**own: object) -> Pruning:
    return parse_pruning({"method": "ck", "amount": 0.5, "era": [0, 1], **own})


def select(model: nn.Module | None = None, **own: object) -> dict[str, PrunedLayer]:
    layers = select_layers(network() if model is None else model, settings(**own)).layers
    return {layer.name: layer for layer in layers}


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# Selection


def test_all_but_depthwise_and_transposed_convolutions_are_selected():
    assert list(select()) == DEFAULT
    assert list(prunable_layers(network())) == ALL


def test_depthwise_convolutions_of_a_timm_model_are_left_out():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv2_100", num_classes=10)
    selected = select(model)
    depthwise = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels
    }
    assert len(depthwise) == 17
    assert set(selected) == set(prunable_layers(model)) - depthwise
    assert {"conv_stem", "classifier"} <= set(selected)


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("stem", (), ["stem"]),
        (["*e*"], ["head", "block.*"], ["stem", "grouped", "line", "volume", "hidden"]),
        ("*", ["block*", "h*"], ["stem", "grouped", "line", "volume"]),
        (["block.[ep]*"], (), ["block.expand", "block.project"]),
        (["stem", "stem"], (), ["stem"]),
        (["STEM", "line"], (), None),
    ],
)
def test_include_and_exclude_are_globs(include, exclude, names):
    if names is None:
        with pytest.raises(ValueError, match="the pattern 'STEM' matches no convolution"):
            select(include=include, exclude=exclude)
    else:
        assert list(select(include=include, exclude=exclude)) == names


@pytest.mark.parametrize("include", ["block.depthwise", "*depth*", ["*", "block.*"]])
def test_an_include_that_names_a_depthwise_convolution_selects_it_with_the_layer_as_scope(include):
    layer = select(include=include)["block.depthwise"]
    assert vars(layer.method)["scope"] == "layer"
    assert layer.method_at(1.0).counts(layer_weight(layer.module).shape) == ((8, 16),)


def test_exclude_wins_over_include():
    assert "block.depthwise" not in select(include=["block.*"], exclude=["*.depthwise"])


def test_a_depthwise_convolution_is_pruned_by_its_kernels():
    conv = nn.Conv2d(8, 8, 3, groups=8)
    model = nn.Sequential(conv)
    pruner = Pruner(model, settings(include="0"), updates_per_epoch=1)
    pruner.step()
    assert pruner.sparsity()["0"].pruned_kernels == 4


def test_fc_none_leaves_linear_layers_dense():
    assert [name for name in DEFAULT if name not in ("hidden", "head")] == list(select(fc="none"))


def test_pointwise_none_leaves_1x1_convolutions_dense():
    names = select(method="window", pointwise="none")
    assert [name for name in DEFAULT if not name.startswith("block")] == list(names)


def test_the_order_is_the_models():
    assert list(select(include=["head", "line", "stem"])) == ["stem", "line", "head"]


def test_names_and_modules_are_those_inside_wrappers():
    inner: Any = network()
    inner.stem = torch.compile(inner.stem)
    wrapped: Any = nn.DataParallel(torch.compile(inner))
    assert unwrap(wrapped) is inner
    assert list(select(wrapped)) == DEFAULT
    assert clean_name("_orig_mod.layer1._orig_mod.conv") == "layer1.conv"
    assert clean_name("_orig_mod") == ""


# Methods, amounts and options


def test_methods_of_each_kind_of_layer():
    methods = {name: layer.method_name for name, layer in select(method="window").items()}
    assert methods == {
        "stem": "window",
        "block.expand": "ck",
        "block.project": "ck",
        "grouped": "window",
        "line": "window",
        "volume": "window",
        "hidden": "fine",
        "head": "fine",
    }


def test_inter_prunes_1x1_kernels_by_ck_to_the_whole_amount():
    layer = select(method="inter")["block.expand"]
    assert layer.method_name == "ck"
    assert [layer.method_at(progress).amount for progress in (1.0, 0.5)] == [0.5, 0.25]


def test_groups_reach_the_methods_of_kernels():
    layers = select()
    assert [vars(layers[name].method)["groups"] for name in ("grouped", "stem")] == [2, 1]
    assert layers["grouped"].method_at(1.0).counts(torch.Size([12, 4, 3, 3])) == ((3, 6),)


def test_linear_layers_have_the_amount_of_fc_or_else_of_pruning():
    assert select()["head"].amount == 0.5
    assert select(fc={"amount": 0.9})["head"].amount == 0.9
    assert select(fc={"amount": 0.9})["stem"].amount == 0.5
    block = select(fc={"method": "block", "block_size": [2, 2]})["head"]
    method = block.method_at(1.0)
    assert isinstance(method, FCBlock)
    assert method.block_size == (2, 2)


def test_of_several_overrides_the_last_match_wins():
    layers = select(
        overrides=[
            {"layers": "block.*", "amount": 0.2, "method": "magnitude"},
            {"layers": ["block.project", "head"], "amount": 0.3},
        ]
    )
    found = {name: (layer.method_name, layer.amount) for name, layer in layers.items()}
    assert found["block.expand"] == ("magnitude", 0.2)
    assert found["block.project"] == ("ck", 0.3)
    assert found["head"] == ("fine", 0.3)
    assert found["stem"] == ("ck", 0.5)


def test_an_override_of_the_scope_of_one_layer():
    layers = select(overrides=[{"layers": "stem", "scope": "layer"}])
    assert [vars(layers[name].method)["scope"] for name in ("stem", "line")] == ["layer", "channel"]


def test_an_override_lifts_or_sets_pointwise_none():
    lifted = select(
        method="window", pointwise="none", overrides=[{"layers": "block.expand", "pointwise": "ck"}]
    )
    assert [name for name in lifted if name.startswith("block")] == ["block.expand"]
    by_method = select(
        method="window", pointwise="none", overrides=[{"layers": "block.*", "method": "ck"}]
    )
    assert [name for name in by_method if name.startswith("block")] == [
        "block.expand",
        "block.project",
    ]
    left = select(method="window", overrides=[{"layers": "block.expand", "pointwise": "none"}])
    assert [name for name in left if name.startswith("block")] == ["block.project"]


def test_max_nonzero_counts_other_things_in_another_method_and_stays_behind():
    layers = select(
        method="window",
        max_nonzero=4,
        overrides=[
            {"layers": "line", "method": "ck"},
            {"layers": "grouped", "method": "ck", "max_nonzero": 3},
            {"layers": "volume", "amount": 0.2},
        ],
    )
    found = {name: vars(layer.method).get("max_nonzero") for name, layer in layers.items()}
    assert found == {
        "stem": 4,
        "block.expand": None,
        "block.project": None,
        "grouped": 3,
        "line": None,
        "volume": 4,
        "hidden": None,
        "head": None,
    }


def test_max_nonzero_reaches_the_method_with_the_target():
    layer = select(max_nonzero=3)["stem"]
    methods = [layer.method_at(progress) for progress in (0.5, 0.999, 1.0)]
    assert all(isinstance(method, CKStructured) for method in methods)
    assert [vars(method)["max_nonzero"] for method in methods] == [None, None, 3]


def test_random_layers_have_seeds_of_their_own():
    seeds = [vars(layer.method)["seed"] for layer in select(method="random", fc="none").values()]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("schedule", "half"), [("linear", 0.25), ("cubic", 0.4375), ("cosine", 0.25)]
)
def test_amount_follows_the_schedule(schedule, half):
    layer = select(schedule=schedule)["stem"]
    found = [layer.method_at(progress).amount for progress in (0.0, 1.0, 0.5)]
    assert found == [0.0, 0.5, pytest.approx(half)]


def test_inter_rises_to_the_kernel_amount_and_then_to_the_whole():
    layer = select(method="inter", amount=0.6, ck_fraction_of_era=0.25, window_fraction=0.5)["stem"]
    kernels = (0.6 - 0.3) / (1 - 0.3)
    found = [layer.method_at(progress).amount for progress in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert found == pytest.approx([0.0, kernels / 2, kernels, (kernels + 0.6) / 2, 0.6])
    assert found[-1] == 0.6
    methods = [layer.method_at(progress) for progress in (0.0, 0.25, 0.2501, 1.0)]
    assert [vars(method)["kernels_only"] for method in methods] == [True, True, False, False]


@pytest.mark.parametrize("progress", [0.7, 1.0])
def test_inter_completes_ck_before_it_prunes_inside_kernels(progress):
    weight = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    method = InterStructured(0.4, window_fraction=0.625).at(progress, linear)
    kernels = masks.ck_mask(weight, masks.intra_shares(0.4, 0.625)[1])
    amount = method.amount
    expected = masks.window_mask(weight, amount, mask=kernels, exact_layer_sparsity=True)
    assert torch.equal(method.compute_mask(weight, None), expected)


def test_fine_is_the_linear_default():
    assert isinstance(select()["head"].method_at(1.0), FCFine)


def test_layer_weight_is_the_parameter_itself():
    conv = nn.Conv2d(4, 8, 3)
    weight = conv.weight
    assert layer_weight(conv) is weight
    ck_structured(conv, amount=0.5)
    assert layer_weight(conv) is weight


# Refusals


@pytest.mark.parametrize(
    ("own", "key"),
    [
        ({"include": ["stme"]}, "pruning.include"),
        ({"exclude": ["stme"]}, "pruning.exclude"),
        ({"overrides": [{"layers": "stme", "amount": 0.1}]}, "pruning.overrides.0.layers"),
        (
            {
                "overrides": [
                    {"layers": "h*", "amount": 0.1},
                    {"layers": ["stem", "stme"], "amount": 0.2},
                ]
            },
            "pruning.overrides.1.layers",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(own, key):
    message = re.escape(f"{key}: the pattern 'stme' matches no convolution") + ".*; nearest: stem"
    with pytest.raises(ValueError, match=f"^{message}"):
        select(**own)


@pytest.mark.parametrize("pattern", ["up", "bn"])
def test_a_layer_of_another_kind_is_no_match(pattern):
    message = rf"^pruning.include: the pattern '{pattern}' matches no convolution \(transposed"
    with pytest.raises(ValueError, match=message):
        select(include=["stem", pattern])


def test_a_pattern_for_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match=r"nearest: it has none$"):
        select(nn.BatchNorm2d(3), include="conv")


@pytest.mark.parametrize(
    ("own", "pattern"),
    [
        ({"exclude": "stem"}, "stem"),
        ({"include": "head"}, "stem"),
        ({"fc": "none"}, "head"),
        ({}, "*.depthwise"),
        ({"method": "window", "pointwise": "none"}, "block.project"),
    ],
)
def test_an_override_of_layers_that_are_not_selected_is_refused(own, pattern):
    with refused(
        f"pruning.overrides.0.layers: the pattern {pattern!r} matches only layers that are not "
        f"selected (`exclude`, `fc: none`, `pointwise: none`, or depthwise): select them by "
        f"`include`, or drop it"
    ):
        select(**own, overrides=[{"layers": pattern, "amount": 0.2}])


@pytest.mark.parametrize(
    ("layer", "kind", "method", "fitting"),
    [
        ("head", "Linear", "ck", "fine, block, dead_inputs, magnitude, random"),
        ("head", "Linear", "window", "fine, block, dead_inputs, magnitude, random"),
        ("stem", "Conv2d", "fine", "window, ck, intra, inter, magnitude, random, filter"),
        ("line", "Conv1d", "block", "window, ck, intra, inter, magnitude, random, filter"),
    ],
)
def test_a_method_of_another_kind_of_layer_is_refused(layer, kind, method, fitting):
    with refused(f"layer {layer} ({kind}) can't be pruned by {method}: give it one of {fitting}"):
        select(overrides=[{"layers": layer, "method": method}])


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        ((2, 4, 3, 3), {"method": "ck", "amount": 0.8}),
        ((8, 4, 3, 3), {"method": "window", "amount": 0.95}),
        ((8, 4, 3, 3), {"method": "window", "amount": 1.0, "exact_layer_sparsity": True}),
        ((4, 4, 3, 3), {"method": "intra", "amount": 0.95}),
        ((4, 4, 3, 3), {"method": "inter", "amount": 0.95}),
        ((8, 4, 3, 3), {"method": "magnitude", "amount": 1.0}),
        ((8, 4, 3, 3), {"method": "random", "amount": 1.0}),
        ((4, 4, 3, 3), {"method": "filter", "amount": 0.9}),
    ],
)
def test_a_layer_that_would_be_emptied_is_refused_with_its_name(shape, own):
    model = nn.ModuleDict({"fine": nn.Linear(8, 4), "small": nn.Conv2d(shape[1], shape[0], 3)})
    with refused(
        f"layer small of shape {shape} would lose all its weights by {own['method']} at amount "
        f"{own['amount']}: lower its amount by an override, or leave it out by `exclude`"
    ):
        select(model, include=["*", "small"], **own)
    assert list(select(model, fc={"amount": 0.5}, **own)) == ["fine"]


@pytest.mark.parametrize(("method", "zeros"), [("fine", 28), ("block", 16)])
def test_a_linear_layer_is_never_emptied(method, zeros):
    model = nn.Sequential(nn.Linear(8, 4))
    pruner = Pruner(model, settings(amount=1.0, fc={"method": method}), updates_per_epoch=1)
    pruner.step()
    assert (pruner.sparsity()["0"].dead_outputs, pruner.sparsity()["0"].zeros) == (0, zeros)


def test_a_convolution_of_one_output_channel_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3))
    with pytest.raises(
        ValueError, match=r"^layer 1 of shape \(1, 8, 3, 3\) can't .*by ck: "
    ) as info:
        select(model, include=["0", "1"])
    assert 'use scope="layer"' in str(info.value)
    assert str(info.value).endswith("; or leave it out by `exclude`")
    assert list(select(model)) == ["0"]
    layer = select(model, overrides=[{"layers": "1", "scope": "layer"}])["1"]
    assert layer.method_at(1.0).counts(torch.Size([1, 8, 3, 3])) == ((4, 8),)


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    message = (
        "layer {} shares its weight with {}, where its mask would not hold: leave them out by "
        "`exclude`"
    )
    with refused(f"{message.format(0, 2)}\n{message.format(2, 0)}"):
        select(model, include="?")
    with refused(message.format(2, 0)):
        select(model, include=["*", "2"], exclude="0")
    assert list(select(model)) == ["1"]


def test_a_weight_shared_with_an_embedding_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"^layer head shares its weight with embed, "):
        select(model)


def test_a_module_used_twice_is_one_layer():
    conv = nn.Conv2d(4, 4, 3)
    assert list(select(nn.Sequential(conv, nn.ReLU(), conv))) == ["0"]


def test_the_projection_of_torchs_attention_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)})
    message = "^layer attention.out_proj is the output projection of nn.MultiheadAttention, which"
    with pytest.raises(ValueError, match=message):
        select(model, include=["*", "*.out_proj"])
    assert list(select(model)) == ["head"]


def test_computed_and_missing_weights_are_refused_with_the_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    with refused(
        "layer 0: ParametrizedConv2d has no parameter `weight` to prune; leave it out by `exclude`"
    ):
        select(model, include=["0", "1"])
    assert list(select(model)) == ["1"]
    with refused("layer 0 has no values yet: run a forward pass first"):
        select(nn.Sequential(nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize(
    ("model", "own"),
    [
        (nn.Sequential(nn.BatchNorm2d(4)), {}),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), {}),
        (nn.Sequential(nn.Linear(4, 4)), {"fc": "none"}),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), {}),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), {"method": "window", "pointwise": "none"}),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), {"exclude": "*"}),
    ],
)
def test_a_selection_of_nothing_is_refused(model, own):
    message = "^pruning selects no layer: the model has no convolution or linear layer that"
    with pytest.raises(ValueError, match=message):
        select(model, **own)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"inclued": "stem"}, "pruning: inclued: unknown key"),
        ({"fc": {"metod": "fine"}}, "pruning: fc.metod: unknown key"),
        ({"overrides": [{"layer": "stem"}]}, "pruning: overrides.0.layer: unknown key"),
        ({"amount": 60}, "pruning: amount: must be a float above 0 and at most 1"),
    ],
)
def test_unknown_keys_and_wrong_values_are_recipe_errors(own, line):
    with pytest.raises(RecipeError, match=re.escape(line)):
        select(**own)


def test_a_refusal_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match="layer 1"):
        Pruner(model, settings(include="?"), updates_per_epoch=1)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert math.isclose(sum(p.numel() for p in model.parameters()), 224 + 73)


@pytest.mark.parametrize(
    ("override", "option", "method"),
    [
        ({"layers": "head", "scope": "layer"}, "scope", "fine"),
        ({"layers": "stem", "then": "block"}, "then", "ck"),
    ],
)
def test_an_option_that_no_matched_layer_has_is_refused(override, option, method):
    with refused(
        f"pruning.overrides.0.{option} has no effect: the layers that it matches are pruned by "
        f"{method}; remove it, or give the override a method"
    ):
        select(fc={"method": "dead_inputs"} if method == "ck" else {}, overrides=[override])


def test_all_layers_that_would_be_emptied_are_reported_at_once():
    model = nn.Sequential(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3))
    message = (
        "layer {} of shape {} would lose all its weights by ck at amount 0.8: lower its amount by "
        "an override, or leave it out by `exclude`"
    )
    lines = [message.format(0, (2, 4, 3, 3)), message.format(2, (2, 8, 3, 3))]
    with refused("\n".join(lines)):
        select(model, amount=0.8, include="?")
    with refused("\n".join(lines)):  # nothing is left to prune
        select(model, amount=0.8, exclude="1")
    assert list(select(model, amount=0.8)) == ["1"]
