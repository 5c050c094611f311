// Linear layers of floats. Compiled once for each instruction set. Each function runs the work items
// [begin, end) of an operation on one thread.

namespace STARFIRE_ISA {

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

// Finishes the results of `count` channels and stores them, each as the pixel `at`.
INLINE void store_features(const View& view, float* image, int64_t at, int64_t first, int64_t count,
                           float* results, const Epilogue& e) {
  if (e.activation != NO_ACTIVATION) activate_floats(e.activation, results, count);
  for (int64_t k = 0; k < count; ++k)
    channel_of(view, image, first + k)[at] = clamped(results[k], e);
}

static void linear_images(const Context& c, const Linear& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float* bias = c.constants<float>(o.bias_at);
  int64_t at = pixel_at(destination);
  Epilogue e = epilogue(o.low, o.high, o.activation);
  for (int64_t first = begin; first < end; first += LANES) {
    int64_t count = minimum(LANES, end - first);
    for (int64_t n = 0; n < c.batch; ++n) {
      const float* x = channel_of(source, c.image(o.source, n), 0);
      float results[LANES] = {};
      for (int64_t k = 0; k < count; ++k) {
        WeightRow row = weight_row(c, o, first + k, source.channels);
        float sum = row.indices ? sparse_product(x, row.indices, row.weights, row.count)
                                : dense_product(x, row.weights, row.count);
        results[k] = sum + bias[first + k];
      }
      store_features(destination, c.image(o.destination, n), at, first, count, results, e);
    }
  }
}

static void linear_batches(const Context& c, const Linear& o, int64_t begin, int64_t end) {
  const View &source = c.views[o.source], &destination = c.views[o.destination];
  const float* bias = c.constants<float>(o.bias_at);
  int64_t at = pixel_at(destination);
  Epilogue e = epilogue(o.low, o.high, o.activation);
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
      if (e.activation != NO_ACTIVATION) activate_floats(e.activation, values, LANES);
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

}  // namespace STARFIRE_ISA
