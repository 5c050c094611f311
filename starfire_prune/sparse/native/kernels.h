// The innermost loops of 1x1 convolutions (`pointwise`), of larger ones such as 3x3 (`spatial`) and
// of linear layers, compiled once for each instruction set: ISA is 512, 256 or 128 bits.
// The standard library must not be used here: templates instantiated for one instruction set could
// be linked into the code for another.

namespace STARFIRE_ISA {

constexpr int WIDTH = ISA / 32;          // floats per register
constexpr int PARTS = LANES / WIDTH;     // registers per Vector
typedef float Register __attribute__((vector_size(ISA / 8), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE Register broadcast(float value) {
#if ISA == 512
  return Register{value, value, value, value, value, value, value, value,
                  value, value, value, value, value, value, value, value};
#elif ISA == 256
  return Register{value, value, value, value, value, value, value, value};
#else
  return Register{value, value, value, value};
#endif
}

// Sixteen floats.
struct Vector {
  Register part[PARTS];
};

INLINE Vector load(const float* from) {
  Vector vector;
  UNROLL for (int i = 0; i < PARTS; ++i)
    vector.part[i] = reinterpret_cast<const Register*>(from)[i];
  return vector;
}

INLINE void store(float* to, const Vector& vector) {
  UNROLL for (int i = 0; i < PARTS; ++i) reinterpret_cast<Register*>(to)[i] = vector.part[i];
}

INLINE Vector splat(float value) {
  Vector vector;
  UNROLL for (int i = 0; i < PARTS; ++i) vector.part[i] = broadcast(value);
  return vector;
}

INLINE void multiply_add(Vector& sum, Register factor, const Vector& vector) {
  UNROLL for (int i = 0; i < PARTS; ++i) sum.part[i] += factor * vector.part[i];
}

INLINE Vector add(const Vector& one, const Vector& other) {
  Vector sum;
  UNROLL for (int i = 0; i < PARTS; ++i) sum.part[i] = one.part[i] + other.part[i];
  return sum;
}

INLINE Vector maximum(const Vector& one, const Vector& other) {  // NaN where either input is NaN
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    auto use_other = (one.part[i] < other.part[i]) | (other.part[i] != other.part[i]);
    result.part[i] = use_other ? other.part[i] : one.part[i];
  }
  return result;
}

INLINE Vector clamp(const Vector& vector, Register low, Register high) {  // NaN is kept
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    Register value = vector.part[i] < low ? low : vector.part[i];
    result.part[i] = value > high ? high : value;
  }
  return result;
}

INLINE void store_first(float* to, const Vector& vector, int64_t count) {
#if ISA == 512
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), vector.part[0]);
#else
  float values[LANES];
  store(values, vector);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
#endif
}

// from[0], from[2], … from[30]
INLINE Vector load_even(const float* from) {
#if ISA == 512
  return {SHUFFLE(load(from).part[0], load(from + 15).part[0], 0, 2, 4, 6, 8, 10, 12, 14, 17, 19,
                  21, 23, 25, 27, 29, 31)};
#else
  float values[LANES];
  for (int i = 0; i < LANES; ++i) values[i] = from[2 * i];
  return load(values);
#endif
}

// 16 floats from from[SHIFT] on: with wide registers from two loads that don't split a cache line
template <int SHIFT>
INLINE Vector shifted([[maybe_unused]] const float* from, const Vector& first,
                      [[maybe_unused]] const Vector& second) {
#if ISA == 512
  if (SHIFT == 0) return first;
  if (SHIFT == 1)
    return {SHUFFLE(first.part[0], second.part[0], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                    15, 16)};
  return {SHUFFLE(first.part[0], second.part[0], 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                  16, 17)};
#else
  return SHIFT == 0 ? first : load(from + SHIFT);
#endif
}

// ---------------------------------------------------------------------------------------------
// 1x1 convolutions
// ---------------------------------------------------------------------------------------------

// An output-channel tile and an input-channel tile, on one pixel tile.
struct PointwiseArguments {
  const char* source;         // first channel of the input-channel tile
  const uint16_t* indices;    // the layer's, [entry][index_lists], in multiples of 64 bytes
  const float* weights;       // the layer's, [entry][index_lists][outputs_per_list]
  const RegisterTile* tiles;
  int64_t count;              // number of register tiles
  int64_t size;               // floats from channel to channel, in sums and targets
  const float* bias;          // initial values of the output tile; null to continue from the sums
  float* sums;
  float* target;              // destination of finished outputs; null to store sums
  const float* residual;      // added to finished outputs; may be null
  int64_t channels;           // output channels of the tile that exist
  Register low, high;
};
using PointwiseKernel = void (*)(const PointwiseArguments&);

