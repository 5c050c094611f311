// The operations of a program, compiled once for each instruction set like kernels.h. Each function
// runs the work items [begin, end) of an operation on one thread.

namespace STARFIRE_ISA {

static void run_copy(const Context& c, const Copy& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  Epilogue e = epilogue(o);
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % destination.height, channel = item / destination.height;
    int64_t image = channel / destination.channels;
    channel %= destination.channels;
    const float* row = row_of(source, channel_of(source, c.image(o.source, image), channel),
                              h * o.stride_h, copy);
    e.scale = o.scale_at < 0 ? nullptr : c.constants<float>(o.scale_at) + channel;
    e.shift = o.scale_at < 0 ? nullptr : c.constants<float>(o.shift_at) + channel;
    if (o.residual >= 0)
      e.residual = channel_of(c.views[o.residual], c.image(o.residual, image), channel);
    float* to = channel_of(destination, c.image(o.destination, image), channel);
    constexpr int64_t SEGMENT = LANES * 64;
    for (int64_t w = 0; w < destination.width; w += SEGMENT) {
      Segments segments;
      row_segments(segments, destination, h, w, minimum(SEGMENT, destination.width - w),
                   w * o.stride_w, o.stride_w);
      store_segments(segments, row, to, e);
    }
  }
  c.release(copy);
}

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

static void run_pointwise(const Context& c, const Pointwise& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t output_tiles = ceil_div(o.channels, o.output_tile_size);
  int64_t pixels = source.height * source.width, pixel_tiles = ceil_div(pixels, source.tile);
  bool direct = destination.kind == TILES;
  alignas(64) float sums[MAX_OUTPUT_TILE * MAX_TILE + 48];
  Epilogue e = epilogue(o);
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
    if (direct) continue;
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
  Epilogue e = epilogue(o);
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
        store_segments(item.segments, channel_sums, item.channel(o.destination, k), e);
      }
    }
  }
}

static void run_pool(const Context& c, const Pool& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const int32_t* offsets = c.constants<int32_t>(o.offsets_at);
  Epilogue e = epilogue(o);
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

static void run_mean(const Context& c, const Mean& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t at = pixel_at(destination);
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t channel = item % source.channels, image = item / source.channels;
    float* from = channel_of(source, c.image(o.source, image), channel);
    double sum = 0.0;
    for (int64_t h = 0; h < source.height; ++h) {
      const float* row = row_of(source, from, h, copy);
      float row_sum = 0.0f;
      for (int64_t w = 0; w < source.width; ++w) row_sum += row[w];
      sum += row_sum;
    }
    double mean = sum / static_cast<double>(source.height * source.width);
    channel_of(destination, c.image(o.destination, image), channel)[at] = static_cast<float>(mean);
  }
  c.release(copy);
}

// ---------------------------------------------------------------------------------------------
// Linear layers
// ---------------------------------------------------------------------------------------------

INLINE float total(const Vector& vector) {
  float values[LANES], sum = 0.0f;
  store(values, vector);
  for (int i = 0; i < LANES; ++i) sum += values[i];
  return sum;
}

INLINE Vector gather(const float* from, const int32_t* indices) {
#if ISA == 512
  return {reinterpret_cast<Register>(_mm512_i32gather_ps(_mm512_loadu_si512(indices), from, 4))};
#else
  float values[LANES];
  for (int i = 0; i < LANES; ++i) values[i] = from[indices[i]];
  return load(values);
#endif
}

INLINE void vector_multiply_add(Vector& sum, const Vector& one, const Vector& other) {
  UNROLL for (int i = 0; i < PARTS; ++i) sum.part[i] += one.part[i] * other.part[i];
}

INLINE float dense_product(const float* x, const float* weights, int64_t count) {
  Vector sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; ++j)
      vector_multiply_add(sums[j], load(x + i + j * LANES), load(weights + i + j * LANES));
  float sum = total(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < count; ++i) sum += x[i] * weights[i];
  return sum;
}

INLINE float sparse_product(const float* x, const int32_t* indices, const float* weights,
                            int64_t count) {
  Vector sums[2] = {splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES)
    UNROLL for (int j = 0; j < 2; ++j)
      vector_multiply_add(sums[j], gather(x, indices + i + j * LANES),
                          load(weights + i + j * LANES));
  float sum = total(add(sums[0], sums[1]));
  for (; i < count; ++i) sum += x[indices[i]] * weights[i];
  return sum;
}

