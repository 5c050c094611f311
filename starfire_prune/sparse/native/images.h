// Operations that read each pixel of an image once: copies with what is computed on the way, and means.
// Compiled once for each instruction set. Each function runs the work items [begin, end) of an
// operation on one thread.

namespace STARFIRE_ISA {

// The factor and the summand of a channel of an image. A factor of one pixel is part of the scale.
struct ChannelScale {
  float scale = 1.0f, shift = 0.0f;

  ChannelScale(const Context& c, const Copy& o, int64_t image, int64_t channel) {
    if (o.scale_at >= 0) {
      scale = c.constants<float>(o.scale_at)[channel];
      shift = c.constants<float>(o.shift_at)[channel];
    }
    if (is_gated(c.views, o)) {
      const View& factor = c.views[o.factor];
      scale *= channel_of(factor, c.image(o.factor, image), channel)[pixel_at(factor)];
    }
  }
};

// The channel of an operand in the destination's layout; null if there is none.
INLINE const float* operand_of(const Context& c, int64_t view, int64_t image, int64_t channel) {
  return view < 0 ? nullptr : channel_of(c.views[view], c.image(view, image), channel);
}

static void copy_rows(const Context& c, const Copy& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  bool gated = is_gated(c.views, o), scaled = gated || o.scale_at >= 0;
  Epilogue e = epilogue(o.low, o.high, o.activation);
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % destination.height, channel = item / destination.height;
    int64_t image = channel / destination.channels;
    channel %= destination.channels;
    const float* row = row_of(source, channel_of(source, c.image(o.source, image), channel),
                              h * o.stride_h, copy);
    ChannelScale factors(c, o, image, channel);
    e.scale = scaled ? &factors.scale : nullptr;
    e.shift = scaled ? &factors.shift : nullptr;
    e.residual = operand_of(c, o.residual, image, channel);
    e.factor = gated ? nullptr : operand_of(c, o.factor, image, channel);
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

// Of equal tiles of pixels: an item is a channel of a tile.
static void copy_tiles(const Context& c, const Copy& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t tile = destination.tile, pixels = destination.height * destination.width;
  int64_t tiles = ceil_div(pixels, tile);
  bool gated = is_gated(c.views, o), scaled = gated || o.scale_at >= 0;
  Epilogue e = epilogue(o.low, o.high, o.activation);
  for (int64_t item = begin; item < end; ++item) {
    int64_t channel = item % destination.channels, place = item / destination.channels;
    int64_t at = place % tiles, image = place / tiles;
    auto moved = [&](int64_t view) {
      return view < 0 ? nullptr
                      : channel_of(c.views[view], c.image(view, image), channel) +
                            at * c.views[view].total * tile;
    };
    ChannelScale factors(c, o, image, channel);
    e.scale = scaled ? &factors.scale : nullptr;
    e.shift = scaled ? &factors.shift : nullptr;
    e.residual = moved(o.residual);
    e.factor = gated ? nullptr : moved(o.factor);
    Segment segment{0, 1, minimum(tile, ceil_div(pixels - at * tile, LANES) * LANES), 0};
    float* to = moved(o.destination);
    store_segment<1>(segment, moved(o.source), to, e);
    if (e.activation != NO_ACTIVATION) activate_floats(e.activation, to, segment.count);
  }
}

static void run_copy(const Context& c, const Copy& o, int64_t begin, int64_t end) {
  if (is_of_tiles(c.views, o))
    copy_tiles(c, o, begin, end);
  else
    copy_rows(c, o, begin, end);
}

// The sum of `count` floats, or of their squares; up to 15 floats after them are read.
INLINE float sum_of(const float* from, int64_t count, bool squares) {
  Vector sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  auto term = [&](const float* at) {
    Vector value = load(at);
    return squares ? multiply(value, value) : value;
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], term(from + i + j * LANES));
  for (; i + LANES <= count; i += LANES) sums[0] = add(sums[0], term(from + i));
  float rest[LANES] = {};
  for (int64_t j = 0; i + j < count; ++j) rest[j] = from[i + j];
  return total(add(add(sums[0], sums[1]), add(sums[2], add(sums[3], term(rest)))));
}

// The sum of a channel's pixels, or of their squares.
static double channel_sum(const View& view, float* channel, bool squares, float* copy) {
  double sum = 0.0;
  int64_t pixels = view.height * view.width;
  if (view.kind == TILES) {
    for (int64_t pixel = 0; pixel < pixels; pixel += view.tile)
      sum += sum_of(channel + pixel * view.total, minimum(view.tile, pixels - pixel), squares);
  } else {
    for (int64_t h = 0; h < view.height; ++h)
      sum += sum_of(row_of(view, channel, h, copy), view.width, squares);
  }
  return sum;
}

static void run_mean(const Context& c, const Mean& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t at = pixel_at(destination);
  auto pixels = static_cast<double>(source.height * source.width);
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t channel = item % source.channels, image = item / source.channels;
    float* from = channel_of(source, c.image(o.source, image), channel);
    double sum = channel_sum(source, from, o.mode == EUCLIDEAN, copy);
    double result = o.mode == EUCLIDEAN ? __builtin_sqrt(sum) : sum / pixels;
    channel_of(destination, c.image(o.destination, image), channel)[at] = static_cast<float>(result);
  }
  c.release(copy);
}

