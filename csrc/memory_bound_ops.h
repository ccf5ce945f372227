// What bindings_memory_bound.cpp registers. The results are written into tensors that the caller made, so that it
// decides about fresh memory and work in place.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace sgld {

using torch::stable::Tensor;

void gate_residual_cpu(const Tensor& x, const Tensor& y, const std::optional<Tensor>& gate,
                       const Tensor& out);
void gate_residual_norm_modulate_cpu(const Tensor& x, const Tensor& y,
                                     const std::optional<Tensor>& gate,
                                     const std::optional<Tensor>& scale,
                                     const std::optional<Tensor>& shift,
                                     const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, double eps, bool rms,
                                     const Tensor& residual, const Tensor& out);
void qk_norm_rope_cpu(const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q,
                      const std::optional<Tensor>& weight_k, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, double eps, bool per_head, bool half,
                      const Tensor& q_out, const Tensor& k_out);
void gelu_tanh_cpu(const Tensor& x, const Tensor& out);
void silu_mul_cpu(const Tensor& gate, const Tensor& up, const Tensor& out);
void cfg_combine_step_cpu(const Tensor& x, const Tensor& v_cond,
                          const std::optional<Tensor>& v_uncond,
                          const std::optional<Tensor>& guidance, const Tensor& table,
                          const Tensor& last, const Tensor& m0, const Tensor& m1,
                          const Tensor& x_out, const Tensor& last_out, const Tensor& m0_out);
void quant_fp8_rowwise_cpu(const Tensor& x, const Tensor& out, const Tensor& scale);

}  // namespace sgld
