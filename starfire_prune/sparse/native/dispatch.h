// The kernels of the instruction set that is chosen at run time.

#pragma once

#include <cstdint>
#include <cstdlib>

#include "program.h"

namespace starfire {

// What the operations of a running program read.
struct Context {
  const View* views;
  float* const* bases;  // the first image of each view
  const unsigned char* constant_bytes;
  int64_t batch;

  float* image(int64_t view, int64_t n) const { return bases[view] + n * views[view].image; }

  template <class Type>
  const Type* constants(int64_t at) const {
    return reinterpret_cast<const Type*>(constant_bytes + at);
  }

  float* scratch(int64_t floats) const {
    void* memory = std::malloc(static_cast<size_t>(floats) * sizeof(float));
    if (!memory) std::abort();
    return static_cast<float*>(memory);
  }
  void release(float* memory) const { std::free(memory); }
};

// Runs the work items [begin, end) of an operation.
using RunItems = void (*)(const Context& context, int64_t opcode, const void* operation,
                          int64_t begin, int64_t end);

// Instruction sets, the wider ones last. AVX512 has dot products of bytes (VNNI) where the kernels for
// bytes are concerned; AVX_VNNI is AVX2 with them.
enum Isa : int64_t { WIDEST = 0, PORTABLE = 128, AVX2 = 256, AVX_VNNI = 257, AVX512 = 512 };

// The kernels of an instruction set, or of the widest one below it that this machine has.
RunItems float_kernels(int64_t isa);
RunItems byte_kernels(int64_t isa);

}  // namespace starfire
