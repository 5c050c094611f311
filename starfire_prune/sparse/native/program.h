// The program that the interpreter runs: 64-bit integers, read as the structures below.
//
//   Header, Slot[slots], View[views], then for each operation its code and its structure.
//
// Positions named `..._at` are bytes into the constants, the blob that holds weights and indices.
// Sizes are in floats unless named otherwise. The planner writes the same order of fields.

#pragma once

#include <cstdint>

namespace starfire {

constexpr int64_t MAGIC = 0x5354415246495245;
constexpr int64_t LANES = 16;      // floats that tiles and rows are counted in, on every machine
constexpr int64_t LARGEST_TILE = 112;
constexpr int64_t LARGEST_CHUNK = 64;  // output channels an item of a pointwise convolution
constexpr int64_t MOST_ROWS = 14;      // accumulators of the block kernel
constexpr int64_t MOST_PUT_ASIDE = 16; // output channels of a chunk where there are blocks
constexpr int64_t MOST_SEGMENTS = 256;

struct Header {
  int64_t magic, slots, views, operations, inputs, outputs;
};

// Memory of the arena: `image` floats for each image of the batch and `slack` that kernels may
// read beyond them, all of them `fill` (the bits of a float) before the first run.
struct Slot {
  int64_t image, slack, fill;
};

enum Kind : int64_t {
  PLANES,  // [channel][phase][row][column], padded; phase (i, j) holds every ph-th row from i on
  TILES    // [tile][channel][pixel]: `tile` pixels of the flattened image, of all channels
};
enum Place : int64_t { ARENA, INPUT, OUTPUT };

// How an intermediate of `channels` channels of `height` x `width` lies in memory. It may be some
// of the channels of a larger one, `total` channels, from `first` on.
struct View {
  int64_t kind, place, index;
  int64_t channels, first, total, height, width;
  int64_t tile;                        // TILES: pixels a tile
  int64_t phases_h, phases_w;          // PLANES: phases
  int64_t top, left;                   // padding before the first row and column
  int64_t row, plane;                  // floats from row to row, and from phase to phase
  int64_t image;                       // floats from image to image
};

enum Code : int64_t { COPY = 1, POINT, BLOCK, POOL, MEAN, LINEAR };

// destination = clamp(source[stride_h * h, stride_w * w] * scale[c] + shift[c] + residual)
struct Copy {
  int64_t source, destination, residual, stride_h, stride_w, scale_at, shift_at, low, high;
};

// A 1x1 convolution on tiles. Output channels go in chunks, input channels in blocks, and for each
// (chunk, block) there are chunk / (lists * shared) units: so many lists of input channels, read
// side by side, each for so many output channels that share it.
struct Point {
  int64_t source, destination, residual, bias_at, units_at, indices_at, weights_at;
  int64_t channels, chunk, block, lists, shared, low, high;
};
struct Unit {
  int32_t channel[4];  // in the chunk
  int64_t count;       // entries of each list
  int64_t start;       // of its entries in the layer's lists, in entries of all lists
};

// A convolution on planes: a sum of rectangles of weights over shifted rows.
struct Block {
  int64_t source, destination, residual, bias_at, starts_at, runs_at, offsets_at, weights_at;
  int64_t channels, chunk;
  int64_t blocks;    // of input channels: runs are sorted by block, then by output channel
  int64_t rows;      // accumulators an item, of 16 floats each
  int64_t distance;  // floats from one accumulator's input to the next one's
  int64_t per_row;   // image rows in an accumulator
  int64_t low, high;
};
struct Run {
  int32_t rows, columns;  // of the rectangle
  int64_t count, offsets, weights;
};

enum Pooling : int64_t { MAXIMUM, SUM };
// destination = clamp(scale * pooled), over `count` taps at these offsets. Neighbours in a row are
// `step` (1 or 2) columns apart in the phase.
struct Pool {
  int64_t source, destination, mode, offsets_at, count, step, scale, low, high;
};

struct Mean {
  int64_t source, destination;
};

// rows: of the dense matrix, or lists of (index, weight) where `starts_at` is not negative
struct Linear {
  int64_t source, destination, bias_at, starts_at, indices_at, weights_at, channels, low, high;
};

}  // namespace starfire
