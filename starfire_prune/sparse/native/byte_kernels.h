// The innermost loops of 1x1 convolutions of bytes, and the step from sums to results. Compiled once
// for each instruction set.

namespace STARFIRE_ISA {

// What turns the sums of all output channels into results.
struct Requantization {
  const float *scale, *shift;  // of each output channel
  Register residual_scale, low, high;
  bool to_bytes, is_clamped;
};

// The results of an output channel in floats, for sums and, with HAS_RESIDUAL, what is added to them.
template <bool HAS_RESIDUAL, bool IS_CLAMPED>
INLINE Vector result_of(const Requantization& r, Register scale, const Vector& shift,
                        const Vector& sum, const Vector& added) {
  Vector value = fused(floats_of_ints(sum), scale, shift);
  if (HAS_RESIDUAL) value = fused(added, r.residual_scale, value);
  return IS_CLAMPED ? clamp(value, r.low, r.high) : value;
}

// The sums of four output channels, `stride` floats from each other, and where their results go: to
// the places of these segments in a quad, which may be added to.
struct QuadSums {
  const float* sums;
  int64_t stride;
  float* to;
  const float* residual;  // may be null
  const Segment* segments;
  int count;
};

// Stores the bytes of four output channels from `channel` on. All of them have a scale and a shift.
template <bool HAS_RESIDUAL, bool IS_CLAMPED>
void store_bytes(const Requantization& requantization, int64_t channel, const QuadSums& quad) {
  const Requantization r = requantization;  // copies, which stores can't alias
  const QuadSums q = quad;
  Register scale[4];
  Vector shift[4];
  UNROLL for (int j = 0; j < 4; ++j) {
    scale[j] = broadcast(r.scale[channel + j]);
    shift[j] = splat(r.shift[channel + j]);
  }
  for (int i = 0; i < q.count; ++i) {
    const Segment s = q.segments[i];
    for (int64_t done = 0; done < s.count; done += LANES) {
      Vector added{}, results[4];
      if (HAS_RESIDUAL) added = load(q.residual + s.to + done);
      UNROLL for (int j = 0; j < 4; ++j) {
        const float* from = q.sums + j * q.stride + s.from + done * s.step;
        Vector sum = load_any_steps(from, s.step, s.count - done);
        results[j] = rounded(result_of<HAS_RESIDUAL, IS_CLAMPED>(
            r, scale[j], shift[j], sum, HAS_RESIDUAL ? byte_of(added, j) : added));
      }
      store_lanes(q.to + s.to + done, packed(results), s.count - done);
    }
  }
}

INLINE void store_bytes(const Requantization& r, int64_t channel, const QuadSums& quad) {
  if (quad.residual)
    return r.is_clamped ? store_bytes<true, true>(r, channel, quad)
                        : store_bytes<true, false>(r, channel, quad);
  return r.is_clamped ? store_bytes<false, true>(r, channel, quad)
                      : store_bytes<false, false>(r, channel, quad);
}

// Stores the results of one output channel in floats, clamped.
INLINE void store_floats(const Requantization& r, int64_t channel, const QuadSums& quad) {
  const QuadSums q = quad;
  Register scale = broadcast(r.scale[channel]);
  Vector shift = splat(r.shift[channel]);
  for (int i = 0; i < q.count; ++i) {
    const Segment s = q.segments[i];
    for (int64_t done = 0; done < s.count; done += LANES) {
      Vector sum = load_any_steps(q.sums + s.from + done * s.step, s.step, s.count - done);
      int64_t at = s.to + done;
      Vector value = q.residual
          ? result_of<true, true>(r, scale, shift, sum, load(q.residual + at))
          : result_of<false, true>(r, scale, shift, sum, Vector{});
      store_lanes(q.to + at, value, s.count - done);
    }
  }
}

// Stores the results of up to four output channels from `channel`, a multiple of 4, on. In floats,
// `quad` has the places of the first one, from which the others are `distance` floats apart.
INLINE void store_results(const Requantization& r, int64_t channel, int64_t count,
                          const QuadSums& quad, int64_t distance) {
  if (r.to_bytes) return store_bytes(r, channel, quad);
  QuadSums one = quad;
  for (int64_t j = 0; j < count; ++j, one.sums += one.stride, one.to += distance) {
    store_floats(r, channel + j, one);
    if (one.residual) one.residual += distance;
  }
}

// An output-channel tile and an input-channel tile, on one pixel tile.
struct BytePointwiseArguments {
  const char* source;       // first quad of the input-channel tile
  const uint16_t* indices;  // the layer's, in multiples of 64 bytes
  const float* weights;     // the layer's: four bytes each
  const QuadTile* tiles;
  int64_t count;            // number of quad tiles
  int64_t size;             // lanes from channel to channel, in sums, targets and residuals
  bool is_first;            // whether sums start at zero
  float* sums;
  float* target;            // destination of finished outputs; null to store sums
  const float* residual;    // may be null
  int64_t channels;         // output channels of the tile that exist
  Requantization requantization;
};
using BytePointwiseKernel = void (*)(const BytePointwiseArguments&);

#if ISA == 512
constexpr int MAX_BYTE_VECTORS = 7, MAX_SHARED_VECTORS = 4;
#elif ISA == 256
constexpr int MAX_BYTE_VECTORS = 3, MAX_SHARED_VECTORS = 1;
#else
constexpr int MAX_BYTE_VECTORS = 1, MAX_SHARED_VECTORS = 1;
#endif

// Two indices by one load: the kernels are limited by their loads.
INLINE uint32_t two_indices(const uint16_t* indices) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  uint32_t pair;
  __builtin_memcpy(&pair, indices, sizeof pair);
  return pair;
#else
  return indices[0] | static_cast<uint32_t>(indices[1]) << 16;
#endif
}

