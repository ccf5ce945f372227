#include "lora_apply.h"
#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_avx2() { return LoraKernel<Avx2Vec, LoraChains<Avx2Vec>>::kernels(false); }

LoraApplyRun lora_apply_avx2() { return LoraApply<Avx2Vec>::run; }

}  // namespace sgld
