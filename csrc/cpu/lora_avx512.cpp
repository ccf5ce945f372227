#include "lora_apply.h"
#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_avx512() {
  return LoraKernel<Avx512<false>, LoraChains<Avx512<false>>>::kernels(false);
}

LoraApplyRun lora_apply_avx512() { return LoraApply<Avx512<false>>::run; }

}  // namespace sgld