INLINE const float* quad_at(const BytePointwiseArguments& a, uint16_t index) {
  return reinterpret_cast<const float*>(a.source + (static_cast<int64_t>(index) << 6));
}

template <int VECTORS>
INLINE void start_sums(const BytePointwiseArguments& a, int64_t channel, Vector (&sums)[VECTORS]) {
  UNROLL for (int v = 0; v < VECTORS; ++v)
    sums[v] = a.is_first ? splat(0.0f) : load(a.sums + channel * a.size + v * LANES);
}

template <int VECTORS>
INLINE void store_sums(const BytePointwiseArguments& a, int64_t channel,
                       const Vector (&sums)[VECTORS]) {
  UNROLL for (int v = 0; v < VECTORS; ++v)
    store(a.sums + channel * a.size + v * LANES, sums[v]);
}

// Turns the stored sums of four output channels into results, if there is a target.
INLINE void finish_quad(const BytePointwiseArguments& a, int64_t quad, int64_t lanes) {
  int64_t channel = 4 * quad, at = (a.requantization.to_bytes ? quad : channel) * a.size;
  if (!a.target || channel >= a.channels) return;
  const Segment all{0, 1, lanes, 0};
  const float* residual = a.residual ? a.residual + at : nullptr;
  store_results(a.requantization, channel, minimum(4, a.channels - channel),
                {a.sums + channel * a.size, a.size, a.target + at, residual, &all, 1}, a.size);
}

// Four output channels with a list each, of an even number of entries, which take turns at two sets
// of accumulators, so that a product waits less often for the previous one.
template <class Math, int VECTORS>
INLINE void separate_quad(const BytePointwiseArguments& a, const QuadTile& tile, int64_t quad) {
  constexpr int CHAINS = ISA == 512 ? 2 : 1;
  const uint16_t* indices = a.indices + tile.indices;
  const float* weights = a.weights + tile.weights;
  for (int64_t j = 0; j < 4; ++j) {
    Vector sums[CHAINS][VECTORS];
    start_sums(a, 4 * quad + j, sums[0]);
    UNROLL for (int c = 1; c < CHAINS; ++c)
      UNROLL for (int v = 0; v < VECTORS; ++v) sums[c][v] = splat(0.0f);
    const uint16_t* end = indices + tile.counts[j];
    for (; indices < end; indices += 2, weights += 2) {
      const uint32_t pair = two_indices(indices);
      UNROLL for (int e = 0; e < 2; ++e) {
        const float* x = quad_at(a, static_cast<uint16_t>(pair >> (16 * e)));
        typename Math::Factor factor = Math::factor(broadcast(weights[e]));
        UNROLL for (int v = 0; v < VECTORS; ++v)
          Math::multiply_add(sums[e % CHAINS][v], factor, load(x + v * LANES));
      }
    }
    UNROLL for (int v = 0; CHAINS > 1 && v < VECTORS; ++v)
      sums[0][v] = Math::add(sums[0][v], sums[CHAINS - 1][v]);
    store_sums(a, 4 * quad + j, sums[0]);
  }
  finish_quad(a, quad, VECTORS * LANES);
}

// Adds the products of vectors, `distance` lanes apart, to the sums of four output channels, each of
// which has a weight.
template <class Math, int VECTORS>
INLINE void add_shared(Vector (&sums)[SHARED_OUTPUTS][VECTORS], const float* x, int64_t distance,
                       const float* weights) {
  typename Math::Factor factors[SHARED_OUTPUTS];
  UNROLL for (int k = 0; k < SHARED_OUTPUTS; ++k)
    factors[k] = Math::factor(broadcast(weights[k]));
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    Vector value = load(x + v * distance);
    UNROLL for (int k = 0; k < SHARED_OUTPUTS; ++k)
      Math::multiply_add(sums[k][v], factors[k], value);
  }
}

