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

// The sum of `count` floats; up to 15 after them are read.
INLINE float sum_of(const float* from, int64_t count) {
  Vector sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    UNROLL for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], load(from + i + j * LANES));
  for (; i + LANES <= count; i += LANES) sums[0] = add(sums[0], load(from + i));
  float rest[LANES] = {};
  for (int64_t j = 0; i + j < count; ++j) rest[j] = from[i + j];
  return total(add(add(sums[0], sums[1]), add(sums[2], add(sums[3], load(rest)))));
}

static void run_mean(const Context& c, const Mean& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  int64_t at = pixel_at(destination), pixels = source.height * source.width;
  float* copy = c.scratch(source.width + 48);
  for (int64_t item = begin; item < end; ++item) {
    int64_t channel = item % source.channels, image = item / source.channels;
    float* from = channel_of(source, c.image(o.source, image), channel);
    double sum = 0.0;
    if (source.kind == TILES) {
      for (int64_t pixel = 0; pixel < pixels; pixel += source.tile)
        sum += sum_of(from + pixel * source.total, minimum(source.tile, pixels - pixel));
    } else {
      for (int64_t h = 0; h < source.height; ++h)
        sum += sum_of(row_of(source, from, h, copy), source.width);
    }
    double mean = sum / static_cast<double>(pixels);
    channel_of(destination, c.image(o.destination, image), channel)[at] = static_cast<float>(mean);
  }
  c.release(copy);
}

}  // namespace STARFIRE_ISA
