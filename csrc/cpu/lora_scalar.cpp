#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_scalar() { return LoraKernel<ScalarVec, LoraChains<ScalarVec>>::kernels(false); }

}  // namespace sgld
