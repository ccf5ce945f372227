// Schemas and registrations of attention, nothing else.
#include <torch/csrc/stable/library.h>

#include "attention_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sgld, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, bool lse, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k) -> (Tensor, Tensor)");
  m.def(
      "attention_merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) {
  m.impl("attention", TORCH_BOX(&sgld::attention_cpu));
  m.impl("attention_merge", TORCH_BOX(&sgld::attention_merge_cpu));
}
