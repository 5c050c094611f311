// The checks of the operations on floats.

#include <algorithm>

#include "checks.h"

namespace starfire {
namespace {

void check(Checker& checker, const Copy& o) {
  check_strided_copy(checker, o.source, o.destination, o.stride_h, o.stride_w);
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  for (int64_t operand : {o.residual, o.factor})
    if (operand >= 0) checker.view(operand);
  int64_t channels = destination.channels;
  bool gated = is_gated(&checker.view(0), o), of_tiles = is_of_tiles(&checker.view(0), o);
  if (of_tiles) require_same_size(source, destination);
  if (gated) {
    require_one_pixel(checker.view(o.factor));
    require(checker.view(o.factor).channels == channels, "the factor has other channels");
    checker.reads_rows(o.factor, 0);
  } else {
    checker.reads_like(o.factor, o.destination, of_tiles);
  }
  if (o.scale_at >= 0) {
    checker.array<float>(o.scale_at, channels, "scales");
    checker.array<float>(o.shift_at, channels, "shifts");
  }
  checker.reads_like(o.residual, o.destination, of_tiles);
  checker.activates(o.activation, o.destination);
  checker.writes(o.destination, {o.source, o.residual, o.factor});
}

// The register tiles of one pair of an output-channel tile and an input-channel tile.
void check_register_tiles(Checker& checker, const Pointwise& o, const RegisterTile* tiles,
                          int64_t input_tile) {
  const View& source = checker.view(o.source);
  Wide outputs = o.index_lists * o.outputs_per_list;
  uint64_t found = 0;
  for (int64_t t = 0; t < o.output_tile_size / outputs; ++t) {
    const RegisterTile& tile = tiles[t];
    for (int64_t k = 0; k < outputs; ++k) {
      require_range(tile.channel[k], 0, o.output_tile_size - 1, "the channel of a tile");
      found |= uint64_t{1} << tile.channel[k];
    }
    require_range(tile.start, 0, MAX_FIELD, "the start of a tile");
    require_range(tile.count, 0, MAX_FIELD, "the count of a tile");
    Wide begin = Wide{tile.start} * o.index_lists, count = Wide{tile.count} * o.index_lists;
    const uint16_t* indices = checker.array<uint16_t>(o.indices_at, begin + count, "indices");
    checker.array<float>(o.weights_at, (Wide{tile.start} + tile.count) * outputs, "weights");
    checker.count_entries(count * 2 + tile.count * outputs * 4);
    Wide channels = source.channels - Wide{input_tile} * o.input_tile_size;
    check_indices(source, indices + static_cast<int64_t>(begin), count, channels);
  }
  uint64_t all = ~uint64_t{0} >> (64 - o.output_tile_size);
  require(found == all, "an output channel is computed twice or not at all");
}

void check(Checker& checker, const Pointwise& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  check_tiled(checker, o.source, o.destination);
  require(o.channels == destination.channels, "channels are not those of the destination");
  int64_t lists = o.index_lists, shared = o.outputs_per_list;
  bool known = (lists == 1 && (shared == 2 || shared == 4)) ||
               (shared == 1 && (lists == 2 || lists == 4));
  require(known, "there is no kernel for these register tiles");
  require_range(o.output_tile_size, 1, MAX_OUTPUT_TILE, "output_tile_size");
  require(o.output_tile_size % (lists * shared) == 0, "output_tile_size has parts of tiles");
  require_range(o.input_tile_size, 1, MAX_FIELD, "input_tile_size");
  Wide input_tiles = ceil_div(source.channels, o.input_tile_size);
  Wide output_tiles = ceil_div(o.channels, o.output_tile_size);
  checker.array<float>(o.bias_at, output_tiles * o.output_tile_size, "biases");
  Wide count = o.output_tile_size / (lists * shared), pairs = input_tiles * output_tiles;
  const auto* tiles = checker.array<RegisterTile>(o.tiles_at, pairs * count, "tiles");
  checker.count_entries(pairs * count * Wide{sizeof(RegisterTile)});
  for (int64_t i = 0; i < pairs; ++i)
    check_register_tiles(checker, o, tiles + i * static_cast<int64_t>(count),
                         i % static_cast<int64_t>(input_tiles));
  checker.reads_like(o.residual, o.destination);
  checker.activates(o.activation, o.destination);
  checker.writes(o.destination, {o.source, o.residual});
}

void check(Checker& checker, const Spatial& o) {
  require(o.channels == checker.view(o.destination).channels,
          "channels are not those of the destination");
  Reach reach = check_spatial_items(checker, o);
  check_runs(checker, o, reach);
  checker.array<float>(o.bias_at, o.channels, "biases");
  checker.reads_like(o.residual, o.destination);
  checker.activates(o.activation, o.destination);
  checker.writes(o.destination, {o.source, o.residual});
}

void check(Checker& checker, const Pool& o) {
  require_range(o.mode, MAXIMUM, SUM, "mode");
  check_pool(checker, o.source, o.destination, o.offsets_at, o.count, o.step);
  checker.activates(o.activation, o.destination);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const Mean& o) {
  require_range(o.mode, AVERAGE, EUCLIDEAN, "mode");
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.channels == destination.channels, "source and destination have other channels");
  require_one_pixel(destination);
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const Upsample& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.channels == destination.channels, "source and destination have other channels");
  require_range(o.factor_h, 1, MAX_ROW, "factor_h");
  require_range(o.factor_w, 1, MAX_ROW, "factor_w");
  require(Wide{source.height} * o.factor_h == destination.height &&
              Wide{source.width} * o.factor_w == destination.width,
          "its factors are not those of the images");
  require_segments(destination, 1, LANES * 64);
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const ChannelNorm& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.kind == TILES, "its source must be tiles of pixels");
  require(source.channels == destination.channels, "source and destination have other channels");
  require_same_size(source, destination);
  Wide rows = std::min<Wide>(destination.height, (LANES - 1) / destination.width + 2);
  require_segments(destination, rows, LANES);
  checker.array<float>(o.scale_at, source.channels, "scales");
  checker.array<float>(o.shift_at, source.channels, "shifts");
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const Response& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(source.channels == destination.channels, "source and destination have other channels");
  require_one_pixel(source);
  require_one_pixel(destination);
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

