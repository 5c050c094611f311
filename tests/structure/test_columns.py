"""Columns of linear layers that read dead channels, found by the analysis or given by a layer."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from starfire_prune import ck_structured, fc_structure_mask, fc_structured
from starfire_prune.structure.analysis import ChannelAnalysis
from tests.support.sparse_networks import NARROW, images, sparse_network


def test_columns_behind_dead_channels_of_a_vgg_are_pruned_and_count():
    model: Any = sparse_network(NARROW["vgg16_bn"], share=0.5)
    columns = ChannelAnalysis(model, images(torch.float64, 32)).zero_inputs()["3"]
    weight = model[3].weight
    assert 0 < int(columns.sum()) < len(columns)
    assert torch.equal(columns.view(-1, 4).all(1), columns.view(-1, 4).any(1))  # whole channels
    mask = fc_structure_mask(weight, 0.7, columns)
    assert not mask[:, columns].any()
    assert int((~mask).sum()) == math.floor(0.7 * weight.numel() + 0.5)
    assert mask.any(1).all()


def test_columns_of_a_resnet_are_kept():
    model: Any = sparse_network(NARROW["resnet18"], amount=0.6, share=0.0)
    analysis = ChannelAnalysis(model, images(torch.float64, 32))
    layer = analysis.run()["fc"]
    assert not analysis.zero_inputs()["fc"].any()
    assert str(layer.reason).endswith("an addition in which both sides vary")


def test_fc_structured_prunes_the_columns_of_dead_channels():
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
