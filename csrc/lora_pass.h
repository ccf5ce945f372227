// What bindings_cuda.cpp registers of the passes in sgld/lora_pass.h, and the boundary that both devices share.
#pragma once

#include "sgld/lora_pass.h"
#include "torch_view.h"

namespace sgld {

LoraTables bind_lora_tables(int64_t mode, const Tensor& matrices, const Tensor& parts,
                            const Tensor& scales, const Tensor& owner, Tensor& starts,
                            Tensor& counts, const Tensor& places, Tensor& sums);

void lora_pass_cuda(int64_t mode, ScalarType dtype, const Tensor& matrices, const Tensor& parts,
                    const Tensor& scales, const Tensor& owner, Tensor starts, Tensor counts,
                    const Tensor& places, Tensor sums);
// The same tiles one after another, by the same functions of 8 weights: for tests of the tables and their order.
void lora_pass_cpu(int64_t mode, ScalarType dtype, const Tensor& matrices, const Tensor& parts,
                   const Tensor& scales, const Tensor& owner, Tensor starts, Tensor counts,
                   const Tensor& places, Tensor sums);

}  // namespace sgld
