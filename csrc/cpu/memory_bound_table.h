// The table of row functions of one ISA, for the file that is compiled with its flags.
#pragma once

#include "elementwise_rows.h"
#include "memory_bound.h"
#include "qk_norm_rope_rows.h"
#include "residual_rows.h"

namespace sgld {

template <class V>
constexpr MemoryBoundRows memory_bound_table = {
    ResidualKernel<V>::run,         ResidualKernel<V>::run_fused,
    QkNormRopeKernel<V>::run,       ElementwiseKernel<V>::gelu_tanh,
    ElementwiseKernel<V>::silu_mul, ElementwiseKernel<V>::solver_step,
    ElementwiseKernel<V>::quant,
};

}  // namespace sgld
