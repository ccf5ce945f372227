#include "lora_block.h"

namespace sgld {

LoraKernels lora_kernels_avx2() { return LoraKernel<Avx2Vec, LoraChains<Avx2Vec>>::kernels(false); }

}  // namespace sgld