// An item is an image.
static void run_response(const Context& c, const Response& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t from = pixel_at(source), to = pixel_at(destination);
  for (int64_t image = begin; image < end; ++image) {
    double sum = 0.0;
    for (int64_t k = 0; k < source.channels; ++k)
      sum += channel_of(source, c.image(o.source, image), k)[from];
    auto mean = static_cast<float>(sum / static_cast<double>(source.channels));
    float factor = 1.0f / (mean + as_float(o.epsilon));
    for (int64_t k = 0; k < source.channels; ++k)
      channel_of(destination, c.image(o.destination, image), k)[to] =
          channel_of(source, c.image(o.source, image), k)[from] * factor;
  }
}

static void run_upsample(const Context& c, const Upsample& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  Epilogue e = epilogue(INFINITE_LOW, INFINITE_HIGH);
  float *copy = c.scratch(source.width + 48), *repeated = c.scratch(destination.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % destination.height, channel = item / destination.height;
    int64_t image = channel / destination.channels;
    channel %= destination.channels;
    const float* row = row_of(source, channel_of(source, c.image(o.source, image), channel),
                              h / o.factor_h, copy);
    for (int64_t w = 0; w < source.width; ++w)
      for (int64_t j = 0; j < o.factor_w; ++j) repeated[w * o.factor_w + j] = row[w];
    float* to = channel_of(destination, c.image(o.destination, image), channel);
    constexpr int64_t SEGMENT = LANES * 64;
    for (int64_t w = 0; w < destination.width; w += SEGMENT) {
      Segments segments;
      row_segments(segments, destination, h, w, minimum(SEGMENT, destination.width - w), w, 1);
      store_segments(segments, repeated, to, e);
    }
  }
  c.release(copy);
  c.release(repeated);
}

// ---------------------------------------------------------------------------------------------
// Layer norms over channels
// ---------------------------------------------------------------------------------------------

// The mean of sixteen pixels' channels, `distance` floats apart, or with `mean` their variance.
INLINE Vector channel_mean(const float* from, int64_t channels, int64_t distance, const Vector* mean) {
  Vector sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  auto term = [&](int64_t k) {
    Vector value = load(from + k * distance);
    if (!mean) return value;
    value = subtract(value, *mean);
    return multiply(value, value);
  };
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4)
    UNROLL for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], term(k + j));
  for (; k < channels; ++k) sums[0] = add(sums[0], term(k));
  Vector sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
  return multiply(sum, splat(1.0f / static_cast<float>(channels)));
}

// An item is sixteen pixels of a tile.
static void run_channel_norm(const Context& c, const ChannelNorm& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float *scale = c.constants<float>(o.scale_at), *shift = c.constants<float>(o.shift_at);
  int64_t pixels = source.height * source.width, items = ceil_div(pixels, LANES);
  bool direct = destination.kind == TILES && destination.tile == source.tile;
  Epilogue e = epilogue(INFINITE_LOW, INFINITE_HIGH);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image = item / items, pixel = item % items * LANES;
    int64_t tile = pixel / source.tile, within = pixel % source.tile;
    auto at = [&](const View& view, int64_t number, int64_t channel) {
      return channel_of(view, c.image(number, image), channel);
    };
    const float* from = at(source, o.source, 0) + tile * source.total * source.tile + within;
    Vector mean = channel_mean(from, source.channels, source.tile, nullptr);
    Vector variance = channel_mean(from, source.channels, source.tile, &mean);
    Vector factor = inverse_root(add(variance, splat(as_float(o.epsilon))));
    Segments segments;
    if (!direct) pixel_segments(segments, destination, pixel, minimum(LANES, pixels - pixel));
    float* to = at(destination, o.destination, 0) + tile * destination.total * source.tile + within;
    float row[LANES + 32];
    for (int64_t k = 0; k < source.channels; ++k) {
      Vector value = multiply(subtract(load(from + k * source.tile), mean), factor);
      Vector sum = splat(shift[k]);
      multiply_add(sum, broadcast(scale[k]), value);
      store(direct ? to + k * source.tile : row, sum);
      if (!direct) store_segments(segments, row, at(destination, o.destination, k), e);
    }
  }
}

}  // namespace STARFIRE_ISA
