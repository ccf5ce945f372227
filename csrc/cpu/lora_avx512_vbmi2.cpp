// As lora_avx512.cpp, with escapes moved and checksums added by one instruction each: every CPU with AVX512-BF16 but the
// first has them.
#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_avx512_vbmi2() {
  return LoraKernel<Avx512<false>, LoraChains<Avx512<false>>>::kernels(false);
}

}  // namespace sgld