// Four output channels with one list.
template <class Math, int VECTORS>
INLINE void shared_quad(const BytePointwiseArguments& a, const QuadTile& tile, int64_t quad) {
  const uint16_t* indices = a.indices + tile.indices;
  const uint16_t* end = indices + tile.counts[0];
  const float* weights = a.weights + tile.weights;
  Vector sums[4][VECTORS];
  UNROLL for (int j = 0; j < 4; ++j) start_sums(a, 4 * quad + j, sums[j]);
  for (; indices < end; ++indices, weights += 4)
    add_shared<Math>(sums, quad_at(a, *indices), LANES, weights);
  UNROLL for (int j = 0; j < 4; ++j) store_sums(a, 4 * quad + j, sums[j]);
  finish_quad(a, quad, VECTORS * LANES);
}

// The arguments for the pixels after the first `vectors` ones.
INLINE BytePointwiseArguments after(const BytePointwiseArguments& a, int64_t vectors) {
  BytePointwiseArguments rest = a;
  rest.source += vectors * LANES * sizeof(float);
  rest.sums += vectors * LANES;
  if (a.target) rest.target += vectors * LANES;
  if (a.residual) rest.residual += vectors * LANES;
  return rest;
}

template <class Math, int VECTORS>
void byte_pointwise(const BytePointwiseArguments& arguments) {
  constexpr int FIRST = VECTORS < MAX_SHARED_VECTORS ? VECTORS : MAX_SHARED_VECTORS;
  constexpr int PARTS_LEFT = (VECTORS - FIRST + MAX_SHARED_VECTORS - 1) / MAX_SHARED_VECTORS;
  const BytePointwiseArguments a = arguments;  // a copy, which stores can't alias
  for (int64_t quad = 0; quad < a.count; ++quad) {
    const QuadTile tile = a.tiles[quad];
    if (!tile.shared) {
      separate_quad<Math, VECTORS>(a, tile, quad);
      continue;
    }
    shared_quad<Math, FIRST>(a, tile, quad);
    if constexpr (PARTS_LEFT == 1)
      shared_quad<Math, VECTORS - FIRST>(after(a, FIRST), tile, quad);
    else if constexpr (PARTS_LEFT > 1)
      for (int part = 1; part <= PARTS_LEFT; ++part)  // FIRST vectors each
        shared_quad<Math, FIRST>(after(a, part * FIRST), tile, quad);
  }
}

template <class Math>
BytePointwiseKernel byte_pointwise_kernel(int64_t vectors) {
  constexpr int MAX = MAX_BYTE_VECTORS;
  switch (vectors) {
    case 7: return byte_pointwise<Math, MAX < 7 ? MAX : 7>;
    case 6: return byte_pointwise<Math, MAX < 6 ? MAX : 6>;
    case 5: return byte_pointwise<Math, MAX < 5 ? MAX : 5>;
    case 4: return byte_pointwise<Math, MAX < 4 ? MAX : 4>;
    case 3: return byte_pointwise<Math, MAX < 3 ? MAX : 3>;
    case 2: return byte_pointwise<Math, MAX < 2 ? MAX : 2>;
    default: return byte_pointwise<Math, 1>;
  }
}

// ---------------------------------------------------------------------------------------------
// Maximum and dot product
// ---------------------------------------------------------------------------------------------

INLINE Vector maximum_of_bytes(const Vector& one, const Vector& other) {
  typedef uint8_t ByteRegister __attribute__((vector_size(ISA / 8)));
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    auto a = reinterpret_cast<ByteRegister>(one.part[i]);
    auto b = reinterpret_cast<ByteRegister>(other.part[i]);
    result.part[i] = reinterpret_cast<Register>(a > b ? a : b);
  }
  return result;
}

INLINE int64_t total_of_ints(const Vector& vector) {
  float lanes[LANES];
  int32_t values[LANES];
  int64_t sum = 0;
  store(lanes, vector);
  __builtin_memcpy(values, lanes, sizeof values);
  for (int i = 0; i < LANES; ++i) sum += values[i];
  return sum;
}

// The sum of products of `lanes` lanes, a multiple of 16.
template <class Math>
INLINE int64_t byte_product(const float* x, const float* weights, int64_t lanes) {
  Vector sums[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t i = 0; i < lanes; i += LANES) {
    Vector bytes = load(x + i), factors = load(weights + i);
    Vector& sum = sums[i / LANES % 2];
    UNROLL for (int p = 0; p < PARTS; ++p)
      sum.part[p] =
          Math::add_products(sum.part[p], Math::factor(factors.part[p]), bytes.part[p]);
  }
  return total_of_ints(Math::add(sums[0], sums[1]));
}

}  // namespace STARFIRE_ISA