// The products for 16 images at once: x is [features][16].
INLINE Vector batch_product(const float* x, const int32_t* indices, const float* weights,
                            int64_t count) {
  Vector sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    UNROLL for (int j = 0; j < 4; ++j)
      multiply_add(sums[j], broadcast(weights[i + j]),
                   load(x + (indices ? indices[i + j] : i + j) * LANES));
  for (; i < count; ++i)
    multiply_add(sums[0], broadcast(weights[i]), load(x + (indices ? indices[i] : i) * LANES));
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

struct WeightRow {
  const int32_t* indices;  // null where the row is dense
  const float* weights;
  int64_t count;
};

INLINE WeightRow weight_row(const Context& c, const Linear& o, int64_t channel, int64_t features) {
  const float* weights = c.constants<float>(o.weights_at);
  if (o.starts_at < 0) return {nullptr, weights + channel * features, features};
  const int32_t* starts = c.constants<int32_t>(o.starts_at);
  return {c.constants<int32_t>(o.indices_at) + starts[channel], weights + starts[channel],
          starts[channel + 1] - starts[channel]};
}

static void linear_images(const Context& c, const Linear& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float* bias = c.constants<float>(o.bias_at);
  int64_t at = pixel_at(destination);
  Epilogue e = epilogue(o);
  for (int64_t k = begin; k < end; ++k) {
    WeightRow row = weight_row(c, o, k, source.channels);
    for (int64_t n = 0; n < c.batch; ++n) {
      const float* x = channel_of(source, c.image(o.source, n), 0);
      float sum = row.indices ? sparse_product(x, row.indices, row.weights, row.count)
                              : dense_product(x, row.weights, row.count);
      channel_of(destination, c.image(o.destination, n), k)[at] = clamped(sum + bias[k], e);
    }
  }
}

static void linear_batches(const Context& c, const Linear& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float* bias = c.constants<float>(o.bias_at);
  int64_t at = pixel_at(destination);
  Epilogue e = epilogue(o);
  float* x = c.scratch(source.channels * LANES);
  for (int64_t first = 0; first < c.batch; first += LANES) {
    int64_t images = minimum(LANES, c.batch - first);
    for (int64_t n = 0; n < LANES; ++n) {
      const float* from = channel_of(source, c.image(o.source, first + minimum(n, images - 1)), 0);
      for (int64_t i = 0; i < source.channels; ++i) x[i * LANES + n] = from[i];
    }
    for (int64_t k = begin; k < end; ++k) {
      WeightRow row = weight_row(c, o, k, source.channels);
      float values[LANES];
      store(values, add(batch_product(x, row.indices, row.weights, row.count), splat(bias[k])));
      for (int64_t n = 0; n < images; ++n)
        channel_of(destination, c.image(o.destination, first + n), k)[at] = clamped(values[n], e);
    }
  }
  c.release(x);
}

static void run_linear(const Context& c, const Linear& o, int64_t begin, int64_t end) {
  constexpr int64_t MIN_TRANSPOSED_BATCH = 4;
  if (c.batch < MIN_TRANSPOSED_BATCH)
    linear_images(c, o, begin, end);
  else
    linear_batches(c, o, begin, end);
}

static void run_items(const Context& c, int64_t opcode, const void* operation, int64_t begin,
                      int64_t end) {
  switch (opcode) {
    case COPY: return run_copy(c, *static_cast<const Copy*>(operation), begin, end);
    case POINTWISE: return run_pointwise(c, *static_cast<const Pointwise*>(operation), begin, end);
    case SPATIAL: return run_spatial(c, *static_cast<const Spatial*>(operation), begin, end);
    case POOL: return run_pool(c, *static_cast<const Pool*>(operation), begin, end);
    case MEAN: return run_mean(c, *static_cast<const Mean*>(operation), begin, end);
    case LINEAR: return run_linear(c, *static_cast<const Linear*>(operation), begin, end);
    default: return;
  }
}

}  // namespace STARFIRE_ISA
