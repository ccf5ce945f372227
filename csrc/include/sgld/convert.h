// Changes the precision of numbers, by the best instructions there are.
#pragma once

#include <cstdint>

#include "sgld/isa.h"
#include "sgld/types.h"

namespace sgld {

// What a file holds: bytes that stay as they are, or floating-point numbers.
enum class Number : int32_t { bytes, f64, f32, bf16, f16 };

static inline int64_t size_of(Number number) {
  switch (number) {
    case Number::f64:
      return 8;
    case Number::f32:
      return 4;
    case Number::bf16:
    case Number::f16:
      return 2;
    case Number::bytes:
      break;
  }
  return 1;
}

// Both sides are aligned to their numbers and do not overlap. To nearest even; doubles go by way of fp32, as in torch.
using Convert = void (*)(const void* from, void* to, int64_t count);

struct Converts {
  // From f32, bf16 and f16, to each of these.
  Convert table[3][3];
};

const Converts& converts(Isa isa);

// Nothing but null for bytes: those are copied.
Convert converter(Isa isa, Number from, DType to);

extern const Converts converts_scalar;
#if defined(SGLD_X86)
extern const Converts converts_avx2;
extern const Converts converts_avx512;
#endif

}  // namespace sgld
