// The kernels for operations on floats, for several instruction sets. This file doesn't include
// torch's headers, which take longer to compile than the kernels.

#include "dispatch.h"

#define STARFIRE_CODE "float_code.h"
#include "for_each_isa.h"

namespace starfire {
namespace {

// The widest instruction set of this machine that there are kernels for.
int64_t widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

}  // namespace

RunItems float_kernels(int64_t isa) {
  static const int64_t widest = widest_isa();
  if (isa == WIDEST || isa > widest) isa = widest;
#if defined(__x86_64__)
  if (isa >= AVX512) return avx512::run_items;
  if (isa >= AVX2) return avx2::run_items;
#endif
  return portable::run_items;
}

}  // namespace starfire
