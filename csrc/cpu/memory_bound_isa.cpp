#include "memory_bound.h"

namespace sgld {

const MemoryBoundRows& memory_bound_rows(Isa isa) {
#if defined(SGLD_X86)
  if (isa == Isa::avx512_bf16) return memory_bound_avx512_bf16;
  if (isa == Isa::avx512) return memory_bound_avx512;
  if (isa == Isa::avx2) return memory_bound_avx2;
#endif
  (void)isa;
  return memory_bound_scalar;
}

}  // namespace sgld
