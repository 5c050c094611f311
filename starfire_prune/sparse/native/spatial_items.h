// The work items of convolutions larger than 1x1: an output-channel tile, a range of accumulators (of
// one or more image rows each) and a range of columns. Compiled once for each instruction set.

namespace STARFIRE_ISA {

constexpr int64_t SUMS = (MAX_ROWS + 4) * LANES;  // of one output channel

INLINE void fill_sums(float* sums, float value) {
  for (int64_t i = 0; i < SUMS; i += LANES) store(sums + i, splat(value));
}

struct SpatialItem {
  const Context& c;
  const Spatial& o;
  int64_t all_rows, column_tiles, output_tiles, place = -1;
  // Of the current work item:
  int64_t image = 0, rows = 0;       // image of the batch; number of accumulators
  int64_t start = 0, stop = 0;       // output channels [start, stop)
  const float* from = nullptr;       // first input channel's first row and column
  Segments segments;                 // where the sums belong in an output channel

  SpatialItem(const Context& context, const Spatial& operation) : c(context), o(operation) {
    const View& destination = c.views[o.destination];
    all_rows = ceil_div(destination.height, o.image_rows);
    column_tiles = o.image_rows > 1 ? 1 : ceil_div(destination.width, LANES);
    output_tiles = ceil_div(o.channels, o.output_tile_size);
  }

  void move_to(int64_t item) {
    const View &source = c.views[o.source], &destination = c.views[o.destination];
    int64_t row_tiles = ceil_div(all_rows, o.rows), before = place;
    place = item / output_tiles;
    image = place / column_tiles / row_tiles;
    start = item % output_tiles * o.output_tile_size;
    stop = minimum(start + o.output_tile_size, o.channels);
    if (place == before) return;
    int64_t column_tile = place % column_tiles, first = place / column_tiles % row_tiles * o.rows;
    int64_t w = column_tile * LANES, length = minimum(LANES, destination.width - w);
    rows = minimum(o.rows, all_rows - first);
    int64_t end_row = minimum(destination.height, (first + rows) * o.image_rows);
    segments.count = 0;
    for (int64_t h = first * o.image_rows; h < end_row; ++h) {
      int64_t at = (h / o.image_rows - first) * LANES + h % o.image_rows * source.row;
      row_segments(segments, destination, h, w, length, at, 1);
    }
    from = channel_of(source, c.image(o.source, image), 0) + first * o.row_stride + w;
  }

  float* channel(int64_t view, int64_t k) const {
    return channel_of(c.views[view], c.image(view, image), k);
  }
};

// Adds the contribution of an input-channel tile to an output channel's sums, or sets them to it if
// they have not been set (`is_first`).
template <class Math>
INLINE void spatial_channel(const Context& c, const Spatial& o, const SpatialItem& item,
                            int64_t input_tile, int64_t channel, bool is_first, float* sums) {
  const int32_t* starts = c.constants<int32_t>(o.starts_at) + input_tile * o.channels + channel;
  const RectangleRun* runs = c.constants<RectangleRun>(o.runs_at);
  if (is_first && starts[0] == starts[1]) fill_sums(sums, 0.0f);
  for (int64_t r = 0; r < item.rows;) {
    int64_t size = kernel_rows(item.rows - r);
    for (int32_t i = starts[0]; i < starts[1]; ++i)
      spatial_kernel<Math>(size, runs[i], o.row_stride == LANES)(
          item.from + r * o.row_stride, o.row_stride,
          c.constants<int32_t>(o.offsets_at) + runs[i].offsets,
          c.constants<float>(o.weights_at) + runs[i].weights, runs[i].count,
          is_first && i == starts[0], sums + r * LANES);
    r += size;
  }
}

}  // namespace STARFIRE_ISA
