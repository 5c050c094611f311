// The arithmetic of convolutions of bytes. A lane holds the unsigned bytes of four input channels (a
// quad); a factor holds four signed weights in each lane. Sums are int32 and exact.

namespace STARFIRE_ISA {

typedef int32_t IntRegister __attribute__((vector_size(ISA / 8), aligned(4), may_alias));

INLINE IntRegister as_ints(Register value) { return reinterpret_cast<IntRegister>(value); }
INLINE Register as_lanes(IntRegister value) { return reinterpret_cast<Register>(value); }

// Sums of int32 in vectors, for an arithmetic that adds products of one register.
template <class Arithmetic>
struct VectorsOf : Arithmetic {
  using Factor = typename Arithmetic::Factor;

  INLINE void multiply_add(Vector& sum, const Factor& factor, const Vector& quads) {
    UNROLL for (int i = 0; i < PARTS; ++i)
      sum.part[i] = Arithmetic::add_products(sum.part[i], factor, quads.part[i]);
  }
  INLINE Vector add(const Vector& one, const Vector& other) {
    Vector sum;
    UNROLL for (int i = 0; i < PARTS; ++i)
      sum.part[i] = as_lanes(as_ints(one.part[i]) + as_ints(other.part[i]));
    return sum;
  }
};

#if ISA == 512

struct DotProducts {
  using Factor = Register;

  INLINE Factor factor(Register weights) { return weights; }
  INLINE Register add_products(Register sum, Factor factor, Register quads) {
    return reinterpret_cast<Register>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                          reinterpret_cast<__m512i>(quads),
                                                          reinterpret_cast<__m512i>(factor)));
  }
};
using Bytes = VectorsOf<DotProducts>;
using NarrowBytes = Bytes;

#elif ISA == 256 && STARFIRE_VNNI

struct DotProducts {
  using Factor = Register;

  INLINE Factor factor(Register weights) { return weights; }
  INLINE Register add_products(Register sum, Factor factor, Register quads) {
    return reinterpret_cast<Register>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                              reinterpret_cast<__m256i>(quads),
                                                              reinterpret_cast<__m256i>(factor)));
  }
};
using Bytes = VectorsOf<DotProducts>;
using NarrowBytes = Bytes;

#elif ISA == 256

// For layers in which no sum of two products exceeds the range of int16, at which `vpmaddubsw`
// saturates. The packer decides it from the weights and from the range of the bytes.
struct PairsOfProducts {
  using Factor = Register;

  INLINE Factor factor(Register weights) { return weights; }
  INLINE Register add_products(Register sum, Factor factor, Register quads) {
    __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(quads),
                                         reinterpret_cast<__m256i>(factor));
    __m256i products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return as_lanes(as_ints(sum) + reinterpret_cast<IntRegister>(products));
  }
};

// For all other layers: even and odd bytes are multiplied as int16.
struct EvenAndOdd {
  struct Factor {
    __m256i even, odd;
  };

  INLINE Factor factor(Register weights) {
    __m256i bytes = reinterpret_cast<__m256i>(weights);
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  INLINE Register add_products(Register sum, const Factor& factor, Register quads) {
    __m256i bytes = reinterpret_cast<__m256i>(quads);
    __m256i even_bytes = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    __m256i even = _mm256_madd_epi16(even_bytes, factor.even);
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), factor.odd);
    return as_lanes(as_ints(sum) + reinterpret_cast<IntRegister>(even) +
                    reinterpret_cast<IntRegister>(odd));
  }
};
using Bytes = VectorsOf<EvenAndOdd>;
using NarrowBytes = VectorsOf<PairsOfProducts>;

#else

struct OneByOne {
  using Factor = Register;

  INLINE Factor factor(Register weights) { return weights; }
  INLINE Register add_products(Register sum, Factor factor, Register quads) {
    IntRegister bytes = as_ints(quads), weights = as_ints(factor), total = as_ints(sum);
    UNROLL for (int j = 0; j < 4; ++j)
      total += ((bytes >> (8 * j)) & 255) * ((weights << (24 - 8 * j)) >> 24);
    return as_lanes(total);
  }
};
using Bytes = VectorsOf<OneByOne>;
using NarrowBytes = Bytes;

#endif

// ---------------------------------------------------------------------------------------------
// Merging channels
// ---------------------------------------------------------------------------------------------

// Which byte of each lane of a vector becomes which byte of the merged one.
#if ISA >= 256
struct ByteChoice {
  IntRegister indices;  // of bytes within 128 bits; those with the highest bit set give zeros
};
#else
struct ByteChoice {
  int from, to;
};
#endif

INLINE ByteChoice byte_choice(int from, int to) {
#if ISA >= 256
  IntRegister indices;
  for (int i = 0; i < WIDTH; ++i) {
    uint32_t others = 0x80808080u & ~(0xffu << (8 * to));
    indices[i] = static_cast<int32_t>(others | static_cast<uint32_t>(i % 4 * 4 + from) << (8 * to));
  }
  return {indices};
#else
  return {from, to};
#endif
}

