// Includes STARFIRE_CODE, the name of a file, once for each instruction set. The file defines its
// functions in the namespace STARFIRE_ISA. If STARFIRE_BYTES is 1, AVX-512 and AVX2 are compiled with
// the dot products of bytes that newer machines have (VNNI).

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

// A namespace of its own for each file and instruction set, so that the linker merges nothing
#if STARFIRE_BYTES
#define ISA_NAME(name) byte_##name
#else
#define ISA_NAME(name) name
#endif

namespace starfire {

#define ISA 128
#define STARFIRE_ISA ISA_NAME(portable)
#include STARFIRE_CODE
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
#define STARFIRE_ISA ISA_NAME(avx2)
#include STARFIRE_CODE
#undef INLINE
#undef STARFIRE_ISA
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if STARFIRE_BYTES
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define ISA 256
#define STARFIRE_VNNI 1
#define STARFIRE_ISA ISA_NAME(avx_vnni)
#include STARFIRE_CODE
#undef INLINE
#undef STARFIRE_ISA
#undef STARFIRE_VNNI
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__clang__) && STARFIRE_BYTES
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512vnni,fma"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,fma"))), apply_to = function)
#elif STARFIRE_BYTES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512vnni,fma")
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,fma")
#endif
#define ISA 512
#define STARFIRE_ISA ISA_NAME(avx512)
#include STARFIRE_CODE
#undef INLINE
#undef STARFIRE_ISA
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64

}  // namespace starfire
