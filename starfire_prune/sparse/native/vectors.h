// Vectors of sixteen lanes of 32 bits, compiled once for each instruction set: ISA is 512, 256 or 128
// bits. A lane is a float, an int32, or the bytes of four channels (a quad).
// The standard library must not be used here: templates instantiated for one instruction set could
// be linked into the code for another.

namespace STARFIRE_ISA {

constexpr int WIDTH = ISA / 32;          // floats per register
constexpr int PARTS = LANES / WIDTH;     // registers per Vector
typedef float Register __attribute__((vector_size(ISA / 8), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE Register broadcast(float value) {
#if ISA == 512
  return Register{value, value, value, value, value, value, value, value,
                  value, value, value, value, value, value, value, value};
#elif ISA == 256
  return Register{value, value, value, value, value, value, value, value};
#else
  return Register{value, value, value, value};
#endif
}

// Sixteen floats.
struct Vector {
  Register part[PARTS];
};

INLINE Vector load(const float* from) {
  Vector vector;
  UNROLL for (int i = 0; i < PARTS; ++i)
    vector.part[i] = reinterpret_cast<const Register*>(from)[i];
  return vector;
}

INLINE void store(float* to, const Vector& vector) {
  UNROLL for (int i = 0; i < PARTS; ++i) reinterpret_cast<Register*>(to)[i] = vector.part[i];
}

INLINE Vector splat(float value) {
  Vector vector;
  UNROLL for (int i = 0; i < PARTS; ++i) vector.part[i] = broadcast(value);
  return vector;
}

INLINE void multiply_add(Vector& sum, Register factor, const Vector& vector) {
  UNROLL for (int i = 0; i < PARTS; ++i) sum.part[i] += factor * vector.part[i];
}

INLINE Vector add(const Vector& one, const Vector& other) {
  Vector sum;
  UNROLL for (int i = 0; i < PARTS; ++i) sum.part[i] = one.part[i] + other.part[i];
  return sum;
}

INLINE Vector multiply(const Vector& one, const Vector& other) {
  Vector product;
  UNROLL for (int i = 0; i < PARTS; ++i) product.part[i] = one.part[i] * other.part[i];
  return product;
}

INLINE Vector subtract(const Vector& one, const Vector& other) {
  Vector difference;
  UNROLL for (int i = 0; i < PARTS; ++i) difference.part[i] = one.part[i] - other.part[i];
  return difference;
}

INLINE Vector inverse_root(const Vector& vector) {  // 1 / √x
  float values[LANES];
  store(values, vector);
  for (int i = 0; i < LANES; ++i) values[i] = __builtin_sqrtf(values[i]);
  Vector roots = load(values), result;
  UNROLL for (int i = 0; i < PARTS; ++i) result.part[i] = broadcast(1.0f) / roots.part[i];
  return result;
}

INLINE Vector maximum(const Vector& one, const Vector& other) {  // NaN where either input is NaN
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    auto use_other = (one.part[i] < other.part[i]) | (other.part[i] != other.part[i]);
    result.part[i] = use_other ? other.part[i] : one.part[i];
  }
  return result;
}

INLINE Vector clamp(const Vector& vector, Register low, Register high) {  // NaN is kept
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    Register value = vector.part[i] < low ? low : vector.part[i];
    result.part[i] = value > high ? high : value;
  }
  return result;
}

INLINE void store_first(float* to, const Vector& vector, int64_t count) {
#if ISA == 512
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), vector.part[0]);
#else
  float values[LANES];
  store(values, vector);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
#endif
}

// from[0], from[2], … from[30]
INLINE Vector load_even(const float* from) {
#if ISA == 512
  return {SHUFFLE(load(from).part[0], load(from + 15).part[0], 0, 2, 4, 6, 8, 10, 12, 14, 17, 19,
                  21, 23, 25, 27, 29, 31)};
#else
  float values[LANES];
  for (int i = 0; i < LANES; ++i) values[i] = from[2 * i];
  return load(values);
#endif
}

// 16 floats from from[SHIFT] on: with wide registers from two loads that don't split a cache line
template <int SHIFT>
INLINE Vector shifted([[maybe_unused]] const float* from, const Vector& first,
                      [[maybe_unused]] const Vector& second) {
#if ISA == 512
  if (SHIFT == 0) return first;
  if (SHIFT == 1)
    return {SHUFFLE(first.part[0], second.part[0], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                    15, 16)};
  return {SHUFFLE(first.part[0], second.part[0], 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                  16, 17)};
#else
  return SHIFT == 0 ? first : load(from + SHIFT);
#endif
}

}  // namespace STARFIRE_ISA