// `merged`, in which the chosen byte is zero, with that byte of `source`.
INLINE Vector with_byte(const Vector& merged, const Vector& source, const ByteChoice& choice) {
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
#if ISA == 512
    auto chosen = reinterpret_cast<IntRegister>(
        _mm512_shuffle_epi8(reinterpret_cast<__m512i>(source.part[i]),
                            reinterpret_cast<__m512i>(choice.indices)));
#elif ISA == 256
    auto chosen = reinterpret_cast<IntRegister>(
        _mm256_shuffle_epi8(reinterpret_cast<__m256i>(source.part[i]),
                            reinterpret_cast<__m256i>(choice.indices)));
#else
    IntRegister chosen = ((as_ints(source.part[i]) >> (8 * choice.from)) & 255) << (8 * choice.to);
#endif
    result.part[i] = as_lanes(as_ints(merged.part[i]) | chosen);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------
// From sums to results
// ---------------------------------------------------------------------------------------------

INLINE Vector floats_of_ints(const Vector& ints) {
  Vector floats;
  UNROLL for (int i = 0; i < PARTS; ++i)
    floats.part[i] = __builtin_convertvector(as_ints(ints.part[i]), Register);
  return floats;
}

// one * factor + other, rounded once
INLINE Vector fused(const Vector& one, Register factor, const Vector& other) {
  Vector result;
#if ISA == 512
  result.part[0] = reinterpret_cast<Register>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(one.part[0]), reinterpret_cast<__m512>(factor),
      reinterpret_cast<__m512>(other.part[0])));
#elif ISA == 256
  UNROLL for (int i = 0; i < PARTS; ++i)
    result.part[i] = reinterpret_cast<Register>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(one.part[i]), reinterpret_cast<__m256>(factor),
        reinterpret_cast<__m256>(other.part[i])));
#else
  for (int i = 0; i < PARTS; ++i)
    for (int j = 0; j < WIDTH; ++j)
      result.part[i][j] = __builtin_fmaf(one.part[i][j], factor[j], other.part[i][j]);
#endif
  return result;
}

// Byte `channel` (0 to 3) of each lane, as a float.
INLINE Vector byte_of(const Vector& quads, int channel) {
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i)
    result.part[i] = as_lanes((as_ints(quads.part[i]) >> (8 * channel)) & 255);
  return floats_of_ints(result);
}

// Floats rounded to the nearest int32, ties to even. They are less than 2^31 in size.
INLINE Vector rounded(const Vector& values) {
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
#if ISA == 512
    result.part[i] = reinterpret_cast<Register>(
        _mm512_cvtps_epi32(reinterpret_cast<__m512>(values.part[i])));
#elif ISA == 256
    result.part[i] = reinterpret_cast<Register>(
        _mm256_cvtps_epi32(reinterpret_cast<__m256>(values.part[i])));
#else
    // 1.5 * 2^23 is so large that the sum has no bits for fractions. What exceeds 2^22, which is no
    // byte, is clamped before.
    Register value = values.part[i] < -4194304.0f ? broadcast(-4194304.0f) : values.part[i];
    value = value > 4194303.0f ? broadcast(4194303.0f) : value;
    result.part[i] = as_lanes(as_ints(value + 12582912.0f) - 0x4B400000);
#endif
  }
  return result;
}

// Lanes with the bytes of four vectors of int32, which saturate at 0 and 255.
INLINE Vector packed(const Vector (&ints)[4]) {
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
#if ISA == 512
    auto part = [&](int j) { return reinterpret_cast<__m512i>(ints[j].part[i]); };
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(part(0), part(1)),
                                        _mm512_packs_epi32(part(2), part(3)));
    const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    result.part[i] = reinterpret_cast<Register>(_mm512_shuffle_epi8(bytes, order));
#elif ISA == 256
    auto part = [&](int j) { return reinterpret_cast<__m256i>(ints[j].part[i]); };
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(part(0), part(1)),
                                        _mm256_packs_epi32(part(2), part(3)));
    const __m256i order =
        _mm256_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400, 0x0f0b0703, 0x0e0a0602,
                         0x0d090501, 0x0c080400);
    result.part[i] = reinterpret_cast<Register>(_mm256_shuffle_epi8(bytes, order));
#else
    IntRegister quads = {};
    for (int j = 0; j < 4; ++j) {
      IntRegister bytes = as_ints(ints[j].part[i]);
      bytes = bytes < 0 ? IntRegister{} : bytes;
      bytes = bytes > 255 ? IntRegister{} + 255 : bytes;
      quads |= bytes << (8 * j);
    }
    result.part[i] = as_lanes(quads);
#endif
  }
  return result;
}

}  // namespace STARFIRE_ISA
