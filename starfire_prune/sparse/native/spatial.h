// The innermost loops of convolutions larger than 1x1: rectangles of weights over rows. Compiled once
// for each instruction set and kind of numbers (`Math`), see math_floats.h and math_bytes.h.

namespace STARFIRE_ISA {

using SpatialKernel = void (*)(const float* source, int64_t distance, const int32_t* offsets,
                               const float* weights, int64_t count, bool is_first, float* sums);

// Adds a rectangle of HEIGHT x COLUMNS weights to ROWS accumulators, reading each input row once.
// There are CHAINS sets of accumulators, which columns use in turn from FIRST on, so that with few
// rows a multiply-add does not wait for the previous one. ADJACENT: rows are 16 floats apart, so
// that the next row follows a row directly.
template <class Math, int ROWS, int HEIGHT, int COLUMNS, bool ADJACENT, int CHAINS, int FIRST>
INLINE void rectangle(Vector (&rows)[CHAINS][ROWS], const float* x, int64_t distance,
                      const float* weights) {
  constexpr bool PAIRED = COLUMNS > 1 && ISA == 512;
  typename Math::Factor factors[HEIGHT * COLUMNS];
  UNROLL for (int t = 0; t < HEIGHT * COLUMNS; ++t)
    factors[t] = Math::factor(broadcast(weights[t]));
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
          Math::multiply_add(rows[(FIRST + s) % CHAINS][i - r], factors[r * COLUMNS + s],
                             columns[s]);
  }
}

// Adds `count` rectangles to ROWS accumulators, which start at zero if `is_first`.
template <class Math, int ROWS, int HEIGHT, int COLUMNS, bool ADJACENT>
void spatial(const float* source, int64_t distance, const int32_t* offsets, const float* weights,
             int64_t count, bool is_first, float* sums) {
  constexpr int SIZE = HEIGHT * COLUMNS;
  constexpr int CHAINS = ISA != 512 || ROWS > 4 ? 1 : COLUMNS > 1 ? COLUMNS : 2;
  if constexpr (ADJACENT) distance = LANES;
  Vector rows[CHAINS][ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    rows[0][i] = is_first ? splat(0.0f) : load(sums + i * LANES);
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[c][i] = splat(0.0f);
  }
  int64_t j = 0;
  if constexpr (CHAINS > COLUMNS) {
    for (; j + 2 <= count; j += 2, weights += 2 * SIZE) {
      rectangle<Math, ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 0>(rows, source + offsets[j],
                                                                  distance, weights);
      rectangle<Math, ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 1>(rows, source + offsets[j + 1],
                                                                  distance, weights + SIZE);
    }
  }
  for (; j < count; ++j, weights += SIZE)
    rectangle<Math, ROWS, HEIGHT, COLUMNS, ADJACENT, CHAINS, 0>(rows, source + offsets[j], distance,
                                                                weights);
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int c = 1; c < CHAINS; ++c) rows[0][i] = Math::add(rows[0][i], rows[c][i]);
    store(sums + i * LANES, rows[0][i]);
  }
}

template <class Math, int ROWS, int HEIGHT>
SpatialKernel spatial_kernel(int64_t columns, [[maybe_unused]] bool adjacent) {
  if constexpr (ISA == 512) {  // the others don't read a row twice
    if (adjacent && columns == 2) return spatial<Math, ROWS, HEIGHT, 2, true>;
    if (adjacent && columns == 3) return spatial<Math, ROWS, HEIGHT, 3, true>;
  }
  if (columns == 1) return spatial<Math, ROWS, HEIGHT, 1, false>;
  if (columns == 2) return spatial<Math, ROWS, HEIGHT, 2, false>;
  return spatial<Math, ROWS, HEIGHT, 3, false>;
}

template <class Math, int ROWS>
SpatialKernel spatial_kernel(int64_t height, int64_t columns, bool adjacent) {
  switch (height) {
    case 1: return spatial_kernel<Math, ROWS, 1>(columns, adjacent);
    case 2: return spatial_kernel<Math, ROWS, 2>(columns, adjacent);
    case 3: return spatial_kernel<Math, ROWS, 3>(columns, adjacent);
    default: return spatial_kernel<Math, ROWS, 4>(columns, adjacent);
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

template <class Math>
SpatialKernel spatial_kernel([[maybe_unused]] int64_t rows, const RectangleRun& run,
                                    bool adjacent) {
#if ISA == 512
  if (rows == 14) return spatial_kernel<Math, 14>(run.rows, run.columns, adjacent);
  if (rows == 10) return spatial_kernel<Math, 10>(run.rows, run.columns, adjacent);
  if (rows == 7) return spatial_kernel<Math, 7>(run.rows, run.columns, adjacent);
#endif
#if ISA >= 256
  if (rows == 4) return spatial_kernel<Math, 4>(run.rows, run.columns, adjacent);
#endif
  return spatial_kernel<Math, 2>(run.rows, run.columns, adjacent);
}

}  // namespace STARFIRE_ISA
