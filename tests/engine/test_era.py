"""The masks of the era: exact at every rise, spared in between, and complete at its end."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import Pruner
from starfire_prune.masks.baselines import filter_mask, magnitude_mask
from starfire_prune.masks.conv import ck_mask, intra_mask, window_mask
from starfire_prune.masks.counts import count
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask
from starfire_prune.methods.base import find_hook
from starfire_prune.methods.conv import CKStructured, InterStructured, WindowStructured
from tests.support.networks import (
    SmallNet,
    drift,
    equal_states,
    hook_count,
    one_epoch,
    raw_weights,
    sgd,
    train_step,
)

Settings = Mapping[str, object]

# The masks of the era

Rule = Callable[[Tensor, float, Tensor | None], Tensor]


def window(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return window_mask(weight, 0.6 * progress, mask=mask)


def window_at_most_2(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    at_most = 2 if progress == 1.0 else None
    return window_mask(weight, 0.6 * progress, mask=mask, max_nonzero=at_most)


def spread(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return window_mask(weight, 0.6 * progress, mask=mask, exact_layer_sparsity=True)


def ck(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return ck_mask(weight, 0.6 * progress, mask=mask)


def ck_at_most_2(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    at_most = 2 if progress == 1.0 else None
    return ck_mask(weight, 0.6 * progress, mask=mask, max_nonzero=at_most)


def ck_in_pairs(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return ck_mask(weight, 0.6 * progress, mask=mask, block_size=(2, 1))


def ck_in_layer(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return ck_mask(weight, 0.6 * progress, mask=mask, scope="layer")


def intra(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return intra_mask(weight, 0.6 * progress, mask=mask, window_fraction=0.4)


def inter(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    kernels = (0.6 - 0.3) / (1 - 0.3)
    if progress <= 0.25:
        return ck_mask(weight, kernels * progress / 0.25, mask=mask)
    total = kernels + (0.6 - kernels) * (progress - 0.25) / 0.75
    return window_mask(
        weight, total, mask=ck_mask(weight, kernels, mask=mask), exact_layer_sparsity=True
    )


def magnitude(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return magnitude_mask(weight, 0.6 * progress, mask=mask)


def filters(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return filter_mask(weight, 0.6 * progress, mask=mask)


def fine(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return fc_fine_mask(weight, 0.6 * progress, mask=mask)


def blocks_of_2(weight: Tensor, progress: float, mask: Tensor | None) -> Tensor:
    return fc_block_mask(weight, 0.3 * progress, mask=mask, block_size=(2, 2))


BLOCK = {"method": "block", "block_size": [2, 2], "amount": 0.3}
# id: settings, and the rules of the 3x3 convolutions, the 1x1 convolution and the linear layer
RULES: dict[str, tuple[Settings, Rule, Rule, Rule]] = {
    "window": ({"method": "window"}, window, ck, fine),
    "window-max": ({"method": "window", "max_nonzero": 2}, window_at_most_2, ck, fine),
    "window-exact_layer_sparsity": (
        {"method": "window", "exact_layer_sparsity": True, "fc": BLOCK},
        spread,
        ck,
        blocks_of_2,
    ),
    "ck": ({"method": "ck"}, ck, ck, fine),
    "ck-max": ({"method": "ck", "max_nonzero": 2}, ck_at_most_2, ck_at_most_2, fine),
    "ck-blocks": ({"method": "ck", "block_size": [2, 1]}, ck_in_pairs, ck_in_pairs, fine),
    "ck-layer": ({"method": "ck", "scope": "layer"}, ck_in_layer, ck_in_layer, fine),
    "intra": ({"method": "intra", "window_fraction": 0.4}, intra, ck, fine),
    "inter": ({"method": "inter", "ck_fraction_of_era": 0.25}, inter, ck, fine),
    "magnitude": ({"method": "magnitude"}, magnitude, magnitude, fine),
    "filter": ({"method": "filter"}, filters, filters, fine),
}


@pytest.mark.parametrize(("settings", "conv", "point", "linear"), RULES.values(), ids=RULES)
def test_every_rise_is_followed_exactly_with_resolution_0(settings, conv, point, linear):
    model, n_updates = SmallNet(), 37
    pruner = one_epoch(model, n_updates, resolution=0.0, **settings)
    rules = {"stem": conv, "body": conv, "point": point, "head": linear}
    expected: dict[str, Tensor] = {}
    for update in range(1, n_updates + 1):
        drift(model, update)
        weights = raw_weights(model)
        pruner.step()
        for name, rule in rules.items():
            expected[name] = rule(weights[name], update / n_updates, expected.get(name))
            assert torch.equal(pruner.masks()[f"{name}.weight"], expected[name]), (name, update)
    assert pruner.phase == "fixed"


@pytest.mark.parametrize("resolution", [0.0025, 0.05])
@pytest.mark.parametrize("settings", [rule[0] for rule in RULES.values()], ids=RULES)
def test_masks_lag_by_less_than_the_resolution_and_end_exact(settings, resolution):
    coarse, exact = SmallNet(), SmallNet()
    n_updates = 80
    # How far intra exceeds its total, by less than 1 / K, depends on the masks before
    excess = 1 / 8 if settings["method"] == "intra" else 0.0
    pruner = one_epoch(coarse, n_updates, resolution=resolution, **settings)
    reference = one_epoch(exact, n_updates, resolution=0.0, **settings)
    for _ in range(n_updates):
        pruner.step()
        reference.step()
        exact_masks = reference.masks()
        for name, mask in pruner.masks().items():
            lag = int(mask.sum()) - int(exact_masks[name].sum())
            assert lag < (resolution + excess) * mask.numel()
    assert excess or pruner.mask_hash() == reference.mask_hash()


@pytest.mark.parametrize("resolution", [0.0, 0.0025])
def test_a_layer_whose_count_has_not_risen_is_skipped(monkeypatch, resolution):
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    calls = []
    compute_mask = CKStructured.compute_mask

    def counted(self, t, default_mask):
        calls.append(self.amount)
        return compute_mask(self, t, default_mask)

    monkeypatch.setattr(CKStructured, "compute_mask", counted)
    pruner = one_epoch(model, 100, method="ck", amount=0.5, resolution=resolution)
    for _ in range(100):
        pruner.step()
    # The first update, where 1, 2, 3 and 4 of 8 kernels round up to be gone, and the last
    assert calls == pytest.approx([0.005, 0.065, 0.19, 0.315, 0.44, 0.5])


def test_the_resolution_spares_masks(monkeypatch):
    calls = []
    compute_mask = WindowStructured.compute_mask

    def counted(self, t, default_mask):
        calls.append(self.amount)
        return compute_mask(self, t, default_mask)

    monkeypatch.setattr(WindowStructured, "compute_mask", counted)
    model = nn.Sequential(nn.Conv2d(10, 10, (10, 1)))
    pruner = one_epoch(
        model, 500, method="window", exact_layer_sparsity=True, amount=0.5, resolution=0.05
    )
    for _ in range(500):
        pruner.step()
    assert len(calls) == 11


# The masks at the era's end

UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "weights of a kernel": lambda mask: (~mask).sum((2, 3)),
    "kernels of a channel": lambda mask: (~mask.any(3).any(2)).sum(0),
    "kernels": lambda mask: (~mask.any(3).any(2)).sum(),
    "blocks of a channel": lambda mask: (
        ~mask.view(-1, 4, *mask.shape[1:]).any(4).any(3).any(1)
    ).sum(0),
    "filters": lambda mask: (~mask.flatten(1).any(1)).sum(),
    "weights": lambda mask: (~mask).sum(),
    "blocks": lambda mask: (~mask.view(5, 2, 4, 2).any(3).any(1)).sum(),
}
# 60 % of stem 8x3x3x3, body 12x8x3x3, point 8x12x1x1 and head 10x8: settings, layer, unit, number
COUNTS: list[tuple[Settings, str, str, int]] = [
    ({"method": "window"}, "stem", "weights of a kernel", 5),
    ({"method": "window"}, "body", "weights of a kernel", 5),
    ({"method": "window"}, "point", "kernels of a channel", 5),
    ({"method": "window"}, "head", "weights", 48),
    ({"method": "window", "max_nonzero": 3}, "body", "weights of a kernel", 6),
    ({"method": "window", "max_nonzero": 5}, "body", "weights of a kernel", 5),
    ({"method": "window", "max_nonzero": 3}, "point", "kernels of a channel", 5),
    ({"method": "window", "exact_layer_sparsity": True}, "stem", "weights", 130),
    ({"method": "window", "exact_layer_sparsity": True}, "body", "weights", 518),
    ({"method": "window", "scope": "layer"}, "point", "kernels", 58),
    ({"method": "ck"}, "stem", "kernels of a channel", 5),
    ({"method": "ck"}, "body", "kernels of a channel", 7),
    ({"method": "ck"}, "point", "kernels of a channel", 5),
    ({"method": "ck"}, "head", "weights", 48),
    ({"method": "ck", "max_nonzero": 2}, "body", "kernels of a channel", 10),
    ({"method": "ck", "block_size": [4, 1]}, "stem", "blocks of a channel", 1),
    ({"method": "ck", "block_size": [4, 1]}, "stem", "kernels of a channel", 4),
    ({"method": "ck", "block_size": [4, 1]}, "body", "blocks of a channel", 2),
    ({"method": "ck", "scope": "layer"}, "body", "kernels", 58),
    ({"method": "intra"}, "stem", "kernels of a channel", 3),
    ({"method": "intra"}, "body", "kernels of a channel", 5),
    ({"method": "intra"}, "point", "kernels of a channel", 5),
    ({"method": "inter"}, "stem", "kernels of a channel", 3),
    ({"method": "inter"}, "body", "kernels of a channel", 5),
    ({"method": "inter"}, "point", "kernels of a channel", 5),
    ({"method": "inter"}, "stem", "weights", 130),
    ({"method": "inter"}, "body", "weights", 518),
    ({"method": "magnitude"}, "body", "weights", 518),
    ({"method": "magnitude"}, "point", "weights", 58),
    ({"method": "random"}, "body", "weights", 518),
    ({"method": "filter"}, "stem", "filters", 5),
    ({"method": "filter"}, "body", "filters", 7),
    ({"method": "filter"}, "point", "filters", 5),
    ({"method": "ck", "fc": {"method": "fine", "amount": 0.3}}, "head", "weights", 24),
    ({"method": "ck", "fc": {"method": "block", "block_size": [2, 2]}}, "head", "blocks", 12),
    ({"method": "ck", "fc": {"method": "random"}}, "head", "weights", 48),
    ({"method": "ck", "fc": {"method": "magnitude"}}, "head", "weights", 48),
]


@pytest.mark.parametrize(
    ("settings", "layer", "unit", "number"),
    COUNTS,
    ids=[f"{'-'.join(map(str, row[0].values()))}-{row[1]}-{row[2]}" for row in COUNTS],
)
def test_final_count_of_each_scope(settings, layer, unit, number):
    model = SmallNet()
    pruner = one_epoch(model, 30, **settings)
    for update in range(30):
        drift(model, update)
        pruner.step()
    gone = UNITS[unit](pruner.masks()[f"{layer}.weight"])
    assert set(gone.flatten().tolist()) == {number}


def test_intra_exceeds_its_total_by_less_than_a_share_of_an_output_channel():
    model = SmallNet()
    pruner = one_epoch(model, 30, method="intra", resolution=0.0)
    for update in range(30):
        drift(model, update)
        pruner.step()
    sparsity = pruner.sparsity()
    assert 518 <= sparsity["body"].zeros < 518 + 864 / 12
    assert 130 <= sparsity["stem"].zeros < 130 + 216 / 8


@pytest.mark.parametrize(("settings", "pruned"), [({"pointwise": "none"}, 3), ({"fc": "none"}, 3)])
def test_layers_left_dense_have_no_hook_and_no_mask(settings, pruned):
    model = SmallNet()
    pruner = one_epoch(model, 2, method="window", **settings)
    pruner.step()
    assert len(pruner.masks()) == hook_count(model) == pruned


@pytest.mark.parametrize("method", ["window", "ck"])
def test_max_nonzero_holds_at_the_last_update_alone(method):
    model, plain = SmallNet(), SmallNet()
    pruner = one_epoch(model, 10, method=method, max_nonzero=1)
    without = one_epoch(plain, 10, method=method)
    for _ in range(9):
        pruner.step()
        without.step()
        assert pruner.mask_hash() == without.mask_hash()
    pruner.step()
    without.step()
    assert pruner.sparsity()["body"].zeros > without.sparsity()["body"].zeros
    assert pruner.sparsity()["body"].zeros == {"window": 96 * 8, "ck": 8 * 11 * 9}[method]


def test_random_masks_differ_between_layers_and_seeds_and_repeat():
    def masks(seed: int) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3))
        pruner = one_epoch(model, 1, method="random", seed=seed)
        pruner.step()
        return pruner.masks()

    one, again, other = masks(1), masks(1), masks(2)
    assert equal_states(one, again)
    assert not torch.equal(one["0.weight"], one["1.weight"])
    assert not torch.equal(one["0.weight"], other["0.weight"])


# Inter-epoch pruning


@pytest.mark.parametrize("n_updates", [1, 7, 10])
def test_inter_prunes_kernels_in_the_first_part_of_the_era_and_weights_in_the_rest(n_updates):
    conv = SmallNet().body
    pruner = Pruner(
        nn.Sequential(conv),
        {"method": "inter", "amount": 0.6, "ck_fraction_of_era": 0.5, "era": [0, 1]},
        updates_per_epoch=n_updates,
    )
    kernels = (0.6 - 0.3) / (1 - 0.3)
    for update in range(1, n_updates + 1):
        pruner.step()
        mask, progress = pruner.masks()["0.weight"], update / n_updates
        gone = (~mask.any(3).any(2)).sum(0)
        first = count(kernels * min(1.0, progress / 0.5), 12)
        assert gone.tolist() == [first] * 8
        if progress <= 0.5:
            assert int((~mask).sum()) == 9 * 8 * first
    assert int((~mask).sum()) == 518


def test_inter_has_one_hook():
    model = SmallNet()
    pruner = one_epoch(model, 20, method="inter")
    for update in range(19):
        drift(model, update)
        pruner.step()
    assert len(model.body._forward_pre_hooks) == 1
    assert isinstance(find_hook(model.body, "weight")[1], InterStructured)
    train_step(model, sgd(model), 0)
    pruner.step()
    assert hook_count(model) == 0
    pruner.check()
