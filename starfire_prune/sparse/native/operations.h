// The operations of a program, compiled once for each instruction set like kernels.h. Each function
// runs the work items [begin, end) of an operation on one thread.

namespace STARFIRE_ISA {

// Computes an output-channel tile for one pixel tile. The results are sums, or finished outputs in
// their place where the output has the same pixel tiles.
static void pointwise_tile(const Context& c, const Pointwise& o, const PointwiseArguments& common,
                           int64_t channels, int64_t vectors, int64_t output_tile) {
  int64_t outputs = o.index_lists * o.outputs_per_list;
  int64_t input_tiles = ceil_div(channels, o.input_tile_size);
  int64_t tiles = o.output_tile_size / outputs, max_vectors = MAX_VECTORS[outputs == 4];
  PointwiseArguments a = common;
  a.count = tiles;
  for (int64_t i = 0; i < input_tiles; ++i) {
    a.tiles = c.constants<RegisterTile>(o.tiles_at) + (output_tile * input_tiles + i) * tiles;
    a.bias = i ? nullptr : c.constants<float>(o.bias_at) + output_tile * o.output_tile_size;
    for (int64_t v = 0; v < vectors; v += max_vectors) {
      int64_t skipped = v * LANES;
      a.source = common.source + (i * o.input_tile_size * common.size + skipped) * sizeof(float);
      a.sums = common.sums + skipped;
      bool last = common.target && i == input_tiles - 1;
      a.target = last ? common.target + skipped : nullptr;
      a.residual = last && common.residual ? common.residual + skipped : nullptr;
      pointwise_kernel(o.index_lists, o.outputs_per_list, minimum(max_vectors, vectors - v))(a);
    }
  }
}

// Whether an activation has to wait until results are in their place: something is added there.
// Otherwise it is computed of the sums, whose vectors are complete.
template <class Operation>
INLINE bool ends_late(const Operation& o) {
  return o.residual >= 0 || o.activation == NO_ACTIVATION;
}

// Replaces finished outputs, of `vectors` vectors of pixels of each channel, by their activations.
static void activate_tile(int64_t activation, const PointwiseArguments& a, int64_t vectors) {
  if (vectors * LANES == a.size) return activate_floats(activation, a.target, a.channels * a.size);
  for (int64_t k = 0; k < a.channels; ++k)
    activate_floats(activation, a.target + k * a.size, vectors * LANES);
}

static void run_pointwise(const Context& c, const Pointwise& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t output_tiles = ceil_div(o.channels, o.output_tile_size);
  int64_t pixels = source.height * source.width, pixel_tiles = ceil_div(pixels, source.tile);
  bool direct = destination.kind == TILES, late = ends_late(o);
  alignas(64) float sums[MAX_OUTPUT_TILE * MAX_TILE + 48];
  Epilogue e = epilogue(o.low, o.high, late ? o.activation : NO_ACTIVATION);
  Segments segments;
  PointwiseArguments a{};
  a.indices = c.constants<uint16_t>(o.indices_at), a.weights = c.constants<float>(o.weights_at);
  a.size = source.tile, a.sums = sums, a.low = e.low, a.high = e.high;
  for (int64_t item = begin, last = -1; item < end; ++item) {
    int64_t output_tile = item % output_tiles, tile = item / output_tiles % pixel_tiles;
    int64_t image = item / output_tiles / pixel_tiles;
    int64_t pixel = tile * source.tile, count = minimum(source.tile, pixels - pixel);
    int64_t first = output_tile * o.output_tile_size;
    int64_t to = tile * destination.total * destination.tile;
    auto channel = [&](int64_t view, int64_t k) {
      return channel_of(c.views[view], c.image(view, image), first + k);
    };
    a.source = reinterpret_cast<const char*>(channel_of(source, c.image(o.source, image), 0) +
                                             tile * source.total * source.tile);
    a.channels = minimum(o.output_tile_size, o.channels - first);
    a.target = direct ? channel(o.destination, 0) + to : nullptr;
    a.residual = direct && o.residual >= 0 ? channel(o.residual, 0) + to : nullptr;
    pointwise_tile(c, o, a, source.channels, ceil_div(count, LANES), output_tile);
    if (direct) {
      if (o.activation != NO_ACTIVATION) activate_tile(o.activation, a, ceil_div(count, LANES));
      continue;
    }
    if (!late) {
      a.target = sums;
      activate_tile(o.activation, a, ceil_div(count, LANES));
    }
    if (tile != last) {
      segments.count = 0;
      pixel_segments(segments, destination, pixel, count);
      last = tile;
    }
    for (int64_t k = 0; k < a.channels; ++k) {
      e.residual = o.residual >= 0 ? channel(o.residual, k) : nullptr;
      store_segments(segments, sums + k * source.tile, channel(o.destination, k), e);
    }
  }
}

static void run_spatial(const Context& c, const Spatial& o, int64_t begin, int64_t end) {
  alignas(64) float sums[MAX_SPILLED * SUMS + 48];
  bool late = ends_late(o);
  Epilogue e = epilogue(o.low, o.high, late ? o.activation : NO_ACTIVATION);
  SpatialItem item(c, o);
  for (int64_t i = begin; i < end; ++i) {
    item.move_to(i);
    for (int64_t input_tile = 0; input_tile < o.input_tiles; ++input_tile) {
      for (int64_t k = item.start; k < item.stop; ++k) {
        float* channel_sums = sums + (o.input_tiles > 1 ? (k - item.start) * SUMS : 0);
        if (input_tile == 0) fill_sums(channel_sums, c.constants<float>(o.bias_at)[k]);
        spatial_channel<Floats>(c, o, item, input_tile, k, false, channel_sums);
        if (input_tile < o.input_tiles - 1) continue;
        if (o.residual >= 0) e.residual = item.channel(o.residual, k);
        if (!late) activate_floats(o.activation, channel_sums, item.rows * LANES);
        store_segments(item.segments, channel_sums, item.channel(o.destination, k), e);
      }
    }
  }
}

static void run_pool(const Context& c, const Pool& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const int32_t* offsets = c.constants<int32_t>(o.offsets_at);
  Epilogue e = epilogue(o.low, o.high, o.activation);
  float scale = as_float(o.scale), shift = 0.0f, pooled[LANES + 32];
  e.scale = &scale, e.shift = &shift;
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % destination.height, channel = item / destination.height;
    int64_t image = channel / destination.channels;
    channel %= destination.channels;
    const float* row = channel_of(source, c.image(o.source, image), channel) + h * source.row;
    float* to = channel_of(destination, c.image(o.destination, image), channel);
    for (int64_t w = 0; w < destination.width; w += LANES) {
      Vector sum = load_window(row + w * o.step + offsets[0], o.step);
      for (int64_t t = 1; t < o.count; ++t) {
        Vector value = load_window(row + w * o.step + offsets[t], o.step);
        sum = o.mode == MAXIMUM ? maximum(value, sum) : add(sum, value);
      }
      store(pooled, sum);
      Segments segments;
      row_segments(segments, destination, h, w, minimum(LANES, destination.width - w), 0, 1);
      store_segments(segments, pooled, to, e);
    }
  }
}

static void run_items(const Context& c, int64_t opcode, const void* operation, int64_t begin,
                      int64_t end) {
  switch (opcode) {
    case COPY: return run_copy(c, *static_cast<const Copy*>(operation), begin, end);
    case POINTWISE: return run_pointwise(c, *static_cast<const Pointwise*>(operation), begin, end);
    case SPATIAL: return run_spatial(c, *static_cast<const Spatial*>(operation), begin, end);
    case POOL: return run_pool(c, *static_cast<const Pool*>(operation), begin, end);
    case MEAN: return run_mean(c, *static_cast<const Mean*>(operation), begin, end);
    case UPSAMPLE: return run_upsample(c, *static_cast<const Upsample*>(operation), begin, end);
    case CHANNEL_NORM:
      return run_channel_norm(c, *static_cast<const ChannelNorm*>(operation), begin, end);
    case RESPONSE: return run_response(c, *static_cast<const Response*>(operation), begin, end);
    case LINEAR: return run_linear(c, *static_cast<const Linear*>(operation), begin, end);
    default: return;
  }
}

}  // namespace STARFIRE_ISA
