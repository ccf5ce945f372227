// The row functions of the memory-bound ops, one table per ISA. Rows [begin, end); `scratch` is private to the calling
// thread and as large as the op's `*_scratch` says.
#pragma once

#include <cstdint>

#include "sgld/elementwise.h"
#include "sgld/isa.h"
#include "sgld/qk_norm_rope.h"
#include "sgld/residual.h"

namespace sgld {

struct MemoryBoundRows {
  void (*gate_residual)(const GateResidual&, int64_t begin, int64_t end, float* scratch);
  void (*gate_residual_norm_modulate)(const GateResidualNormModulate&, int64_t begin, int64_t end,
                                      float* scratch);
  void (*qk_norm_rope)(const QkNormRope&, int64_t begin, int64_t end, float* scratch);
  void (*gelu_tanh)(const Elementwise&, int64_t begin, int64_t end);
  void (*silu_mul)(const Elementwise&, int64_t begin, int64_t end);
  void (*solver_step)(const SolverStep&, int64_t begin, int64_t end);  // chunks, see solver_chunks
  void (*quant_fp8_rowwise)(const QuantRows&, int64_t begin, int64_t end, float* scratch);
};

extern const MemoryBoundRows memory_bound_scalar;
#if defined(SGLD_X86)
extern const MemoryBoundRows memory_bound_avx2;
extern const MemoryBoundRows memory_bound_avx512;
extern const MemoryBoundRows memory_bound_avx512_bf16;
#endif

// The table of a level.
const MemoryBoundRows& memory_bound_rows(Isa isa);

// Floats of scratch.
static inline int64_t gate_residual_scratch(int64_t D) { return D; }
static inline int64_t gate_residual_norm_modulate_scratch(int64_t D) { return 3 * D; }
static inline int64_t qk_norm_rope_scratch(const QkNormRope& p) {
  const int64_t most = p.q.H > p.k.H ? p.q.H : p.k.H;
  return (2 + 2 * most) * p.d;
}
static inline int64_t quant_fp8_rowwise_scratch(int64_t D) { return D; }

// Pieces of kChunk elements in one batch row of a solver step.
static inline int64_t solver_chunks(const SolverStep& p) { return (p.N + kChunk - 1) / kChunk; }

}  // namespace sgld
