// Inference of convolutional networks with sparse weights: runs the programs of program.h.
//
// The kernels are compiled for several instruction sets and chosen at run time. There is no state:
// a program and its constants are read only, and each call has an arena of its own.

#include <ATen/Parallel.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "program.h"

namespace starfire {

struct Context {
  const View* views;
  float* const* bases;  // the first image of each view
  const unsigned char* blob;
  int64_t batch;

  float* image(int64_t view, int64_t n) const { return bases[view] + n * views[view].image; }

  template <class Type>
  const Type* constants(int64_t at) const {
    return reinterpret_cast<const Type*>(blob + at);
  }

  float* scratch(int64_t floats) const {
    void* memory = std::malloc(static_cast<size_t>(floats) * sizeof(float));
    if (!memory) std::abort();
    return static_cast<float*>(memory);
  }
  void release(float* memory) const { std::free(memory); }
};

}  // namespace starfire

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
typedef int Indices __attribute__((vector_size(64)));
#define SHUFFLE(one, other, ...) __builtin_shuffle(one, other, Indices{__VA_ARGS__})
#endif

namespace starfire {

#define ISA 128
#define STARFIRE_ISA portable
#include "kernels.h"
#include "rows.h"
#include "operations.h"
#undef INLINE
#undef STARFIRE_ISA
#undef ISA

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA 256
#define STARFIRE_ISA avx2
#include "kernels.h"
#include "rows.h"
#include "operations.h"
#undef INLINE
#undef STARFIRE_ISA
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,fma")
#endif
#define ISA 512
#define STARFIRE_ISA avx512
#include "kernels.h"
#include "rows.h"
#include "operations.h"
#undef INLINE
#undef STARFIRE_ISA
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace {

using RunItems = void (*)(const Context&, int64_t, const void*, int64_t, int64_t);

RunItems items_for(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 512) return avx512::run_items;
  if (isa == 256) return avx2::run_items;
#endif
  return portable::run_items;
}

int64_t ceiling(int64_t number, int64_t by) { return (number + by - 1) / by; }

int64_t nanoseconds() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Items that an operation falls into, which threads may do in any order.
int64_t items_of(const Context& c, int64_t code, const int64_t* fields) {
  const void* operation = fields;
  const View& source = c.views[fields[0]];
  const View& destination = c.views[fields[1]];
  switch (code) {
    case COPY:
    case POOL:
      return c.batch * destination.channels * destination.height;
    case POINT: {
      auto o = static_cast<const Point*>(operation);
      return c.batch * ceiling(source.height * source.width, source.tile) *
             ceiling(o->channels, o->chunk);
    }
    case BLOCK: {
      auto o = static_cast<const Block*>(operation);
      int64_t parts = ceiling(ceiling(destination.height, o->per_row), o->rows);
      int64_t strips = o->per_row > 1 ? 1 : ceiling(destination.width, LANES);
      return c.batch * parts * strips * ceiling(o->channels, o->chunk);
    }
    case MEAN:
      return c.batch * source.channels;
    default:
      return static_cast<const Linear*>(operation)->channels;
  }
}

int64_t fields_of(int64_t code) {
  switch (code) {
    case COPY: return sizeof(Copy) / sizeof(int64_t);
    case POINT: return sizeof(Point) / sizeof(int64_t);
    case BLOCK: return sizeof(Block) / sizeof(int64_t);
    case POOL: return sizeof(Pool) / sizeof(int64_t);
    case MEAN: return sizeof(Mean) / sizeof(int64_t);
    case LINEAR: return sizeof(Linear) / sizeof(int64_t);
    default: return -1;
  }
}

struct Program {
  const Header* header;
  const Slot* slots;
  const View* views;
  const int64_t* operations;

  explicit Program(const int64_t* words)
      : header(reinterpret_cast<const Header*>(words)),
        slots(reinterpret_cast<const Slot*>(header + 1)),
        views(reinterpret_cast<const View*>(slots + header->slots)),
        operations(reinterpret_cast<const int64_t*>(views + header->views)) {}

