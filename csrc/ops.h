// What bindings.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

namespace sgld {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string cpu_isa();
void cap_cpu_isa(std::string level);
bool has_cuda();

Tensor norm_modulate_cpu(const Tensor& x, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, double eps, bool rms,
                         ScalarType out_dtype);
Tensor norm_modulate_cuda(const Tensor& x, const std::optional<Tensor>& scale,
                          const std::optional<Tensor>& shift, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias, double eps, bool rms,
                          ScalarType out_dtype);

}  // namespace sgld
