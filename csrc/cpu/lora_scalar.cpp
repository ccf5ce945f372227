#include "lora_apply.h"
#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_scalar() {
  return LoraKernel<ScalarVec, LoraChains<ScalarVec>>::kernels(false);
}

LoraApplyRun lora_apply_scalar() { return LoraApply<ScalarVec>::run; }

}  // namespace sgld
