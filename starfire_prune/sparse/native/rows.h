// Reading and writing image rows in any layout, and the epilogue that finishes an output row.
// Compiled once for each instruction set.

namespace STARFIRE_ISA {

// `count` floats of a finished row: every `step`-th from `from` on is copied to `to` and after it.
// Both are relative to the caller's pointers.
struct Segment {
  int32_t from, step;
  int64_t count, to;
};

struct Segments {
  Segment segment[MAX_SEGMENTS];
  int count = 0;

  void push(int64_t from, int64_t step, int64_t length, int64_t to) {
    if (length > 0)
      segment[count++] = {static_cast<int32_t>(from), static_cast<int32_t>(step), length, to};
  }
};

INLINE float* channel_of(const View& view, float* image, int64_t channel) {
  int64_t size = view.kind == TILES ? view.tile : view.phases_h * view.phases_w * view.plane;
  return image + (view.first + channel) * size;
}

// The offset of an image row in the planes of its phase.
INLINE int64_t row_at(const View& view, int64_t h) {
  int64_t top = h + view.top;
  return top % view.phases_h * view.phases_w * view.plane + top / view.phases_h * view.row;
}

// The offset within its channel of the only pixel of a 1x1 image.
INLINE int64_t pixel_at(const View& view) {
  if (view.kind == TILES) return 0;
  return row_at(view, 0) + view.left % view.phases_w * view.plane + view.left / view.phases_w;
}

INLINE int64_t minimum(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Segments for `length` pixels of row h from column w on, relative to the image's channel.
INLINE void row_segments(Segments& segments, const View& view, int64_t h, int64_t w, int64_t length,
                         int64_t from, int64_t step) {
  if (view.kind == TILES) {
    int64_t pixel = h * view.width + w;
    while (length > 0) {
      int64_t tile = pixel / view.tile, within = pixel % view.tile;
      int64_t count = minimum(length, view.tile - within);
      segments.push(from, step, count, tile * view.total * view.tile + within);
      from += count * step, pixel += count, length -= count;
    }
    return;
  }
  int64_t base = row_at(view, h), phases = view.phases_w;
  for (int64_t j = 0; j < phases; ++j) {
    int64_t left = w + j + view.left;
    segments.push(from + j * step, step * phases, (length - j + phases - 1) / phases,
                  base + left % phases * view.plane + left / phases);
  }
}

// Segments for the pixels [pixel, pixel + count) of a flattened image.
INLINE void pixel_segments(Segments& segments, const View& view, int64_t pixel, int64_t count) {
  for (int64_t done = 0; done < count;) {
    int64_t h = (pixel + done) / view.width, w = (pixel + done) % view.width;
    int64_t length = view.kind == TILES ? count - done : minimum(count - done, view.width - w);
    row_segments(segments, view, h, w, length, done, 1);
    done += length;
  }
}

struct Epilogue {
  const float* scale;  // of this channel, or null
  const float* shift;
  const float* residual;
  const float* factor;  // of each result, or null; like the residual, in the destination's layout
  Register low, high;
  int64_t activation;
};

template <int STEP>
INLINE Vector load_steps(const float* from, int64_t step, int64_t count) {
  if (STEP == 1) return load(from);
  if (STEP == 2) return load_even(from);
  float values[LANES] = {};
  for (int64_t j = 0; j < minimum(LANES, count); ++j) values[j] = from[j * step];
  return load(values);
}

INLINE Vector load_any_steps(const float* from, int64_t step, int64_t count) {
  if (step == 1) return load(from);
  return step == 2 ? load_even(from) : load_steps<0>(from, step, count);
}

INLINE void store_lanes(float* to, const Vector& value, int64_t left) {
  if (left >= LANES)
    store(to, value);
  else
    store_first(to, value, left);
}

// Applies the epilogue and stores a segment. Reads up to 32 floats past the end of the source.
template <int STEP>
INLINE void store_segment(const Segment& s, const float* source, float* destination,
                          const Epilogue& e) {
  const float* from = source + s.from;
  float* to = destination + s.to;
  const float* residual = e.residual ? e.residual + s.to : nullptr;
  const float* factor = e.factor ? e.factor + s.to : nullptr;
  for (int64_t left = s.count; left > 0; left -= LANES) {
    Vector value = load_steps<STEP>(from, s.step, left);
    if (factor) {
      value = multiply(value, load(factor));
      factor += LANES;
    }
    if (e.scale) {
      Vector sum = splat(*e.shift);
      multiply_add(sum, broadcast(*e.scale), value);
      value = sum;
    }
    if (residual) {
      value = add(value, load(residual));
      residual += LANES;
    }
    value = clamp(value, e.low, e.high);
    store_lanes(to, value, left);
    from += LANES * s.step, to += LANES;
  }
}

// Copies lanes as they are, whatever their bits are.
INLINE void copy_segments(const Segments& segments, const float* source, float* destination) {
  for (int i = 0; i < segments.count; ++i) {
    const Segment s = segments.segment[i];
    const float* from = source + s.from;
    float* to = destination + s.to;
    for (int64_t left = s.count; left > 0; left -= LANES) {
      store_lanes(to, load_any_steps(from, s.step, left), left);
      from += LANES * s.step, to += LANES;
    }
  }
}

INLINE void store_segments(const Segments& segments, const float* source, float* destination,
                           const Epilogue& epilogue) {
  const Epilogue e = epilogue;  // a copy, which stores can't alias
  const int count = segments.count;
  for (int i = 0; i < count; ++i) {
    const Segment segment = segments.segment[i];
    if (segment.step == 1)
      store_segment<1>(segment, source, destination, e);
    else if (segment.step == 2)
      store_segment<2>(segment, source, destination, e);
    else
      store_segment<0>(segment, source, destination, e);
  }
  if (e.activation == NO_ACTIVATION) return;
  for (int i = 0; i < count; ++i) {
    const Segment segment = segments.segment[i];
    activate_floats(e.activation, destination + segment.to, segment.count);
  }
}

INLINE float as_float(int64_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);  // the lower half, on little-endian machines
  return value;
}

// The bits of floats.
constexpr int64_t INFINITE_LOW = 0xff800000, INFINITE_HIGH = 0x7f800000;

// Of the bits of two bounds.
INLINE Epilogue epilogue(int64_t low, int64_t high, int64_t activation = NO_ACTIVATION) {
  return {nullptr, nullptr, nullptr, nullptr, broadcast(as_float(low)), broadcast(as_float(high)),
          activation};
}

INLINE float clamped(float value, const Epilogue& e) {
  value = value < e.low[0] ? e.low[0] : value;
  return value > e.high[0] ? e.high[0] : value;
}

INLINE Vector load_window(const float* from, int64_t step) {
  return step == 2 ? load_even(from) : load(from);
}

// All columns of an image row, contiguous; up to 32 floats past the end may be read. `copy` is used
// where the layout doesn't store the row like that.
INLINE const float* row_of(const View& view, float* channel, int64_t h, float* copy) {
  if (view.kind == TILES) {
    int64_t pixel = h * view.width;
    if (pixel / view.tile == (pixel + view.width - 1) / view.tile)
      return channel + pixel / view.tile * view.total * view.tile + pixel % view.tile;
    for (int64_t w = 0; w < view.width;) {
      int64_t tile = (pixel + w) / view.tile, within = (pixel + w) % view.tile;
      int64_t count = minimum(view.width - w, view.tile - within);
      __builtin_memcpy(copy + w, channel + tile * view.total * view.tile + within,
                       count * sizeof(float));
      w += count;
    }
    return copy;
  }
  int64_t phases = view.phases_w;
  const float* base = channel + row_at(view, h);
  if (phases == 1) {
    if (view.place == WORKSPACE) return base + view.left;
    __builtin_memcpy(copy, base + view.left, view.width * sizeof(float));
    return copy;
  }
  for (int64_t w = 0; w < view.width; ++w) {
    int64_t left = w + view.left;
    copy[w] = base[left % phases * view.plane + left / phases];
  }
  return copy;
}

}  // namespace STARFIRE_ISA
