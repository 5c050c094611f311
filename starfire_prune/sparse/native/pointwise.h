// The innermost loops of 1x1 convolutions of floats, compiled once for each instruction set.

namespace STARFIRE_ISA {

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

}  // namespace STARFIRE_ISA