template <int VECTORS, int LISTS, int SHARED>
void pointwise(const PointwiseArguments& arguments) {
  constexpr int OUTPUTS = LISTS * SHARED;
  const PointwiseArguments a = arguments;  // a copy, which stores can't alias
  const Register low = a.low, high = a.high;
  for (const RegisterTile* tile = a.tiles; tile < a.tiles + a.count; ++tile) {
    Vector sums[OUTPUTS][VECTORS];
    int64_t at[OUTPUTS];
    UNROLL for (int k = 0; k < OUTPUTS; ++k) at[k] = tile->channel[k] * a.size;
    if (a.bias) {
      UNROLL for (int k = 0; k < OUTPUTS; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) sums[k][v] = splat(a.bias[tile->channel[k]]);
    } else {
      UNROLL for (int k = 0; k < OUTPUTS; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) sums[k][v] = load(a.sums + at[k] + v * LANES);
    }
    const uint16_t* indices = a.indices + tile->start * LISTS;
    const uint16_t* end = indices + tile->count * LISTS;
    const float* weights = a.weights + tile->start * OUTPUTS;
    for (; indices < end; indices += LISTS, weights += OUTPUTS) {
      UNROLL for (int l = 0; l < LISTS; ++l) {
        auto x = reinterpret_cast<const float*>(a.source + (static_cast<int64_t>(indices[l]) << 6));
        Register factors[SHARED];
        UNROLL for (int g = 0; g < SHARED; ++g) factors[g] = broadcast(weights[l * SHARED + g]);
        UNROLL for (int v = 0; v < VECTORS; ++v) {
          Vector value = load(x + v * LANES);
          UNROLL for (int g = 0; g < SHARED; ++g)
            multiply_add(sums[l * SHARED + g][v], factors[g], value);
        }
      }
    }
    if (!a.target) {
      UNROLL for (int k = 0; k < OUTPUTS; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) store(a.sums + at[k] + v * LANES, sums[k][v]);
      continue;
    }
    UNROLL for (int k = 0; k < OUTPUTS; ++k) {
      if (tile->channel[k] >= a.channels) continue;
      if (a.residual) {
        UNROLL for (int v = 0; v < VECTORS; ++v)
          sums[k][v] = add(sums[k][v], load(a.residual + at[k] + v * LANES));
      }
      UNROLL for (int v = 0; v < VECTORS; ++v)
        store(a.target + at[k] + v * LANES, clamp(sums[k][v], low, high));
    }
  }
}

#if ISA == 512
constexpr int MAX_VECTORS[2] = {7, 4};  // for register tiles of two and four output channels
#elif ISA == 256
constexpr int MAX_VECTORS[2] = {3, 1};
#else
constexpr int MAX_VECTORS[2] = {1, 1};
#endif

template <int LISTS, int SHARED>
PointwiseKernel pointwise_kernel(int64_t vectors) {
  constexpr int MAX = MAX_VECTORS[LISTS * SHARED == 4];
  switch (vectors) {
    case 7: return pointwise<MAX < 7 ? MAX : 7, LISTS, SHARED>;
    case 6: return pointwise<MAX < 6 ? MAX : 6, LISTS, SHARED>;
    case 5: return pointwise<MAX < 5 ? MAX : 5, LISTS, SHARED>;
    case 4: return pointwise<MAX < 4 ? MAX : 4, LISTS, SHARED>;
    case 3: return pointwise<MAX < 3 ? MAX : 3, LISTS, SHARED>;
    case 2: return pointwise<MAX < 2 ? MAX : 2, LISTS, SHARED>;
    default: return pointwise<1, LISTS, SHARED>;
  }
}

static PointwiseKernel pointwise_kernel(int64_t lists, int64_t shared, int64_t vectors) {
  if (lists == 4) return pointwise_kernel<4, 1>(vectors);
  if (shared == 4) return pointwise_kernel<1, 4>(vectors);
  if (shared == 2) return pointwise_kernel<1, 2>(vectors);
  return pointwise_kernel<2, 1>(vectors);
}

// ---------------------------------------------------------------------------------------------
// Spatial convolutions: rectangles of weights over rows
// ---------------------------------------------------------------------------------------------

using SpatialKernel = void (*)(const float* source, int64_t distance, const int32_t* offsets,
                               const float* weights, int64_t count, float* sums);

