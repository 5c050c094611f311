// The operations of a program on quantized values, compiled once for each instruction set. Each
// function runs the work items [begin, end) of an operation on one thread.

namespace STARFIRE_ISA {

constexpr int64_t MAX_COPIED = LANES * 64;  // lanes of a row whose segments are found at once

// Stores a row of lanes in a channel, as it is.
INLINE void store_row(const View& view, const float* row, int64_t h, int64_t step, float* to) {
  for (int64_t w = 0; w < view.width; w += MAX_COPIED) {
    Segments segments;
    row_segments(segments, view, h, w, minimum(MAX_COPIED, view.width - w), w * step, step);
    copy_segments(segments, row, to);
  }
}

// The image, channel and row of a work item, one for each row of each channel of a view.
struct RowItem {
  int64_t image, channel, h;

  RowItem(const View& view, int64_t item) {
    h = item % view.height;
    channel = item / view.height % view.channels;
    image = item / view.height / view.channels;
  }
};

// Quantizes a row of one channel into int32; `factor` is the inverse scale.
INLINE void quantize_row(const float* row, int64_t width, Register factor, Register zero_point,
                         Register low, Register high, float* ints) {
  for (int64_t w = 0; w < width; w += LANES) {
    Vector value = load(row + w);
    UNROLL for (int i = 0; i < PARTS; ++i) value.part[i] *= factor;
    value = rounded(clamp(value, low, high));
    UNROLL for (int i = 0; i < PARTS; ++i)
      value.part[i] = as_lanes(as_ints(value.part[i]) + as_ints(zero_point));
    store(ints + w, value);
  }
}

static void run_quantize(const Context& c, const Quantize& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float zero = as_float(o.zero_point);
  Register factor = broadcast(as_float(o.inverse_scale));
  Register zero_point = as_lanes(IntRegister{} + static_cast<int32_t>(zero));
  Register low = broadcast(as_float(o.low) - zero), high = broadcast(as_float(o.high) - zero);
  int64_t stride = source.width + 48;
  float *copy = c.scratch(6 * stride), *ints = copy + stride, *quads = copy + 5 * stride;
  for (int64_t number = begin; number < end; ++number) {
    RowItem item(destination, number);
    for (int64_t j = 0; j < 4; ++j) {
      int64_t k = minimum(4 * item.channel + j, source.channels - 1);  // the last one's again
      float* channel = channel_of(source, c.image(o.source, item.image), k);
      quantize_row(row_of(source, channel, item.h, copy), source.width, factor, zero_point, low,
                   high, ints + j * stride);
    }
    for (int64_t w = 0; w < source.width; w += LANES)
      store(quads + w, packed({load(ints + w), load(ints + stride + w),
                               load(ints + 2 * stride + w), load(ints + 3 * stride + w)}));
    float* to = channel_of(destination, c.image(o.destination, item.image), item.channel);
    store_row(destination, quads, item.h, 1, to);
  }
  c.release(copy);
}

static void run_dequantize(const Context& c, const Dequantize& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  Register scale = broadcast(as_float(o.scale)), zero = broadcast(as_float(o.zero_point));
  int64_t stride = source.width + 48;
  float *copy = c.scratch(2 * stride), *floats = copy + stride;
  for (int64_t number = begin; number < end; ++number) {
    RowItem item(destination, number);
    float* channel = channel_of(source, c.image(o.source, item.image), item.channel / 4);
    const float* row = row_of(source, channel, item.h, copy);
    for (int64_t w = 0; w < source.width; w += LANES) {
      Vector value = byte_of(load(row + w), static_cast<int>(item.channel % 4));
      UNROLL for (int i = 0; i < PARTS; ++i) value.part[i] = (value.part[i] - zero) * scale;
      store(floats + w, value);
    }
    float* to = channel_of(destination, c.image(o.destination, item.image), item.channel);
    store_row(destination, floats, item.h, 1, to);
  }
  c.release(copy);
}

static void run_byte_copy(const Context& c, const ByteCopy& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  float* copy = c.scratch(source.width + 48);
  for (int64_t number = begin; number < end; ++number) {
    RowItem item(destination, number);
    float* channel = channel_of(source, c.image(o.source, item.image), item.channel);
    const float* row = row_of(source, channel, item.h * o.stride_h, copy);
    float* to = channel_of(destination, c.image(o.destination, item.image), item.channel);
    store_row(destination, row, item.h, o.stride_w, to);
  }
  c.release(copy);
}

static void run_byte_pool(const Context& c, const BytePool& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const int32_t* offsets = c.constants<int32_t>(o.offsets_at);
  float pooled[LANES + 32];
  for (int64_t number = begin; number < end; ++number) {
    RowItem item(destination, number);
    const float* row =
        channel_of(source, c.image(o.source, item.image), item.channel) + item.h * source.row;
    float* to = channel_of(destination, c.image(o.destination, item.image), item.channel);
    for (int64_t w = 0; w < destination.width; w += LANES) {
      Vector largest = load_window(row + w * o.step + offsets[0], o.step);
      for (int64_t t = 1; t < o.count; ++t)
        largest = maximum_of_bytes(load_window(row + w * o.step + offsets[t], o.step), largest);
      store(pooled, largest);
      Segments segments;
      row_segments(segments, destination, item.h, w, minimum(LANES, destination.width - w), 0, 1);
      copy_segments(segments, pooled, to);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Convolutions
// ---------------------------------------------------------------------------------------------

template <class Operation>
INLINE Requantization requantization(const Context& c, const Operation& o, int64_t shift_at,
                                     int64_t low, int64_t high) {
  return {c.constants<float>(o.scale_at),         c.constants<float>(shift_at),
          broadcast(as_float(o.residual_scale)),  broadcast(as_float(low)),
          broadcast(as_float(high)),              o.to_bytes != FLOATS,
          o.to_bytes != SATURATED_BYTES};
}

// Computes an output-channel tile for one pixel tile.
static void byte_pointwise_tile(const Context& c, const BytePointwise& o,
                                const BytePointwiseArguments& common, int64_t quads,
                                int64_t vectors, int64_t output_tile) {
  int64_t input_tiles = ceil_div(quads, o.input_tile_size);
  BytePointwiseArguments a = common;
  a.count = o.output_tile_size / 4;
  for (int64_t i = 0; i < input_tiles; ++i) {
    a.tiles = c.constants<QuadTile>(o.tiles_at) + (output_tile * input_tiles + i) * a.count;
    a.is_first = i == 0;
    bool last = i == input_tiles - 1;
    for (int64_t v = 0; v < vectors; v += MAX_BYTE_VECTORS) {
      int64_t skipped = v * LANES, count = minimum(MAX_BYTE_VECTORS, vectors - v);
      a.source = common.source + (i * o.input_tile_size * common.size + skipped) * sizeof(float);
      a.sums = common.sums + skipped;
      a.target = last ? common.target + skipped : nullptr;
      a.residual = common.residual ? common.residual + skipped : nullptr;
      (o.narrow ? byte_pointwise_kernel<NarrowBytes>(count)
                : byte_pointwise_kernel<Bytes>(count))(a);
    }
  }
}

static void run_byte_pointwise(const Context& c, const BytePointwise& o, int64_t begin,
                               int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t output_tiles = ceil_div(o.channels, o.output_tile_size);
  int64_t pixels = source.height * source.width, pixel_tiles = ceil_div(pixels, source.tile);
  bool direct = destination.kind == TILES;
  alignas(64) float sums[MAX_OUTPUT_TILE * MAX_TILE], results[MAX_OUTPUT_TILE * MAX_TILE + 48];
  Segments segments;
  BytePointwiseArguments a{};
  a.indices = c.constants<uint16_t>(o.indices_at), a.weights = c.constants<float>(o.weights_at);
  a.size = source.tile, a.sums = sums;
  const Requantization all = requantization(c, o, o.shift_at, o.low, o.high);
  a.requantization = all;
  for (int64_t item = begin, last = -1; item < end; ++item) {
    int64_t output_tile = item % output_tiles, tile = item / output_tiles % pixel_tiles;
    int64_t image = item / output_tiles / pixel_tiles;
    int64_t pixel = tile * source.tile, count = minimum(source.tile, pixels - pixel);
    int64_t first = output_tile * o.output_tile_size;
    int64_t first_stored = all.to_bytes ? first / 4 : first;
    int64_t to = tile * destination.total * destination.tile;
    auto channel = [&](int64_t view, int64_t k) {
      return channel_of(c.views[view], c.image(view, image), first_stored + k);
    };
    a.source = reinterpret_cast<const char*>(channel_of(source, c.image(o.source, image), 0) +
                                             tile * source.total * source.tile);
    a.channels = minimum(o.output_tile_size, o.channels - first);
    a.target = direct ? channel(o.destination, 0) + to : results;
    a.residual = o.residual >= 0 ? channel(o.residual, 0) + to : nullptr;  // only if direct
    a.requantization.scale = all.scale + first, a.requantization.shift = all.shift + first;
    byte_pointwise_tile(c, o, a, source.channels, ceil_div(count, LANES), output_tile);
    if (direct) continue;
    if (tile != last) {
      segments.count = 0;
      pixel_segments(segments, destination, pixel, count);
      last = tile;
    }
    int64_t stored = all.to_bytes ? ceil_div(a.channels, 4) : a.channels;
    for (int64_t k = 0; k < stored; ++k)
      copy_segments(segments, results + k * source.tile, channel(o.destination, k));
  }
}

// Merges the quads of a list of taps: copies of vectors of any four channels each.
INLINE void merge_quads(const Context& c, const ByteSpatial& o, const float* from, int64_t list,
                        float* merged) {
  const int32_t* starts = c.constants<int32_t>(o.merged_at) + list;
  const int32_t* vectors = c.constants<int32_t>(o.vectors_at);
  const int32_t* sources = c.constants<int32_t>(o.sources_at) + 4 * starts[0];
  for (int32_t i = starts[0]; i < starts[1]; ++i, sources += 4) {
    const float* channels[4];
    ByteChoice choices[4];
    UNROLL for (int j = 0; j < 4; ++j) {
      channels[j] = from + sources[j] / 4;
      choices[j] = byte_choice(sources[j] % 4, j);
    }
    for (int64_t v = 0; v < o.vectors; ++v, merged += LANES) {
      Vector bytes = splat(0.0f);
      UNROLL for (int j = 0; j < 4; ++j)
        bytes = with_byte(bytes, load(channels[j] + vectors[v]), choices[j]);
      store(merged, bytes);
    }
  }
}

// Adds the contribution of an input-channel tile to the sums of four output channels.
template <class Math>
INLINE void byte_spatial_channels(const Context& c, const ByteSpatial& o, const SpatialItem& item,
                                  int64_t input_tile, int64_t channel, float* merged,
                                  float* sums) {
  const Spatial& convolution = o.convolution;
  bool is_first = input_tile == 0;
  if (!o.shared) {
    int64_t stop = minimum(channel + SHARED_OUTPUTS, convolution.channels);
    for (int64_t k = channel; k < stop; ++k, sums += SUMS)
      spatial_channel<Math>(c, convolution, item, input_tile, k, is_first, sums);
    return;
  }
  int64_t list = tap_list(convolution, input_tile, channel), distance = convolution.row_stride;
  const float* from = item.from;
  if (o.merged_at >= 0) {
    merge_quads(c, o, item.from, list, merged);
    from = merged, distance = o.merged_stride;
  }
  spatial_taps<Math>(c, convolution, item, from, distance, list, is_first, sums);
}

static void run_byte_spatial(const Context& c, const ByteSpatial& operation, int64_t begin,
                             int64_t end) {
  const Spatial& o = operation.convolution;
  const View& destination = c.views[o.destination];
  alignas(64) float sums[MAX_SPILLED * SUMS + 48];
  const Requantization r = requantization(c, operation, o.bias_at, o.low, o.high);
  int64_t stride = channel_of(destination, nullptr, 1) - channel_of(destination, nullptr, 0);
  float* merged = c.scratch(operation.most_merged * operation.vectors * LANES + 2 * LANES);
  SpatialItem item(c, o);
  for (int64_t i = begin; i < end; ++i) {
    item.move_to(i);
    for (int64_t input_tile = 0; input_tile < o.input_tiles; ++input_tile) {
      for (int64_t first = item.start; first < item.stop; first += 4) {
        float* first_sums = sums + (o.input_tiles > 1 ? (first - item.start) * SUMS : 0);
        if (operation.narrow)
          byte_spatial_channels<NarrowBytes>(c, operation, item, input_tile, first, merged,
                                             first_sums);
        else
          byte_spatial_channels<Bytes>(c, operation, item, input_tile, first, merged, first_sums);
        if (input_tile < o.input_tiles - 1) continue;
        int64_t stored = r.to_bytes ? first / 4 : first;
        const float* residual = o.residual >= 0 ? item.channel(o.residual, stored) : nullptr;
        QuadSums quad{first_sums, SUMS,     item.channel(o.destination, stored),
                      residual,   item.segments.segment, item.segments.count};
        store_results(r, first, minimum(4, item.stop - first), quad, stride);
      }
    }
  }
  c.release(merged);
}

// Adds the bytes of each channel of a quad, in `count` lanes.
INLINE void add_bytes(const float* lanes, int64_t count, int64_t (&sums)[4]) {
  Vector parts[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int64_t i = 0; i < count; i += LANES) {
    Vector quads = splat(0.0f);
    if (count - i >= LANES) {
      quads = load(lanes + i);
    } else {
      float rest[LANES] = {};
      __builtin_memcpy(rest, lanes + i, (count - i) * sizeof(float));
      quads = load(rest);
    }
    UNROLL for (int j = 0; j < 4; ++j)
      UNROLL for (int p = 0; p < PARTS; ++p)
        parts[j].part[p] = as_lanes(as_ints(parts[j].part[p]) +
                                    ((as_ints(quads.part[p]) >> (8 * j)) & 255));
  }
  for (int j = 0; j < 4; ++j) sums[j] += total_of_ints(parts[j]);
}

static void run_byte_mean(const Context& c, const ByteMean& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t at = pixel_at(destination), pixels = source.height * source.width;
  double zeros = static_cast<double>(pixels) * as_float(o.zero_point);
  double factor = as_float(o.scale) / static_cast<double>(pixels);
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t quad = item % source.channels, image = item / source.channels;
    float* from = channel_of(source, c.image(o.source, image), quad);
    int64_t sums[4] = {};
    if (source.kind == TILES) {
      for (int64_t pixel = 0; pixel < pixels; pixel += source.tile)
        add_bytes(from + pixel * source.total, minimum(source.tile, pixels - pixel), sums);
    } else {
      for (int64_t h = 0; h < source.height; ++h)
        add_bytes(row_of(source, from, h, copy), source.width, sums);
    }
    for (int64_t j = 0; j < minimum(4, destination.channels - 4 * quad); ++j)
      channel_of(destination, c.image(o.destination, image), 4 * quad + j)[at] =
          static_cast<float>((static_cast<double>(sums[j]) - zeros) * factor);
  }
  c.release(copy);
}

static void run_byte_linear(const Context& c, const ByteLinear& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float *scale = c.constants<float>(o.scale_at), *shift = c.constants<float>(o.shift_at);
  int64_t at = pixel_at(destination), lanes = o.row / 4;
  Epilogue e = epilogue(o.low, o.high);
  float* x = c.scratch(lanes);
  for (int64_t n = 0; n < c.batch; ++n) {
    const float* from = channel_of(source, c.image(o.source, n), 0);
    __builtin_memset(x, 0, lanes * sizeof(float));
    __builtin_memcpy(x, from, source.channels * sizeof(float));
    for (int64_t k = begin; k < end; ++k) {
      const float* weights = c.constants<float>(o.weights_at) + k * lanes;
      auto sum = static_cast<float>(o.narrow ? byte_product<NarrowBytes>(x, weights, lanes)
                                             : byte_product<Bytes>(x, weights, lanes));
      float result = fused({{broadcast(sum)}}, broadcast(scale[k]), splat(shift[k])).part[0][0];
      channel_of(destination, c.image(o.destination, n), k)[at] = clamped(result, e);
    }
  }
  c.release(x);
}

static void run_byte_items(const Context& c, int64_t opcode, const void* operation, int64_t begin,
                           int64_t end) {
  switch (opcode) {
    case QUANTIZE: return run_quantize(c, *static_cast<const Quantize*>(operation), begin, end);
    case DEQUANTIZE:
      return run_dequantize(c, *static_cast<const Dequantize*>(operation), begin, end);
    case BYTE_COPY: return run_byte_copy(c, *static_cast<const ByteCopy*>(operation), begin, end);
    case BYTE_POINTWISE:
      return run_byte_pointwise(c, *static_cast<const BytePointwise*>(operation), begin, end);
    case BYTE_SPATIAL:
      return run_byte_spatial(c, *static_cast<const ByteSpatial*>(operation), begin, end);
    case BYTE_POOL: return run_byte_pool(c, *static_cast<const BytePool*>(operation), begin, end);
    case BYTE_MEAN: return run_byte_mean(c, *static_cast<const ByteMean*>(operation), begin, end);
    case BYTE_LINEAR:
      return run_byte_linear(c, *static_cast<const ByteLinear*>(operation), begin, end);
    default: return;
  }
}

}  // namespace STARFIRE_ISA
