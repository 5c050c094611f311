// The innermost loop of convolutions larger than 1x1 whose output channels share lists of taps, four
// neighbours each. Compiled once for each instruction set and kind of numbers (`Math`).

namespace STARFIRE_ISA {

#if ISA == 512
constexpr int MAX_TAP_ROWS = 6;
#else
constexpr int MAX_TAP_ROWS = 1;
#endif

using TapKernel = void (*)(const float* source, int64_t distance, const int32_t* offsets,
                           const float* weights, int64_t count, bool is_first, float* sums);

// Adds `count` taps, with a weight for each output channel, to ROWS accumulators of each, which start
// at zero if `is_first`. A load serves four products, so it may split a cache line.
template <class Math, int ROWS>
void taps(const float* source, int64_t distance, const int32_t* offsets, const float* weights,
          int64_t count, bool is_first, float* sums) {
  Vector rows[SHARED_OUTPUTS][ROWS];
  UNROLL for (int k = 0; k < SHARED_OUTPUTS; ++k)
    UNROLL for (int i = 0; i < ROWS; ++i)
      rows[k][i] = is_first ? splat(0.0f) : load(sums + k * SUMS + i * LANES);
  for (int64_t j = 0; j < count; ++j, weights += SHARED_OUTPUTS) {
    add_shared<Math>(rows, source + offsets[j], distance, weights);
  }
  UNROLL for (int k = 0; k < SHARED_OUTPUTS; ++k)
    UNROLL for (int i = 0; i < ROWS; ++i) store(sums + k * SUMS + i * LANES, rows[k][i]);
}

template <class Math>
TapKernel tap_kernel(int64_t rows) {
  constexpr int MAX = MAX_TAP_ROWS;
  switch (rows) {
    case 6: return taps<Math, MAX < 6 ? MAX : 6>;
    case 5: return taps<Math, MAX < 5 ? MAX : 5>;
    case 4: return taps<Math, MAX < 4 ? MAX : 4>;
    case 3: return taps<Math, MAX < 3 ? MAX : 3>;
    case 2: return taps<Math, MAX < 2 ? MAX : 2>;
    default: return taps<Math, 1>;
  }
}

// The position of the list of taps of four output channels from `channel` on.
INLINE int64_t tap_list(const Spatial& o, int64_t input_tile, int64_t channel) {
  return input_tile * ceil_div(o.channels, SHARED_OUTPUTS) + channel / SHARED_OUTPUTS;
}

// Adds the contribution of a list of taps to the sums of four output channels that share it, or sets
// them to it (`is_first`). Channels that don't exist have sums too.
// The inputs of accumulators are `distance` lanes apart, the first ones begin at `from`.
template <class Math>
INLINE void spatial_taps(const Context& c, const Spatial& o, const SpatialItem& item,
                         const float* from, int64_t distance, int64_t list, bool is_first,
                         float* sums) {
  const int32_t* starts = c.constants<int32_t>(o.starts_at) + list;
  const int32_t* offsets = c.constants<int32_t>(o.offsets_at) + starts[0];
  const float* weights = c.constants<float>(o.weights_at) + SHARED_OUTPUTS * starts[0];
  for (int64_t r = 0; r < item.rows;) {
    int64_t left = item.rows - r, size = ceil_div(left, ceil_div(left, MAX_TAP_ROWS));
    tap_kernel<Math>(size)(from + r * distance, distance, offsets, weights, starts[1] - starts[0],
                           is_first, sums + r * LANES);
    r += size;
  }
}

}  // namespace STARFIRE_ISA