// Adds a rectangle of HEIGHT x COLUMNS weights to ROWS accumulators, reading each input row once.
// There are CHAINS sets of accumulators, which columns use in turn from FIRST on, so that with few
// rows a multiply-add does not wait for the previous one. ADJACENT: rows are 16 floats apart, so
// that the next row follows a row directly.
template <int ROWS, int HEIGHT, int COLUMNS, bool ADJACENT, int CHAINS, int FIRST>
INLINE void rectangle(Vector (&rows)[CHAINS][ROWS], const float* x, int64_t distance,
                      const float* weights) {
  constexpr bool PAIRED = COLUMNS > 1 && ISA == 512;
  Register factors[HEIGHT * COLUMNS];
  UNROLL for (int t = 0; t < HEIGHT * COLUMNS; ++t) factors[t] = broadcast(weights[t]);
  Vector following = load(x);
  UNROLL for (int i = 0; i < ROWS + HEIGHT - 1; ++i) {
    const float* from = x + i * distance;
    Vector first = ADJACENT && PAIRED ? following : load(from);
    if (PAIRED) following = load(from + LANES);
    Vector columns[3];
    columns[0] = first;
    if (COLUMNS > 1) columns[1] = shifted<1>(from, first, following);
    if (COLUMNS > 2) columns[2] = shifted<2>(from, first, following);
    UNROLL for (int s = 0; s < COLUMNS; ++s)
      UNROLL for (int r = 0; r < HEIGHT; ++r)
        if (i - r >= 0 && i - r < ROWS)
          multiply_add(rows[(FIRST + s) % CHAINS][i - r], factors[r * COLUMNS + s], columns[s]);
  }
}

// Adds `count` rectangles to ROWS accumulators.
template <int ROWS, int HEIGHT, int COLUMNS, bool ADJACENT>
void spatial(const float* source, int64_t distance, const int32_t* offsets, const float* weights,
             int64_t count, float* sums) {
  constexpr int SIZE = HEIGHT * COLUMNS;
  constexpr int CHAINS = ISA != 512 || ROWS > 4 ? 1 : COLUMNS > 1 ? COLUMNS : 2;
  if constexpr (ADJACENT) distance = LANES;
  Vector rows[CHAINS][ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    rows[0][i] = load(sums + i * LANES);
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[c][i] = splat(0.0f);
  }
  int64_t j = 0;
  if constexpr (CHAINS > COLUMNS) {
    for (; j + 2 <= count; j += 2, weights += 2 * SIZE) {
      rectangle<ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 0>(rows, source + offsets[j], distance,
                                                            weights);
      rectangle<ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 1>(rows, source + offsets[j + 1], distance,
                                                            weights + SIZE);
    }
  }
  for (; j < count; ++j, weights += SIZE)
    rectangle<ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 0>(rows, source + offsets[j], distance,
                                                          weights);
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[0][i] = add(rows[0][i], rows[c][i]);
    store(sums + i * LANES, rows[0][i]);
  }
}

template <int ROWS, int HEIGHT>
SpatialKernel spatial_kernel(int64_t columns, bool adjacent) {
  if (columns == 1) return spatial<ROWS, HEIGHT, 1, false>;
  if (columns == 2)
    return adjacent ? spatial<ROWS, HEIGHT, 2, true> : spatial<ROWS, HEIGHT, 2, false>;
  return adjacent ? spatial<ROWS, HEIGHT, 3, true> : spatial<ROWS, HEIGHT, 3, false>;
}

template <int ROWS>
SpatialKernel spatial_kernel(int64_t height, int64_t columns, bool adjacent) {
  adjacent = adjacent && ISA == 512;  // the others don't read a row twice
  switch (height) {
    case 1: return spatial_kernel<ROWS, 1>(columns, adjacent);
    case 2: return spatial_kernel<ROWS, 2>(columns, adjacent);
    case 3: return spatial_kernel<ROWS, 3>(columns, adjacent);
    default: return spatial_kernel<ROWS, 4>(columns, adjacent);
  }
}

#if ISA == 512
constexpr int64_t MAX_KERNEL_ROWS = 14;
#elif ISA == 256
constexpr int64_t MAX_KERNEL_ROWS = 4;
#else
constexpr int64_t MAX_KERNEL_ROWS = 2;
#endif

// Rows of the smallest kernel with at least `rows` accumulators, or of the largest kernel.
static int64_t kernel_rows(int64_t rows) {
  constexpr int64_t SIZES[] = {2, 4, 7, 10, 14};
  for (int64_t size : SIZES)
    if (size >= rows || size == MAX_KERNEL_ROWS) return size;
  return MAX_KERNEL_ROWS;
}

static SpatialKernel spatial_kernel([[maybe_unused]] int64_t rows, const RectangleRun& run,
                                    bool adjacent) {
#if ISA == 512
  if (rows == 14) return spatial_kernel<14>(run.rows, run.columns, adjacent);
  if (rows == 10) return spatial_kernel<10>(run.rows, run.columns, adjacent);
  if (rows == 7) return spatial_kernel<7>(run.rows, run.columns, adjacent);
#endif
#if ISA >= 256
  if (rows == 4) return spatial_kernel<4>(run.rows, run.columns, adjacent);
#endif
  return spatial_kernel<2>(run.rows, run.columns, adjacent);
}

}  // namespace STARFIRE_ISA
