// The kernels for operations on quantized values, for several instruction sets.

#include "dispatch.h"

#define STARFIRE_BYTES 1
#define STARFIRE_CODE "byte_code.h"
#include "for_each_isa.h"

namespace starfire {

namespace {

// Whether this machine has an instruction set.
bool has([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == AVX512)
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
  if (isa == AVX_VNNI) return __builtin_cpu_supports("avxvnni");
  if (isa == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return false;
}

}  // namespace

RunItems byte_kernels(int64_t isa) {
#if defined(__x86_64__)
  static const bool avx512 = has(AVX512), avx_vnni = has(AVX_VNNI), avx2 = has(AVX2);
  if (isa == WIDEST) isa = AVX512;
  if (isa >= AVX512 && avx512) return byte_avx512::run_byte_items;
  if (isa >= AVX_VNNI && avx_vnni) return byte_avx_vnni::run_byte_items;
  if (isa >= AVX2 && avx2) return byte_avx2::run_byte_items;
#endif
  return byte_portable::run_byte_items;
}

}  // namespace starfire
