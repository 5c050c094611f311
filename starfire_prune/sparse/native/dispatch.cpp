// Compiles the kernels for several instruction sets. This file doesn't include torch's headers,
// which take longer to compile than the kernels.

#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// The widest instruction set of this machine that there are kernels for, in bits.
int64_t widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return 512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 256;
#endif
  return 128;
}

}  // namespace

RunItems kernels_for(int64_t isa) {
  static const int64_t widest = widest_isa();
  if (isa == 0 || isa > widest) isa = widest;
#if defined(__x86_64__)
  if (isa == 512) return avx512::run_items;
  if (isa == 256) return avx2::run_items;
#endif
  return portable::run_items;
}

}  // namespace starfire
