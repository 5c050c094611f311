// The binary format of programs: 64-bit integers, read as the structures below.
//
//   Header, Slot[slots], View[views], then for each operation its opcode and its structure.
//
// Fields named `..._at` are byte offsets into the constants, which hold the weights and indices.
// Sizes are in floats unless stated otherwise. program_format.py has the same constants and
// structures; both are compared when the library is loaded.

#pragma once

#include <cstdint>

namespace starfire {

constexpr int64_t MAGIC = 0x5354415246495245;
constexpr int64_t LANES = 16;            // unit of the sizes of tiles and rows, on every machine
constexpr int64_t MAX_TILE = 112;        // pixels per tile
constexpr int64_t MAX_OUTPUT_TILE = 64;  // output channels per work item of a 1x1 convolution
constexpr int64_t MAX_ROWS = 14;         // accumulators of the spatial kernel
constexpr int64_t MAX_SPILLED = 16;      // output channels per work item with input-channel tiles
constexpr int64_t SHARED_OUTPUTS = 4;    // neighbouring output channels that may share taps
constexpr int64_t MAX_SEGMENTS = 256;

struct Header {
  int64_t magic, slots, views, operations, inputs, outputs;
};

// Memory in the workspace: `image` floats for each image of the batch, followed by `slack` floats
// that kernels may read. All are set to `fill` (the bits of a float) before the first run.
struct Slot {
  int64_t image, slack, fill;
};

enum Kind : int64_t {
  PLANES,  // [channel][phase][row][column], padded; phase (i, j) starts at row i and column j
  TILES    // [tile][channel][pixel]: `tile` pixels of the flattened image, of all channels
};
enum Place : int64_t { WORKSPACE, INPUT, OUTPUT };

// The memory layout of a value with `channels` channels of `height` x `width`. These may be part of
// a value with `total` channels, from channel `first` on.
struct View {
  int64_t kind, place, index;
  int64_t channels, first, total, height, width;
  int64_t tile;                        // TILES: pixels per tile
  int64_t phases_h, phases_w;          // PLANES: number of phases
  int64_t top, left;                   // padding before the first row and column
  int64_t row, plane;                  // floats from row to row, and from phase to phase
  int64_t image;                       // floats from image to image
};

// A new one needs a check of its fields, in library/checks_floats.cpp or library/checks_bytes.cpp.
enum Opcode : int64_t {
  COPY = 1,
  POINTWISE,
  SPATIAL,
  POOL,
  MEAN,
  LINEAR,
  QUANTIZE,
  DEQUANTIZE,
  BYTE_COPY,
  BYTE_POINTWISE,
  BYTE_SPATIAL,
  BYTE_POOL,
  BYTE_LINEAR,
  BYTE_MEAN,
  UPSAMPLE,
  CHANNEL_NORM,
  RESPONSE
};

// What is computed of each result of an operation on floats, which has infinite bounds then.
enum Activation : int64_t { NO_ACTIVATION, SILU, HARD_SWISH, HARD_SIGMOID, SIGMOID, GELU, GELU_TANH };

// destination = activation(clamp(source[stride_h * h, stride_w * w] * factor * scale[c] + shift[c] +
// residual)). The factor has the destination's size, or one pixel.
struct Copy {
  int64_t source, destination, residual, factor, stride_h, stride_w, scale_at, shift_at, low, high;
  int64_t activation;
};

// A 1x1 convolution on tiles of pixels. For each pair of an output-channel tile and an
// input-channel tile there are output_tile_size / (index_lists * outputs_per_list) register tiles.
struct Pointwise {
  int64_t source, destination, residual, bias_at, tiles_at, indices_at, weights_at;
  int64_t channels, output_tile_size, input_tile_size, index_lists, outputs_per_list, low, high;
  int64_t activation;
};

// Output channels whose sums are in registers together: `index_lists` lists of input channels, read
// side by side, each for the `outputs_per_list` output channels that share it.
struct RegisterTile {
  int32_t channel[4];  // output channels, within the output-channel tile
  int64_t count;       // entries of each index list
  int64_t start;       // position of the first entry in the layer's index lists
};

// A convolution on planes: a sum of rectangles of weights over shifted rows.
struct Spatial {
  int64_t source, destination, residual, bias_at, starts_at, runs_at, offsets_at, weights_at;
  int64_t channels, output_tile_size;
  int64_t input_tiles;  // number of them: runs are sorted by input tile, then by output channel
  int64_t rows;         // accumulators per work item, of 16 floats each
  int64_t row_stride;   // floats from the input of one accumulator to that of the next one
  int64_t image_rows;   // image rows per accumulator
  int64_t low, high;
  int64_t activation;   // none in a ByteSpatial
};

// Rectangles of one shape that contribute to the same output channel.
struct RectangleRun {
  int32_t rows, columns;  // shape of a rectangle
  int64_t count, offsets, weights;
};

enum Pooling : int64_t { MAXIMUM, SUM };

// destination = activation(clamp(scale * pooled)), over `count` taps at these offsets. Neighbouring outputs are
// `step` (1 or 2) columns apart in the phase.
struct Pool {
  int64_t source, destination, mode, offsets_at, count, step, scale, low, high;
  int64_t activation;
};

enum Averaging : int64_t { AVERAGE, EUCLIDEAN };

// The mean of each channel, or the square root of the sum of its squares.
struct Mean {
  int64_t source, destination, mode;
};

// A linear layer: a dense matrix, or rows of (index, weight) where `starts_at` is not negative.
struct Linear {
  int64_t source, destination, bias_at, starts_at, indices_at, weights_at, channels, low, high;
  int64_t activation;
};

// destination = source[h / factor_h, w / factor_w]
struct Upsample {
  int64_t source, destination, factor_h, factor_w;
};

// Of each pixel, on tiles: destination = (source - mean) / √(variance + epsilon) * scale[c] + shift[c],
// with the mean and the variance of all channels.
struct ChannelNorm {
  int64_t source, destination, scale_at, shift_at, epsilon;
};

// destination[c] = source[c] / (mean + epsilon), with the mean of all channels, of one pixel.
struct Response {
  int64_t source, destination, epsilon;
};

// ---------------------------------------------------------------------------------------------
// Operations on quantized values
// ---------------------------------------------------------------------------------------------
//
// A channel of a quantized view is a quad: each of its lanes has the unsigned bytes of four
// neighbouring channels of a pixel, the first one in the lowest bits.

// bytes = clamp(round(source * inverse_scale) + zero_point), ties to even; the floats' bits
struct Quantize {
  int64_t source, destination, inverse_scale, zero_point, low, high;
};

// destination = (bytes - zero_point) * scale
struct Dequantize {
  int64_t source, destination, scale, zero_point;
};

// destination = source[stride_h * h, stride_w * w]
struct ByteCopy {
  int64_t source, destination, stride_h, stride_w;
};

// The results of an int32 sum for output channel k:
//   value = clamp(sum * scale[k] + shift[k] + residual * residual_scale)
// each product and sum in a fused multiply-add. If `to_bytes` is not FLOATS, it is rounded, ties to
// even. For SATURATED_BYTES, bounds of 0 and 255 need no clamping, and no value reaches 2^31, where
// conversions to int32 end. The residual is quantized if the output is. `narrow`: no sum of two products exceeds the
// range of int16, so that AVX2 may add products in pairs.

enum Results : int64_t { FLOATS, CLAMPED_BYTES, SATURATED_BYTES };

// A 1x1 convolution. For each pair of an output-channel tile and an input-channel tile there are
// output_tile_size / 4 quad tiles. `channels`: output channels.
struct BytePointwise {
  int64_t source, destination, residual, shift_at, tiles_at, indices_at, weights_at;
  int64_t channels, output_tile_size, input_tile_size, low, high;
  int64_t scale_at, residual_scale, to_bytes, narrow;
};

// Four output channels of a quad, and the input quads they read: each has a list of its own, one
// after the other, or (`shared`) all have one, with four weights for each entry.
struct QuadTile {
  int64_t indices, weights;  // positions of the first ones in the layer's arrays
  int32_t counts[4];         // entries of each list, an even number; if shared, of the only one
  int64_t shared;
};

// A convolution on planes, as Spatial: its `bias_at` is that of the shift. If `shared`, there are no
// runs: four neighbouring output channels share a list of taps, with four weights for each of them.
// Then `starts_at` is that of the lists, which are sorted by input tile. If `merged_at` is not
// negative, the lists are for merged quads of any four input channels. Those of a list are made before
// it is used, as copies of `vectors` vectors of each channel.
struct ByteSpatial {
  Spatial convolution;
  int64_t scale_at, residual_scale, to_bytes, narrow, shared;
  int64_t merged_at;   // the first merged quad of each list, and the end
  int64_t sources_at;  // four channels of each: four times the offset of its quad, plus its byte
  int64_t vectors_at;  // offsets within a channel
  int64_t vectors, most_merged;  // number of vectors; most merged quads of a list
  int64_t merged_stride;         // lanes from the input of one accumulator to that of the next one
};

// The maximum over `count` taps at these offsets, as Pool.
struct BytePool {
  int64_t source, destination, offsets_at, count, step;
};

// The mean of each channel, in floats.
struct ByteMean {
  int64_t source, destination, scale, zero_point;
};

// A linear layer with a dense matrix, whose rows have a multiple of 64 bytes; its output is float.
struct ByteLinear {
  int64_t source, destination, shift_at, scale_at, weights_at, channels, row, low, high, narrow;
};

// ---------------------------------------------------------------------------------------------
// What follows from the fields
// ---------------------------------------------------------------------------------------------

// Whether a copy's factor is a number for each channel.
inline bool is_gated(const View* views, const Copy& o) {
  if (o.factor < 0) return false;
  const View &factor = views[o.factor], &destination = views[o.destination];
  return factor.height != destination.height || factor.width != destination.width;
}

// Whether a copy's operands are equal tiles of pixels.
inline bool is_of_tiles(const View* views, const Copy& o) {
  const View& destination = views[o.destination];
  const int64_t operands[] = {o.source, o.residual, is_gated(views, o) ? -1 : o.factor};
  bool equal = destination.kind == TILES && o.stride_h == 1 && o.stride_w == 1;
  for (int64_t operand : operands)
    if (operand >= 0)
      equal = equal && views[operand].kind == TILES && views[operand].tile == destination.tile;
  return equal;
}

}  // namespace starfire
