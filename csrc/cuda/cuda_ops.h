// What ../bindings_cuda.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace sgld {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void gate_residual_norm_modulate_cuda(const Tensor& x, const Tensor& y,
                                      const std::optional<Tensor>& gate,
                                      const std::optional<Tensor>& scale,
                                      const std::optional<Tensor>& shift,
                                      const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, double eps, bool rms,
                                      Tensor residual, Tensor out);
void qk_norm_rope_cuda(const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q,
                       const std::optional<Tensor>& weight_k, const std::optional<Tensor>& cos,
                       const std::optional<Tensor>& sin, double eps, bool full, bool interleaved,
                       Tensor out_q, Tensor out_k);
void attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                    const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                    int64_t max_q, Tensor out, Tensor lse);
void attention_sm90_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                         const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                         int64_t max_q, Tensor out, Tensor lse);

}  // namespace sgld
