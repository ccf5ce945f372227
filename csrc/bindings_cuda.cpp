// Schemas and registrations of the ops that only CUDA has here, nothing else. A build without nvcc has the schemas too, so
// that Python describes their shapes in either.
#include <torch/csrc/stable/library.h>

#include "cuda/cuda_ops.h"
#include "lora_pass.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sgld, m) {
  m.def(
      "cuda_gate_residual_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor? scale, "
      "Tensor? shift, Tensor? weight, Tensor? bias, float eps, bool rms, Tensor(a!) residual, "
      "Tensor(b!) out) -> ()");
  m.def(
      "cuda_qk_norm_rope(Tensor q, Tensor k, Tensor? weight_q, Tensor? weight_k, Tensor? cos, "
      "Tensor? sin, float eps, bool full, bool interleaved, Tensor(a!) out_q, Tensor(b!) out_k) "
      "-> ()");
  m.def(
      "cuda_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, int max_seqlen_q, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cuda_sm90_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, int max_seqlen_q, Tensor(a!) out, Tensor(b!) lse) -> ()");
  // The tables hold addresses, of weights that it changes among others.
  m.def(
      "lora_pass(int mode, ScalarType dtype, Tensor matrices, Tensor parts, Tensor scales, "
      "Tensor owner, Tensor(a!) starts, Tensor(b!) counts, Tensor places, Tensor(c!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) { m.impl("lora_pass", TORCH_BOX(&sgld::lora_pass_cpu)); }

#if defined(SGLD_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sgld, CUDA, m) {
  m.impl("cuda_gate_residual_norm_modulate", TORCH_BOX(&sgld::gate_residual_norm_modulate_cuda));
  m.impl("cuda_qk_norm_rope", TORCH_BOX(&sgld::qk_norm_rope_cuda));
  m.impl("cuda_attention", TORCH_BOX(&sgld::attention_cuda));
  m.impl("cuda_sm90_attention", TORCH_BOX(&sgld::attention_sm90_cuda));
  m.impl("lora_pass", TORCH_BOX(&sgld::lora_pass_cuda));
}
#endif
