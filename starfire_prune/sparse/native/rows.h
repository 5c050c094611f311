// Rows of images where their layouts put them, and what finishes a row, compiled once for each
// instruction set as kernels.h is.

namespace STARFIRE_ISA {

// `count` floats of a finished row, every `step`-th from `from` on, that go to `to`, both relative.
struct Segment {
  int32_t from, step;
  int64_t count, to;
};

struct Segments {
  Segment segment[MOST_SEGMENTS];
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

// Where a row of an image begins in a phase's planes.
INLINE int64_t row_at(const View& view, int64_t h) {
  int64_t top = h + view.top;
  return top % view.phases_h * view.phases_w * view.plane + top / view.phases_h * view.row;
}

// Where the only pixel of an image of one pixel lies in its channel.
INLINE int64_t pixel_at(const View& view) {
  if (view.kind == TILES) return 0;
  return row_at(view, 0) + view.left % view.phases_w * view.plane + view.left / view.phases_w;
}

INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE int64_t ceiling(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Where `length` pixels of row h from column w on go: relative to the channel of the image.
INLINE void row_segments(Segments& segments, const View& view, int64_t h, int64_t w, int64_t length,
                         int64_t from, int64_t step) {
  if (view.kind == TILES) {
    int64_t pixel = h * view.width + w;
    while (length > 0) {
      int64_t tile = pixel / view.tile, within = pixel % view.tile;
      int64_t part = smaller(length, view.tile - within);
      segments.push(from, step, part, tile * view.total * view.tile + within);
      from += part * step, pixel += part, length -= part;
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

struct Epilogue {
  const float* scale;  // of this channel, or null
  const float* shift;
  const float* residual;
  Register low, high;
};

template <int STEP>
INLINE Vector load_steps(const float* from, int64_t step, int64_t count) {
  if (STEP == 1) return load(from);
  if (STEP == 2) return load_even(from);
  float values[LANES] = {};
  for (int64_t j = 0; j < smaller(LANES, count); ++j) values[j] = from[j * step];
  return load(values);
}

// Finishes and stores a segment. The source may be read up to 32 floats past its end.
template <int STEP>
INLINE void put(const Segment& s, const float* source, float* destination, const Epilogue& e) {
  const float* from = source + s.from;
  float* to = destination + s.to;
  const float* residual = e.residual ? e.residual + s.to : nullptr;
  for (int64_t left = s.count; left > 0; left -= LANES) {
    Vector value = load_steps<STEP>(from, s.step, left);
    if (e.scale) {
      Vector sum = all(*e.shift);
      multiply_add(sum, broadcast(*e.scale), value);
      value = sum;
    }
    if (residual) {
      value = add(value, load(residual));
      residual += LANES;
    }
    value = clamp(value, e.low, e.high);
    if (left >= LANES)
      store(to, value);
    else
      store_first(to, value, left);
    from += LANES * s.step, to += LANES;
  }
}

INLINE void put_all(const Segments& segments, const float* source, float* destination,
                    const Epilogue& epilogue) {
  const Epilogue e = epilogue;  // a copy, which no store can change
  const int count = segments.count;
  for (int i = 0; i < count; ++i) {
    const Segment segment = segments.segment[i];
    if (segment.step == 1)
      put<1>(segment, source, destination, e);
    else if (segment.step == 2)
      put<2>(segment, source, destination, e);
    else
      put<0>(segment, source, destination, e);
  }
}

INLINE float as_float(int64_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);  // the lower half, on little-endian machines
  return value;
}

template <class Operation>
INLINE Epilogue epilogue(const Operation& o) {
  return {nullptr, nullptr, nullptr, broadcast(as_float(o.low)), broadcast(as_float(o.high))};
}

// A row of an image, of all columns, in one piece that 32 floats may be read past the end of.
INLINE const float* row_of(const View& view, float* channel, int64_t h, float* copy) {
  if (view.kind == TILES) {
    int64_t pixel = h * view.width;
    if (pixel / view.tile == (pixel + view.width - 1) / view.tile)
      return channel + pixel / view.tile * view.total * view.tile + pixel % view.tile;
    for (int64_t w = 0; w < view.width;) {
      int64_t tile = (pixel + w) / view.tile, within = (pixel + w) % view.tile;
      int64_t part = smaller(view.width - w, view.tile - within);
      __builtin_memcpy(copy + w, channel + tile * view.total * view.tile + within,
                       part * sizeof(float));
      w += part;
    }
    return copy;
  }
  int64_t phases = view.phases_w;
  const float* base = channel + row_at(view, h);
  if (phases == 1) {
    if (view.place == ARENA) return base + view.left;
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
