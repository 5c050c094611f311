// The innermost loops, compiled once for each instruction set: ISA is 512, 256 or 128 bits.
// Nothing of the standard library may be used here: what is instantiated for one machine would
// be linked for all.

namespace STARFIRE_ISA {

constexpr int WIDTH = ISA / 32;          // floats a register
constexpr int PARTS = LANES / WIDTH;     // registers that hold 16 floats
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

INLINE Vector all(float value) {
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

INLINE Vector maximum(const Vector& one, const Vector& other) {  // NaN where either is
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    auto takes_other = (one.part[i] < other.part[i]) | (other.part[i] != other.part[i]);
    result.part[i] = takes_other ? other.part[i] : one.part[i];
  }
  return result;
}

INLINE Vector clamp(const Vector& vector, Register low, Register high) {  // NaN stays
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

// from[shift …]: with wide registers from two loads that split no cache line
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

// The units of a chunk of output channels and a block of input channels, on one tile.
struct PointArguments {
  const char* source;        // of the block's first channel
  const uint16_t* indices;   // of the layer, [entry][lists], in 64 bytes
  const float* weights;      // of the layer, [entry][lists][shared]
  const Unit* units;
  int64_t count;             // of units
  int64_t size;              // floats from channel to channel, of sums and targets
  const float* bias;         // of the chunk, to start from; null to start from the sums
  float* sums;
  float* target;             // where finished sums go; null where they stay sums
  const float* residual;     // likewise; may be null
  int64_t channels;          // of the chunk that there are
  Register low, high;
};
using PointKernel = void (*)(const PointArguments&);

template <int VECTORS, int LISTS, int SHARED>
void point(const PointArguments& arguments) {
  constexpr int OUTPUTS = LISTS * SHARED;
  const PointArguments a = arguments;  // a copy, which no store can change
  const Register low = a.low, high = a.high;
  for (const Unit* unit = a.units; unit < a.units + a.count; ++unit) {
    Vector sums[OUTPUTS][VECTORS];
    int64_t at[OUTPUTS];
    UNROLL for (int k = 0; k < OUTPUTS; ++k) at[k] = unit->channel[k] * a.size;
    if (a.bias) {
      UNROLL for (int k = 0; k < OUTPUTS; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) sums[k][v] = all(a.bias[unit->channel[k]]);
    } else {
      UNROLL for (int k = 0; k < OUTPUTS; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) sums[k][v] = load(a.sums + at[k] + v * LANES);
    }
    const uint16_t* indices = a.indices + unit->start * LISTS;
    const uint16_t* end = indices + unit->count * LISTS;
    const float* weights = a.weights + unit->start * OUTPUTS;
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
      if (unit->channel[k] >= a.channels) continue;
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
constexpr int MOST_VECTORS[2] = {7, 4};  // for units of two and of four output channels
#elif ISA == 256
constexpr int MOST_VECTORS[2] = {3, 1};
#else
constexpr int MOST_VECTORS[2] = {1, 1};
#endif

template <int LISTS, int SHARED>
PointKernel point_kernel(int64_t vectors) {
  constexpr int MOST = MOST_VECTORS[LISTS * SHARED == 4];
  switch (vectors) {
    case 7: return point<MOST < 7 ? MOST : 7, LISTS, SHARED>;
    case 6: return point<MOST < 6 ? MOST : 6, LISTS, SHARED>;
    case 5: return point<MOST < 5 ? MOST : 5, LISTS, SHARED>;
    case 4: return point<MOST < 4 ? MOST : 4, LISTS, SHARED>;
    case 3: return point<MOST < 3 ? MOST : 3, LISTS, SHARED>;
    case 2: return point<MOST < 2 ? MOST : 2, LISTS, SHARED>;
    default: return point<1, LISTS, SHARED>;
  }
}

static PointKernel point_kernel(int64_t lists, int64_t shared, int64_t vectors) {
  if (lists == 4) return point_kernel<4, 1>(vectors);
  if (shared == 4) return point_kernel<1, 4>(vectors);
  if (shared == 2) return point_kernel<1, 2>(vectors);
  return point_kernel<2, 1>(vectors);
}

// ---------------------------------------------------------------------------------------------
// Rectangles of weights over rows
// ---------------------------------------------------------------------------------------------

using BlockKernel = void (*)(const float* source, int64_t distance, const int32_t* offsets,
                             const float* weights, int64_t count, float* sums);

// Adds a rectangle of HEIGHT x COLUMNS weights to ROWS accumulators. An input row is read once for
// all of it. There are CHAINS of accumulators, of which columns take turns from FIRST on, so that
// with few rows no multiply-add waits for the one before. NEXT: rows are 16 floats apart, so that
// what follows a row is the next one.
template <int ROWS, int HEIGHT, int COLUMNS, bool NEXT, int CHAINS, int FIRST>
INLINE void rectangle(Vector (&rows)[CHAINS][ROWS], const float* x, int64_t distance,
                      const float* weights) {
  constexpr bool PAIRED = COLUMNS > 1 && ISA == 512;
  Register factors[HEIGHT * COLUMNS];
  UNROLL for (int t = 0; t < HEIGHT * COLUMNS; ++t) factors[t] = broadcast(weights[t]);
  Vector following = load(x);
  UNROLL for (int i = 0; i < ROWS + HEIGHT - 1; ++i) {
    const float* from = x + i * distance;
    Vector first = NEXT && PAIRED ? following : load(from);
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
template <int ROWS, int HEIGHT, int COLUMNS, bool NEXT>
void block(const float* source, int64_t distance, const int32_t* offsets, const float* weights,
           int64_t count, float* sums) {
  constexpr int SIZE = HEIGHT * COLUMNS;
  constexpr int CHAINS = ISA != 512 || ROWS > 4 ? 1 : COLUMNS > 1 ? COLUMNS : 2;
  if constexpr (NEXT) distance = LANES;
  Vector rows[CHAINS][ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    rows[0][i] = load(sums + i * LANES);
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[c][i] = all(0.0f);
  }
  int64_t j = 0;
  if constexpr (CHAINS > COLUMNS) {
    for (; j + 2 <= count; j += 2, weights += 2 * SIZE) {
      rectangle<ROWS, HEIGHT, COLUMNS, NEXT, CHAINS, 0>(rows, source + offsets[j], distance,
                                                        weights);
      rectangle<ROWS, HEIGHT, COLUMNS, NEXT, CHAINS, 1>(rows, source + offsets[j + 1], distance,
                                                        weights + SIZE);
    }
  }
  for (; j < count; ++j, weights += SIZE)
    rectangle<ROWS, HEIGHT, COLUMNS, NEXT, CHAINS, 0>(rows, source + offsets[j], distance, weights);
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[0][i] = add(rows[0][i], rows[c][i]);
    store(sums + i * LANES, rows[0][i]);
  }
}

template <int ROWS, int HEIGHT>
BlockKernel block_kernel(int64_t columns, bool next) {
  if (columns == 1) return block<ROWS, HEIGHT, 1, false>;
  if (columns == 2) return next ? block<ROWS, HEIGHT, 2, true> : block<ROWS, HEIGHT, 2, false>;
  return next ? block<ROWS, HEIGHT, 3, true> : block<ROWS, HEIGHT, 3, false>;
}

template <int ROWS>
BlockKernel block_kernel(int64_t height, int64_t columns, bool next) {
  next = next && ISA == 512;  // others read no row twice
  switch (height) {
    case 1: return block_kernel<ROWS, 1>(columns, next);
    case 2: return block_kernel<ROWS, 2>(columns, next);
    case 3: return block_kernel<ROWS, 3>(columns, next);
    default: return block_kernel<ROWS, 4>(columns, next);
  }
}

#if ISA == 512
constexpr int64_t ROWS_AT_ONCE = 14;
#elif ISA == 256
constexpr int64_t ROWS_AT_ONCE = 4;
#else
constexpr int64_t ROWS_AT_ONCE = 2;
#endif

// Accumulators of the smallest kernel that has at least `rows`, or of the largest one.
static int64_t kernel_rows(int64_t rows) {
  for (int64_t size : {2, 4, 7, 10, 14})
    if (size >= rows || size == ROWS_AT_ONCE) return size;
  return ROWS_AT_ONCE;
}

static BlockKernel block_kernel([[maybe_unused]] int64_t rows, const Run& run, bool next) {
#if ISA == 512
  if (rows == 14) return block_kernel<14>(run.rows, run.columns, next);
  if (rows == 10) return block_kernel<10>(run.rows, run.columns, next);
  if (rows == 7) return block_kernel<7>(run.rows, run.columns, next);
#endif
#if ISA >= 256
  if (rows == 4) return block_kernel<4>(run.rows, run.columns, next);
#endif
  return block_kernel<2>(run.rows, run.columns, next);
}

}  // namespace STARFIRE_ISA
