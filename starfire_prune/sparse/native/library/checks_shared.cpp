// Checks that operations on floats and on bytes have in common.

#include <algorithm>

#include "checks.h"

namespace starfire {

constexpr int64_t MAX_PAST_ROW = 31;  // lanes after a row that copies of every second lane load

void check_strided_copy(Checker& checker, int64_t source, int64_t destination, int64_t stride_h,
                        int64_t stride_w) {
  const View &from = checker.view(source), &to = checker.view(destination);
  require_range(stride_h, 1, MAX_FIELD, "stride_h");
  require_range(stride_w, 1, MAX_FIELD, "stride_w");
  require(from.channels == to.channels, "source and destination have other channels");
  require(Wide{to.height - 1} * stride_h < from.height &&
              Wide{to.width - 1} * stride_w < from.width,
          "its last pixel lies outside of the source");
  require(Wide{to.width + 1} * stride_w * to.phases_w < MAX_FIELD, "its rows are too long");
  require_segments(to, 1, LANES * 64);
  checker.reads_rows(source, MAX_PAST_ROW);
}

void check_pool(Checker& checker, int64_t source, int64_t destination, int64_t offsets_at,
                int64_t count, int64_t step) {
  const View &from = checker.view(source), &to = checker.view(destination);
  require(from.kind == PLANES && from.place == WORKSPACE, "its source must be padded planes");
  require(from.channels == to.channels, "source and destination have other channels");
  require_range(step, 1, 2, "step");
  require_range(count, 1, MAX_FIELD, "count");
  const int32_t* offsets = checker.array<int32_t>(offsets_at, count, "offsets");
  checker.count_entries(Wide{count} * Wide{sizeof(int32_t)});
  require(*std::min_element(offsets, offsets + count) >= 0, "an offset is negative");
  Wide reach = *std::max_element(offsets, offsets + count);
  Wide last_row = Wide{to.height - 1} * from.row;
  Wide last_column = Wide{(to.width - 1) / LANES * LANES} * step;
  Wide begin = channel_at(from, from.channels - 1) + last_row + last_column + reach;
  checker.reads_until(source, begin + 2 * LANES);
  require_segments(to, 1, LANES);
}

void check_tiled(Checker& checker, int64_t source, int64_t destination) {
  const View &from = checker.view(source), &to = checker.view(destination);
  require(from.kind == TILES, "its source must be tiles of pixels");
  require_same_size(from, to);
  require(to.kind == PLANES || to.tile == from.tile, "source and destination have other tiles");
  Wide rows = std::min<Wide>(to.height, (from.tile - 1) / to.width + 2);
  if (to.kind == PLANES) require_segments(to, rows, from.tile);
  checker.reads_rows(source, 0);
}

void check_indices(const View& source, const uint16_t* indices, Wide count, Wide channels) {
  Wide end = channels * source.tile;
  for (int64_t i = 0; i < count; ++i)
    require(Wide{indices[i]} * LANES + source.tile <= end, "an index lies outside of its channels");
}

// Rows that kernels for rectangles compute: each has one of a few numbers of them.
static Wide rounded_rows(Wide rows) {
  Wide even = (rows + 1) / 2 * 2;
  for (Wide size : {2, 4, 7, 10, 14})
    if (size >= rows) return std::max(even, size);
  return even;
}

Reach check_spatial_items(Checker& checker, const Spatial& o) {
  const View &from = checker.view(o.source), &to = checker.view(o.destination);
  require(from.kind == PLANES && from.place == WORKSPACE, "its source must be padded planes");
  require_range(o.output_tile_size, 1, MAX_FIELD, "output_tile_size");
  require_range(o.input_tiles, 1, MAX_FIELD, "input_tiles");
  if (o.input_tiles > 1) require_range(o.output_tile_size, 1, MAX_SPILLED, "output_tile_size");
  require_range(o.channels, 1, MAX_FIELD, "channels");
  require_range(o.rows, 1, MAX_ROWS, "rows");
  require_range(o.image_rows, 1, LANES, "image_rows");
  require_range(o.row_stride, 1, MAX_FIELD, "row_stride");
  if (o.image_rows > 1)
    require(Wide{o.image_rows - 1} * from.row < LANES && to.width <= LANES, "its rows are too wide");
  require_segments(to, std::min(Wide{o.rows} * o.image_rows, Wide{to.height}), LANES);
  Wide all_rows = ceil_div(to.height, o.image_rows), row_tiles = ceil_div(all_rows, o.rows);
  Wide column = o.image_rows > 1 ? 0 : (to.width - 1) / LANES * LANES;
  Wide first = channel_at(from, 0) + column + LANES;
  Reach reach{0, 0, first + (row_tiles - 1) * o.rows * o.row_stride};
  for (Wide tile : {row_tiles - 1, std::max<Wide>(row_tiles - 2, 0)}) {
    Wide begin = tile * o.rows, rows = std::min<Wide>(o.rows, all_rows - begin);
    Wide last = begin + rows - 1, last_rounded = begin + rounded_rows(rows) - 1;
    reach.furthest = std::max(reach.furthest, first + last * o.row_stride);
    reach.furthest_run = std::max(reach.furthest_run, first + last_rounded * o.row_stride);
  }
  return reach;
}

void check_runs(Checker& checker, const Spatial& o, const Reach& reach) {
  Wide lists = Wide{o.input_tiles} * o.channels, furthest = 0;
  const int32_t* starts = checker.starts(o.starts_at, lists, "starts");
  int64_t end = starts[static_cast<int64_t>(lists)];
  const RectangleRun* runs = checker.array<RectangleRun>(o.runs_at, end, "runs");
  checker.count_entries(Wide{end - starts[0]} * Wide{sizeof(RectangleRun)});
  for (int64_t i = starts[0]; i < end; ++i) {
    const RectangleRun& run = runs[i];
    require_range(run.rows, 1, 4, "the rows of a rectangle");
    require_range(run.columns, 1, 3, "the columns of a rectangle");
    for (int64_t field : {run.count, run.offsets, run.weights})
      require_range(field, 0, MAX_FIELD, "a field of a run");
    Wide area = Wide{run.rows} * run.columns;
    const int32_t* offsets =
        checker.array<int32_t>(o.offsets_at, Wide{run.offsets} + run.count, "offsets");
    checker.array<float>(o.weights_at, run.weights + area * run.count, "weights");
    checker.count_entries((area + 1) * run.count * Wide{sizeof(float)});
    for (int64_t j = 0; j < run.count; ++j) {
      int64_t offset = offsets[run.offsets + j];
      require(offset >= 0, "an offset is negative");
      furthest = std::max(furthest, Wide{offset} + Wide{run.rows - 1} * o.row_stride);
    }
  }
  checker.reads_until(o.source, reach.furthest_run + furthest + LANES);
}

}  // namespace starfire