void check(Checker& checker, const Linear& o) {
  const View &source = checker.view(o.source), &destination = checker.view(o.destination);
  require(o.channels == destination.channels, "channels are not those of the destination");
  require_range(o.activation, NO_ACTIVATION, GELU_TANH, "activation");
  require(channel_lanes(source) == 1, "its source must have one lane per channel");
  require_range(source.channels, 1, MAX_ROW, "channels");
  require_one_pixel(destination);
  checker.array<float>(o.bias_at, o.channels, "biases");
  if (o.starts_at < 0) {
    checker.array<float>(o.weights_at, Wide{o.channels} * source.channels, "weights");
    checker.count_entries(Wide{o.channels} * source.channels * 4);
  } else {
    const int32_t* starts = checker.starts(o.starts_at, o.channels, "starts");
    int64_t begin = starts[0], end = starts[o.channels];
    const int32_t* indices = checker.array<int32_t>(o.indices_at, end, "indices");
    checker.array<float>(o.weights_at, end, "weights");
    checker.count_entries(Wide{end - begin} * 8);
    for (int64_t i = begin; i < end; ++i)
      require_range(indices[i], 0, source.channels - 1, "an index");
  }
  checker.reads_rows(o.source, 0);
  checker.writes(o.destination, {o.source});
}

}  // namespace

void check_float_operation(Checker& checker, int64_t opcode, const void* operation) {
  switch (opcode) {
    case COPY: return check(checker, *static_cast<const Copy*>(operation));
    case POINTWISE: return check(checker, *static_cast<const Pointwise*>(operation));
    case SPATIAL: return check(checker, *static_cast<const Spatial*>(operation));
    case POOL: return check(checker, *static_cast<const Pool*>(operation));
    case MEAN: return check(checker, *static_cast<const Mean*>(operation));
    case UPSAMPLE: return check(checker, *static_cast<const Upsample*>(operation));
    case CHANNEL_NORM: return check(checker, *static_cast<const ChannelNorm*>(operation));
    case RESPONSE: return check(checker, *static_cast<const Response*>(operation));
    case LINEAR: return check(checker, *static_cast<const Linear*>(operation));
    default: throw Refused("there is no check for it, so it can't be trusted");
  }
}

}  // namespace starfire
