// The arithmetic of convolutions of floats, for the kernels that are templates of it.

namespace STARFIRE_ISA {

struct Floats {
  using Factor = Register;

  INLINE Factor factor(Register weights) { return weights; }
  INLINE void multiply_add(Vector& sum, Factor factor, const Vector& vector) {
    starfire::STARFIRE_ISA::multiply_add(sum, factor, vector);
  }
  INLINE Vector add(const Vector& one, const Vector& other) {
    return starfire::STARFIRE_ISA::add(one, other);
  }
};

}  // namespace STARFIRE_ISA
