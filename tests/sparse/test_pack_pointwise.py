"""Weights of 1x1 convolutions as the kernels read them: each once, where its unit says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from starfire_prune.sparse.layout import LANES
from starfire_prune.sparse.pack_pointwise import PointWeights, pack_point

Floats = NDArray[np.float32]


@st.composite
def weights(draw: st.DrawFn) -> Floats:
    """Sparse ones, some of them with masks that neighbouring output channels share."""
    channels, inputs, group = draw(
        st.tuples(*[st.integers(1, 150)] * 2, st.sampled_from([1, 2, 4]))
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    kept = (random.random((channels, inputs)) < density)[np.arange(channels) // group]
    weight: Floats = (random.standard_normal(kept.shape) * kept).astype(np.float32)
    return weight


def unpacked(packed: PointWeights, shape: tuple[int, int], vectors: int) -> Floats:
    """The weight that the units stand for, by plain loops; fails where two entries are for one."""
    outputs = packed.shared * packed.lists
    filled = [-(-size // part) * part for size, part in zip(shape, packed[3:5], strict=True)]
    weight = np.zeros(filled, np.float32)
    blocks = filled[1] // packed.block
    units_a_part = packed.chunk // outputs
    indices = packed.indices.reshape(-1, packed.lists)
    values = packed.weights.reshape(-1, outputs)
    for number, (channels, count, start) in enumerate(packed.units.tolist()):
        chunk, block = divmod(number // units_a_part, blocks)
        for entry in range(start, start + count):
            for lane in range(outputs):
                index, left = divmod(int(indices[entry, lane % packed.lists]), vectors)
                assert left == 0
                at = chunk * packed.chunk + channels[lane], block * packed.block + index
                value = values[entry, lane]
                assert value == 0 or weight[at] == 0
                weight[at] += value
    return weight


@pytest.mark.parametrize("tile", [16, 64, 112])
@settings(max_examples=30)
@given(weight=weights())
def test_units_hold_each_weight_once(tile, weight):
    packed = pack_point(weight, tile)
    found = unpacked(packed, weight.shape, tile // LANES)
    rows, columns = weight.shape
    assert np.array_equal(found[:rows, :columns], weight)
    assert np.count_nonzero(found) == np.count_nonzero(weight)


@settings(max_examples=30)
@given(weight=weights())
def test_units_follow_each_other_from_long_to_short(weight):
    packed = pack_point(weight, 64)
    counts, starts = packed.units["count"], packed.units["start"]
    assert np.array_equal(starts, counts.cumsum() - counts)
    assert counts.sum() * packed.lists == len(packed.indices)
    parts = counts.reshape(-1, packed.chunk // (packed.shared * packed.lists))
    assert (np.diff(parts, axis=1) <= 0).all()


def test_two_lists_are_side_by_side_and_end_in_zeros():
    weight = np.array([[0, 2, 0, 0], [3, 0, 4, 5], [0, 0, 0, 6]], np.float32)
    packed = pack_point(weight, 112)
    assert (packed.lists, packed.shared, packed.chunk) == (2, 1, 4)
    assert packed.units["channel"].tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    assert packed.units[["count", "start"]].tolist() == [(3, 0), (1, 3)]
    assert packed.indices.tolist() == [0, 7, 14, 0, 21, 0, 21, 0]
    assert packed.weights.tolist() == [3, 2, 4, 0, 5, 0, 6, 0]


def test_neighbours_alike_share_one_list():
    weight = np.array([[0, 2, 0, 0], [0, 3, 0, 0], [1, 0, 4, 0], [5, 0, 6, 0]], np.float32)
    packed = pack_point(weight, 112)
    assert (packed.lists, packed.shared, packed.chunk) == (1, 2, 4)
    assert packed.units["channel"].tolist() == [[2, 3, 0, 0], [0, 1, 0, 0]]
    assert packed.units[["count", "start"]].tolist() == [(2, 0), (1, 2)]
    assert packed.indices.tolist() == [0, 14, 7]
    assert packed.weights.tolist() == [1, 5, 4, 6, 2, 3]
