// What a program of unknown origin must satisfy, so that no kernel reads or writes outside of its
// memory, divides by zero or runs for ever. It is checked once, when the program is loaded, and holds
// for every batch size. `checks_floats.cpp` and `checks_bytes.cpp` have a check for each operation.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../program.h"
#include "../runner.h"

namespace starfire {

// A reason why a program is refused.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool condition, const char* reason) {
  if (!condition) throw Refused(reason);
}

// Sizes are sums and products of a few fields, each of which is at most MAX_FIELD.
using Wide = __int128;
constexpr int64_t MAX_FIELD = int64_t{1} << 31;
constexpr int64_t MAX_SLACK = int64_t{1} << 20;
constexpr int64_t MAX_ROW = int64_t{1} << 24;  // pixels of an image's row, features of a layer
constexpr int64_t MAX_IMAGE = int64_t{1} << 30;  // floats of a slot, for each image

inline Wide ceil_div(Wide number, Wide by) { return (number + by - 1) / by; }

class Checker {
 public:
  Checker(const Program& program, const unsigned char* constants, int64_t constant_bytes,
          std::vector<int64_t> input_floats, std::vector<int64_t> output_floats);

  void check();  // throws Refused

  // Operations call these.
  const View& view(int64_t index) const;
  // Array `at` bytes into the constants, of which `count` items are read.
  template <class Type>
  const Type* array(int64_t at, Wide count, const char* what) const {
    bool fits = at >= 0 && at % 64 == 0 && count >= 0 &&
                at + count * Wide{sizeof(Type)} <= constant_bytes_;
    if (!fits) throw Refused(std::string(what) + " lie outside of the constants");
    return reinterpret_cast<const Type*>(constants_ + at);
  }
  // Positions of lists in an array: `lists` + 1 of them, not negative and never falling.
  const int32_t* starts(int64_t at, Wide lists, const char* what);
  // Lists are read this many times; those of a packed model don't overlap.
  void count_entries(Wide bytes);

  // A view that is read: `end` lanes from the start of an image on may be loaded.
  void reads_until(int64_t index, Wide end) const;
  // Pixels that are read row by row, with `past` lanes after them that may be loaded.
  void reads_rows(int64_t index, int64_t past) const;
  // A destination: it isn't read by this operation, nor an input of the program.
  void writes(int64_t index, std::initializer_list<int64_t> sources);
  // An operand of each result, such as a residual: a view of the destination's layout; as tiles, it
  // may be a part of other values than the destination if `anywhere`.
  void reads_like(int64_t operand, int64_t destination, bool anywhere = false) const;
  // What is computed of results in their place.
  void activates(int64_t activation, int64_t destination) const;

 private:
  void check_slots() const;
  void check_view(const View& view) const;
  void check_operation(int64_t opcode, const int64_t* fields);
  void check_outputs();
  Wide room(const View& view) const;
  bool overlap(const View& one, const View& other) const;

  const Program& program_;
  const unsigned char* constants_;
  int64_t constant_bytes_;
  std::vector<int64_t> input_floats_, output_floats_;
  std::vector<bool> written_slots_;
  std::vector<const View*> written_outputs_;
  Wide entries_ = 0;
};

Wide channel_lanes(const View& view);   // from channel to channel; of all tiles, for tiles
Wide channel_at(const View& view, int64_t channel);
Wide pixels(const View& view);
void require_same_size(const View& one, const View& other);
void require_one_pixel(const View& view);
void require_range(int64_t value, int64_t low, int64_t high, const char* name);
void require_small_number(int64_t bits, const char* name);  // the bits of a float

// Segments of a destination that a kernel keeps at once, for so many rows.
void require_segments(const View& destination, Wide rows, int64_t row_pixels);

void check_float_operation(Checker& checker, int64_t opcode, const void* operation);
void check_byte_operation(Checker& checker, int64_t opcode, const void* operation);

// Shared by floats and bytes.
void check_strided_copy(Checker& checker, int64_t source, int64_t destination, int64_t stride_h,
                        int64_t stride_w);
void check_pool(Checker& checker, int64_t source, int64_t destination, int64_t offsets_at,
                int64_t count, int64_t step);
void check_tiled(Checker& checker, int64_t source, int64_t destination);  // of 1x1 convolutions
// Indices of lists of input channels on tiles of pixels.
void check_indices(const View& source, const uint16_t* indices, Wide count, Wide channels);

// The reach of the work items of a convolution on planes.
struct Reach {
  Wide furthest;      // lanes from the start of an image to the end of the last accumulator's row,
                      // for offset 0 and an input of 16 lanes
  Wide furthest_run;  // the same with the rows that kernels for rectangles round up to
  Wide start;         // the same of the first accumulator
};
Reach check_spatial_items(Checker& checker, const Spatial& o);
// Rectangles for each output channel.
void check_runs(Checker& checker, const Spatial& o, const Reach& reach);

}  // namespace starfire
