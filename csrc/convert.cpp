#include "sgld/convert.h"

#include "sgld/vec.h"

namespace sgld {
namespace {

template <class To>
void from_double(const void* from_any, void* to_any, int64_t count) {
  const double* from = static_cast<const double*>(from_any);
  To* to = static_cast<To*>(to_any);
  for (int64_t i = 0; i < count; ++i) narrow(static_cast<float>(from[i]), to + i);
}

}  // namespace

const Converts& converts(Isa isa) {
#if defined(SGLD_X86)
  // What rounds to bf16 in hardware flushes subnormals, so that level takes the one below it.
  if (isa >= Isa::avx512) return converts_avx512;
  if (isa == Isa::avx2) return converts_avx2;
#endif
  (void)isa;
  return converts_scalar;
}

Convert converter(Isa isa, Number from, DType to) {
  static constexpr Convert doubles[] = {from_double<float>, from_double<bf16>, from_double<f16>};
  const int column = static_cast<int>(to);
  switch (from) {
    case Number::bytes:
      return nullptr;
    case Number::f64:
      return doubles[column];
    case Number::f32:
    case Number::bf16:
    case Number::f16:
      break;
  }
  return converts(isa).table[static_cast<int>(from) - static_cast<int>(Number::f32)][column];
}

}  // namespace sgld
