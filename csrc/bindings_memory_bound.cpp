// Schemas and registrations of the memory-bound ops, nothing else.
#include <torch/csrc/stable/library.h>

#include "memory_bound_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(sgld, m) {
  m.def("gate_residual(Tensor x, Tensor y, Tensor? gate, Tensor(a!) out) -> ()");
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, "
      "Tensor? weight, Tensor? bias, float eps, bool rms, Tensor(a!) residual, Tensor(b!) out) "
      "-> ()");
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? weight_q, Tensor? weight_k, Tensor? cos, "
      "Tensor? sin, float eps, bool per_head, bool half, Tensor(a!) q_out, Tensor(b!) k_out) "
      "-> ()");
  m.def("gelu_tanh(Tensor x, Tensor(a!) out) -> ()");
  m.def("silu_mul(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def(
      "cfg_combine_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? guidance, Tensor table, "
      "Tensor last, Tensor m0, Tensor m1, Tensor(a!) x_out, Tensor(b!) last_out, "
      "Tensor(c!) m0_out) -> ()");
  m.def("quant_fp8_rowwise(Tensor x, Tensor(a!) out, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sgld, CPU, m) {
  m.impl("gate_residual", TORCH_BOX(&sgld::gate_residual_cpu));
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&sgld::gate_residual_norm_modulate_cpu));
  m.impl("qk_norm_rope", TORCH_BOX(&sgld::qk_norm_rope_cpu));
  m.impl("gelu_tanh", TORCH_BOX(&sgld::gelu_tanh_cpu));
  m.impl("silu_mul", TORCH_BOX(&sgld::silu_mul_cpu));
  m.impl("cfg_combine_step", TORCH_BOX(&sgld::cfg_combine_step_cpu));
  m.impl("quant_fp8_rowwise", TORCH_BOX(&sgld::quant_fp8_rowwise_cpu));
}
