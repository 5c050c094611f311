"""Packed weights of 1x1 convolutions hold each weight once, where its register tile says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from starfire_prune.sparse.pack_pointwise import PointwiseWeights, pack_pointwise
from starfire_prune.sparse.program_format import LANES

Floats = NDArray[np.float32]


@st.composite
def weights(draw: st.DrawFn) -> Floats:
    """Sparse weights, some of them with masks that neighbouring output channels share."""
    channels, inputs, shared = draw(
        st.tuples(*[st.integers(1, 150)] * 2, st.sampled_from([1, 2, 4]))
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    kept = (random.random((channels, inputs)) < density)[np.arange(channels) // shared]
    weight: Floats = (random.standard_normal(kept.shape) * kept).astype(np.float32)
    return weight


def unpacked(packed: PointwiseWeights, shape: tuple[int, int], vectors: int) -> Floats:
    """The weight that the register tiles describe, by plain loops; each entry must be unique."""
    outputs = packed.outputs_per_list * packed.index_lists
    filled = [-(-size // part) * part for size, part in zip(shape, packed[3:5], strict=True)]
    weight = np.zeros(filled, np.float32)
    input_tiles = filled[1] // packed.input_tile_size
    tiles_per_pair = packed.output_tile_size // outputs
    indices = packed.indices.reshape(-1, packed.index_lists)
    values = packed.weights.reshape(-1, outputs)
    for number, (channels, count, start) in enumerate(packed.tiles.tolist()):
        output_tile, input_tile = divmod(number // tiles_per_pair, input_tiles)
        for entry in range(start, start + count):
            for lane in range(outputs):
                index, left = divmod(int(indices[entry, lane % packed.index_lists]), vectors)
                assert left == 0
                row = output_tile * packed.output_tile_size + channels[lane]
                at = row, input_tile * packed.input_tile_size + index
                value = values[entry, lane]
                assert value == 0 or weight[at] == 0
                weight[at] += value
    return weight


@pytest.mark.parametrize("tile", [16, 64, 112])
@settings(max_examples=30)
@given(weight=weights())
def test_register_tiles_hold_each_weight_once(tile, weight):
    packed = pack_pointwise(weight, tile)
    found = unpacked(packed, weight.shape, tile // LANES)
    rows, columns = weight.shape
    assert np.array_equal(found[:rows, :columns], weight)
    assert np.count_nonzero(found) == np.count_nonzero(weight)


@settings(max_examples=30)
@given(weight=weights())
def test_register_tiles_are_sorted_from_long_to_short(weight):
    packed = pack_pointwise(weight, 64)
    counts, starts = packed.tiles["count"], packed.tiles["start"]
    assert np.array_equal(starts, counts.cumsum() - counts)
    assert counts.sum() * packed.index_lists == len(packed.indices)
    outputs = packed.outputs_per_list * packed.index_lists
    pairs = counts.reshape(-1, packed.output_tile_size // outputs)
    assert (np.diff(pairs, axis=1) <= 0).all()


def test_two_index_lists_are_side_by_side_and_padded_with_zeros():
    weight = np.array([[0, 2, 0, 0], [3, 0, 4, 5], [0, 0, 0, 6]], np.float32)
    packed = pack_pointwise(weight, 112)
    sizes = (packed.index_lists, packed.outputs_per_list, packed.output_tile_size)
    assert sizes == (2, 1, 4)
    assert packed.tiles["channel"].tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    assert packed.tiles[["count", "start"]].tolist() == [(3, 0), (1, 3)]
    assert packed.indices.tolist() == [0, 7, 14, 0, 21, 0, 21, 0]
    assert packed.weights.tolist() == [3, 2, 4, 0, 5, 0, 6, 0]


def test_similar_neighbours_share_one_index_list():
    weight = np.array([[0, 2, 0, 0], [0, 3, 0, 0], [1, 0, 4, 0], [5, 0, 6, 0]], np.float32)
    packed = pack_pointwise(weight, 112)
    sizes = (packed.index_lists, packed.outputs_per_list, packed.output_tile_size)
    assert sizes == (1, 2, 4)
    assert packed.tiles["channel"].tolist() == [[2, 3, 0, 0], [0, 1, 0, 0]]
    assert packed.tiles[["count", "start"]].tolist() == [(2, 0), (1, 2)]
    assert packed.indices.tolist() == [0, 14, 7]
    assert packed.weights.tolist() == [1, 5, 4, 6, 2, 3]