  bool fits(int64_t length) const {
    constexpr int64_t size = sizeof(Header) / sizeof(int64_t);
    if (length < size || header->magic != MAGIC) return false;
    if (header->slots < 0 || header->slots > length || header->views < 0 || header->views > length)
      return false;
    const int64_t* begin = reinterpret_cast<const int64_t*>(header);
    const int64_t* at = operations;
    for (int64_t i = 0; i < header->operations; ++i) {
      if (at - begin >= length || fields_of(*at) < 0) return false;
      at += 1 + fields_of(*at);
    }
    return at - begin == length;
  }

  int64_t slot_floats(int64_t slot, int64_t batch) const {
    return ceiling(slots[slot].image * batch + slots[slot].slack, LANES) * LANES;
  }
};

}  // namespace
}  // namespace starfire

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// The widest instruction set of this machine that there are kernels for, in bits.
EXPORT int64_t starfire_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return 512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 256;
#endif
  return 128;
}

// Floats of the arena that a batch needs; -1 where this is no program.
EXPORT int64_t starfire_arena(const int64_t* words, int64_t length, int64_t batch) {
  starfire::Program program(words);
  if (!program.fits(length)) return -1;
  int64_t floats = 0;
  for (int64_t i = 0; i < program.header->slots; ++i) floats += program.slot_floats(i, batch);
  return floats;
}

// Fills a new arena.
EXPORT void starfire_fill(const int64_t* words, int64_t batch, float* arena) {
  starfire::Program program(words);
  for (int64_t i = 0; i < program.header->slots; ++i) {
    float value;
    static_assert(sizeof value <= sizeof(int64_t), "the bits of a float fit");
    std::memcpy(&value, &program.slots[i].fill, sizeof value);
    int64_t floats = program.slot_floats(i, batch);
    for (int64_t j = 0; j < floats; ++j) arena[j] = value;
    arena += floats;
  }
}

// Whether the caller's tensors are those of a program: so many, of so many floats an image.
EXPORT int64_t starfire_takes(const int64_t* words, int64_t inputs, const int64_t* input_floats,
                              int64_t outputs, const int64_t* output_floats) {
  using namespace starfire;
  Program program(words);
  if (inputs != program.header->inputs || outputs != program.header->outputs) return 0;
  for (int64_t i = 0; i < program.header->views; ++i) {
    const View& view = program.views[i];
    if (view.place == ARENA) continue;
    int64_t count = view.place == INPUT ? inputs : outputs;
    const int64_t* floats = view.place == INPUT ? input_floats : output_floats;
    if (view.index < 0 || view.index >= count || floats[view.index] != view.image) return 0;
  }
  return 1;
}

// Runs a program that fits and takes its inputs and outputs, on an arena filled once, with `isa` of at most starfire_isa().
// `times` gets the nanoseconds that each operation took, unless it is null.
EXPORT void starfire_run(const int64_t* words, const unsigned char* blob, int64_t batch,
                         int64_t isa, float* arena, const float* const* inputs,
                         float* const* outputs, int64_t* times) {
  using namespace starfire;
  Program program(words);
  std::vector<float*> slots, bases;
  for (int64_t i = 0; i < program.header->slots; ++i) {
    slots.push_back(arena);
    arena += program.slot_floats(i, batch);
  }
  for (int64_t i = 0; i < program.header->views; ++i) {
    const View& view = program.views[i];
    bases.push_back(view.place == ARENA   ? slots[view.index]
                    : view.place == INPUT ? const_cast<float*>(inputs[view.index])
                                          : outputs[view.index]);
  }
  Context context{program.views, bases.data(), blob, batch};
  RunItems run_items = items_for(isa);
  const int64_t* at = program.operations;
  for (int64_t i = 0; i < program.header->operations; ++i) {
    int64_t code = *at;
    const int64_t* fields = at + 1;
    auto before = times ? nanoseconds() : 0;
    at::parallel_for(0, items_of(context, code, fields), 1, [&](int64_t begin, int64_t end) {
      run_items(context, code, fields, begin, end);
    });
    if (times) times[i] = nanoseconds() - before;
    at = fields + fields_of(code);
  }
}

}  // extern "C"
