// Activation functions, as polynomials in vectors. Compiled once for each instruction set.
// Infinities and NaN have torch's results. Errors are some units in the last place of a result, or of
// the input where a result is close to zero.

namespace STARFIRE_ISA {

typedef uint32_t Integers __attribute__((vector_size(ISA / 8), aligned(4), may_alias));

// e^x; infinity above 88.4, close to zero below -87, anything for NaN.
INLINE Register exponential(Register x) {
  constexpr float LOG2_E = 1.44269504f, ROUNDING = 12582912.0f;  // 1.5 * 2^23
  constexpr float LN_2_HIGH = 0.693359375f, LN_2_LOW = -2.12194440e-4f;
  const Register low = broadcast(-87.3f), high = broadcast(88.376f);
  Register bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  Register rounded = bounded * broadcast(LOG2_E) + broadcast(ROUNDING);
  Register power = rounded - broadcast(ROUNDING);
  Register rest = bounded - power * broadcast(LN_2_HIGH);
  rest = rest - power * broadcast(LN_2_LOW);
  Register sum = broadcast(0.00139464193f);
  sum = sum * rest + broadcast(0.00836914964f);
  sum = sum * rest + broadcast(0.0416662619f);
  sum = sum * rest + broadcast(0.166665167f);
  sum = sum * rest + broadcast(0.5f);
  sum = sum * (rest * rest) + rest + broadcast(1.0f);
  // The low bits of `rounded` are the power of two
  Register result = (Register)((Integers)sum + ((Integers)rounded << 23));
  return x > high ? broadcast(__builtin_inff()) : result;
}

// The error function, from -1 to 1.
INLINE Register error_function(Register x) {
  const Register limit = broadcast(3.92f), one = broadcast(1.0f);
  Register bounded = x < -limit ? -limit : x;
  bounded = bounded > limit ? limit : bounded;
  Register square = bounded * bounded;
  Register above = broadcast(2.050186140e-6f), below = broadcast(3.809215559e-5f);
  above = above * square + broadcast(2.848716103e-4f);
  above = above * square + broadcast(3.765104805e-3f);
  above = above * square + broadcast(0.0527471527f);
  above = above * square + broadcast(0.190394476f);
  above = above * square + broadcast(1.12837911f);
  below = below * square + broadcast(1.162411878e-3f);
  below = below * square + broadcast(0.0149681941f);
  below = below * square + broadcast(0.114104167f);
  below = below * square + broadcast(0.502065480f);
  below = below * square + one;
  Register result = bounded * above / below;
  result = x < -limit ? -one : result;
  return x > limit ? one : result;
}

INLINE Register sigmoid(Register x) {
  Register result = broadcast(1.0f) / (broadcast(1.0f) + exponential(-x));
  return x == x ? result : x;  // a NaN's own bits may be lost in the exponential
}

INLINE Register silu(Register x) { return x / (broadcast(1.0f) + exponential(-x)); }

INLINE Register hard_sigmoid(Register x) {
  const Register zero = broadcast(0.0f), six = broadcast(6.0f);
  Register sum = x + broadcast(3.0f);
  sum = sum < zero ? zero : sum;
  sum = sum > six ? six : sum;
  return sum * broadcast(1.0f / 6.0f);
}

INLINE Register hard_swish(Register x) { return x * hard_sigmoid(x); }

INLINE Register gelu(Register x) {
  return x * broadcast(0.5f) * (broadcast(1.0f) + error_function(x * broadcast(0.707106781f)));
}

// x / 2 * (1 + tanh(√(2/π) * (x + 0.044715 x³)))
INLINE Register gelu_tanh(Register x) {
  Register cubic = x * broadcast(-2 * 0.797884561f) *
                   (broadcast(1.0f) + broadcast(0.044715f) * (x * x));
  return x / (broadcast(1.0f) + exponential(cubic));
}

template <int64_t ACTIVATION>
INLINE Vector activate(const Vector& vector) {
  Vector result;
  UNROLL for (int i = 0; i < PARTS; ++i) {
    const Register x = vector.part[i];
    if constexpr (ACTIVATION == SILU) result.part[i] = silu(x);
    if constexpr (ACTIVATION == HARD_SWISH) result.part[i] = hard_swish(x);
    if constexpr (ACTIVATION == HARD_SIGMOID) result.part[i] = hard_sigmoid(x);
    if constexpr (ACTIVATION == SIGMOID) result.part[i] = sigmoid(x);
    if constexpr (ACTIVATION == GELU) result.part[i] = gelu(x);
    if constexpr (ACTIVATION == GELU_TANH) result.part[i] = gelu_tanh(x);
  }
  return result;
}

// Replaces `count` floats by their activations. Up to 15 floats after them are read.
template <int64_t ACTIVATION>
static void activate_floats(float* at, int64_t count) {
  for (; count >= LANES; count -= LANES, at += LANES) store(at, activate<ACTIVATION>(load(at)));
  if (count > 0) store_first(at, activate<ACTIVATION>(load(at)), count);
}

static void activate_floats(int64_t activation, float* at, int64_t count) {
  switch (activation) {
    case SILU: return activate_floats<SILU>(at, count);
    case HARD_SWISH: return activate_floats<HARD_SWISH>(at, count);
    case HARD_SIGMOID: return activate_floats<HARD_SIGMOID>(at, count);
    case SIGMOID: return activate_floats<SIGMOID>(at, count);
    case GELU: return activate_floats<GELU>(at, count);
    case GELU_TANH: return activate_floats<GELU_TANH>(at, count);
    default: return;
  }
}

}  // namespace STARFIRE_ISA
