// The checks of the operations on quantized values, whose channels are quads.

#include <algorithm>

#include "checks.h"

namespace starfire {
namespace {

Wide quads(Wide channels) { return ceil_div(channels, 4); }

void check(Checker& checker, const Quantize& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(destination.channels == quads(source.channels), "it has another number of quads");
  require_same_size(source, destination);
  require_small_number(o.zero_point, "zero_point");
  require_segments(destination, 1, LANES * 64);
  checker.reads_rows(o.source, LANES - 1);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const Dequantize& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.channels == quads(destination.channels), "it has another number of quads");
  require_same_size(source, destination);
  require_segments(destination, 1, LANES * 64);
  checker.reads_rows(o.source, LANES - 1);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const ByteCopy& o) {
  check_strided_copy(checker, o.source, o.destination, o.stride_h, o.stride_w);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const BytePool& o) {
  check_pool(checker, o.source, o.destination, o.offsets_at, o.count, o.step);
  checker.writes(o.destination, {o.source});
}

// The destination of `channels` output channels, whose scales and shifts are read for `padded` ones.
template <class Operation>
void check_results(Checker& checker, const Operation& o, int64_t destination, int64_t channels,
                   int64_t shift_at, Wide padded) {
  require_range(o.to_bytes, FLOATS, SATURATED_BYTES, "to_bytes");
  Wide stored = o.to_bytes == FLOATS ? Wide{channels} : quads(channels);
  require(checker.view(destination).channels == stored, "channels are not those of the destination");
  checker.array<float>(o.scale_at, padded, "scales");
  checker.array<float>(shift_at, padded, "shifts");
}

void check_quad_tile(Checker& checker, const BytePointwise& o, const QuadTile& tile,
                     int64_t input_tile) {
  const View& source = checker.view(o.source);
  require_range(tile.indices, 0, MAX_FIELD, "the indices of a tile");
  require_range(tile.weights, 0, MAX_FIELD, "the weights of a tile");
  Wide count = 0;
  for (int j = 0; j < (tile.shared ? 1 : 4); ++j) {
    require(tile.counts[j] >= 0, "a count is negative");
    require(tile.shared || tile.counts[j] % 2 == 0, "a count is odd");
    count += tile.counts[j];
  }
  Wide weights = tile.shared ? 4 * count : count;
  const auto* indices = checker.array<uint16_t>(o.indices_at, tile.indices + count, "indices");
  checker.array<float>(o.weights_at, tile.weights + weights, "weights");
  checker.count_entries(2 * count + 4 * weights);
  Wide channels = source.channels - Wide{input_tile} * o.input_tile_size;
  check_indices(source, indices + tile.indices, count, channels);
}

void check(Checker& checker, const BytePointwise& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  check_tiled(checker, o.source, o.destination);
  require_range(o.channels, 1, MAX_FIELD, "channels");
  require_range(o.output_tile_size, 4, MAX_OUTPUT_TILE, "output_tile_size");
  require(o.output_tile_size % 4 == 0, "output_tile_size has parts of quads");
  require_range(o.input_tile_size, 1, MAX_FIELD, "input_tile_size");
  Wide input_tiles = ceil_div(source.channels, o.input_tile_size);
  Wide output_tiles = ceil_div(o.channels, o.output_tile_size);
  Wide padded = output_tiles * o.output_tile_size;
  check_results(checker, o, o.destination, o.channels, o.shift_at, padded);
  Wide count = output_tiles * input_tiles * (o.output_tile_size / 4);
  const QuadTile* tiles = checker.array<QuadTile>(o.tiles_at, count, "tiles");
  checker.count_entries(count * Wide{sizeof(QuadTile)});
  for (int64_t i = 0; i < count; ++i)
    check_quad_tile(checker, o, tiles[i],
                    i / (o.output_tile_size / 4) % static_cast<int64_t>(input_tiles));
  require(o.residual < 0 || destination.kind == TILES, "it can only add to tiles");
  checker.reads_like(o.residual, o.destination);
  checker.writes(o.destination, {o.source, o.residual});
}

// The quads of a list of taps that are merged from four channels each.
void check_merged(Checker& checker, const ByteSpatial& o, Wide lists, const Reach& reach) {
  require_range(o.vectors, 1, MAX_SLACK, "vectors");
  require_range(o.most_merged, 0, MAX_SLACK, "most_merged");
  require(Wide{o.vectors} * o.most_merged <= MAX_SLACK, "merged quads are too large");
  require_range(o.merged_stride, 1, MAX_SLACK, "merged_stride");
  const int32_t* starts = checker.starts(o.merged_at, lists, "merged quads");
  for (int64_t i = 0; i < lists; ++i)
    require_range(starts[i + 1] - starts[i], 0, o.most_merged, "the number of merged quads");
  Wide count = Wide{4} * starts[static_cast<int64_t>(lists)];
  const int32_t* sources = checker.array<int32_t>(o.sources_at, count, "sources");
  const int32_t* vectors = checker.array<int32_t>(o.vectors_at, o.vectors, "vectors");
  checker.count_entries(count * 4 + o.vectors * 4);
  Wide furthest = 0, furthest_vector = 0;
  for (int64_t i = 0; i < count; ++i) {
    require(sources[i] >= 0, "a source is negative");
    furthest = std::max<Wide>(furthest, sources[i] / 4);
  }
  for (int64_t i = 0; i < o.vectors; ++i) {
    require(vectors[i] >= 0, "a vector's offset is negative");
    furthest_vector = std::max<Wide>(furthest_vector, vectors[i]);
  }
  checker.reads_until(o.convolution.source, reach.start + furthest + furthest_vector);
}

// Lists of taps that four output channels share.
void check_taps(Checker& checker, const ByteSpatial& o, const Reach& reach) {
  const Spatial& all = o.convolution;
  Wide lists = Wide{all.input_tiles} * quads(all.channels), furthest = 0;
  const int32_t* starts = checker.starts(all.starts_at, lists, "starts");
  int64_t end = starts[static_cast<int64_t>(lists)];
  const int32_t* offsets = checker.array<int32_t>(all.offsets_at, end, "offsets");
  checker.array<float>(all.weights_at, Wide{SHARED_OUTPUTS} * end, "weights");
  checker.count_entries(Wide{end - starts[0]} * (SHARED_OUTPUTS + 1) * 4);
  for (int64_t i = starts[0]; i < end; ++i) {
    require(offsets[i] >= 0, "an offset is negative");
    furthest = std::max<Wide>(furthest, offsets[i]);
  }
  if (o.merged_at < 0) return checker.reads_until(all.source, reach.furthest + furthest);
  check_merged(checker, o, lists, reach);
  const int32_t* merged = checker.array<int32_t>(o.merged_at, lists + 1, "merged quads");
  Wide rows = Wide{all.rows - 1} * o.merged_stride + LANES;
  for (int64_t list = 0; list < lists; ++list) {
    Wide lanes = Wide{merged[list + 1] - merged[list]} * o.vectors * LANES + 2 * LANES;
    for (int64_t i = starts[list]; i < starts[list + 1]; ++i)
      require(offsets[i] + rows <= lanes, "a tap lies outside of the merged quads");
  }
}

void check(Checker& checker, const ByteSpatial& o) {
  const Spatial& all = o.convolution;
  Reach reach = check_spatial_items(checker, all);
  require(all.output_tile_size % 4 == 0, "output_tile_size has parts of quads");
  Wide lanes = Wide{all.image_rows - 1} * checker.view(all.source).row +
               checker.view(all.destination).width;
  require(all.image_rows == 1 || lanes <= LANES, "its rows are too wide");  // sums start empty
  if (o.shared)
    check_taps(checker, o, reach);
  else
    check_runs(checker, all, reach);
  if (!o.shared || o.merged_at < 0) {  // fields that only the size of scratch memory depends on
    require_range(o.vectors, 0, MAX_SLACK, "vectors");
    require_range(o.most_merged, 0, MAX_SLACK, "most_merged");
    require(Wide{o.vectors} * o.most_merged <= MAX_SLACK, "merged quads are too large");
  }
  check_results(checker, o, all.destination, all.channels, all.bias_at, 4 * quads(all.channels));
  checker.reads_like(all.residual, all.destination);
  checker.writes(all.destination, {all.source, all.residual});
}

void check(Checker& checker, const ByteMean& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.channels == quads(destination.channels), "it has another number of quads");
  require_one_pixel(destination);
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const ByteLinear& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(o.channels == destination.channels, "channels are not those of the destination");
  require(channel_lanes(source) == 1, "its source must have one lane per channel");
  require_one_pixel(destination);
  require(o.row > 0 && o.row % 64 == 0 && o.row <= MAX_ROW, "row must be a multiple of 64");
  require(source.channels <= o.row / 4, "its rows are shorter than its source");
  checker.array<float>(o.scale_at, o.channels, "scales");
  checker.array<float>(o.shift_at, o.channels, "shifts");
  checker.array<uint8_t>(o.weights_at, Wide{o.channels} * o.row, "weights");
  checker.count_entries(Wide{o.channels} * o.row);
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

}  // namespace

void check_byte_operation(Checker& checker, int64_t opcode, const void* operation) {
  switch (opcode) {
    case QUANTIZE: return check(checker, *static_cast<const Quantize*>(operation));
    case DEQUANTIZE: return check(checker, *static_cast<const Dequantize*>(operation));
    case BYTE_COPY: return check(checker, *static_cast<const ByteCopy*>(operation));
    case BYTE_POINTWISE: return check(checker, *static_cast<const BytePointwise*>(operation));
    case BYTE_SPATIAL: return check(checker, *static_cast<const ByteSpatial*>(operation));
    case BYTE_POOL: return check(checker, *static_cast<const BytePool*>(operation));
    case BYTE_MEAN: return check(checker, *static_cast<const ByteMean*>(operation));
    case BYTE_LINEAR: return check(checker, *static_cast<const ByteLinear*>(operation));
    default: throw Refused("there is no check for it, so it can't be trusted");
  }
}

}  // namespace starfire
