// What bindings_attention.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace sgld {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                         double scale, bool lse,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k);
std::tuple<Tensor, Tensor> attention_merge_cpu(const Tensor& out_a, const Tensor& lse_a,
                                               const Tensor& out_b, const Tensor& lse_b);

}  // namespace sgld
