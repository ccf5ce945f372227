// What bindings_lora.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace sgld {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Codes, escapes, where each block's escapes end, checksums: one of each per matrix.
using LoraRecords = std::tuple<Tensors, Tensors, Tensors, std::vector<int64_t>>;

std::string lora_cpu_units();
LoraRecords lora_merge_cpu(const Tensors& weights, const Tensors& downs, const Tensors& ups,
                           const std::vector<double>& scales, const std::vector<int64_t>& starts,
                           const std::vector<int64_t>& counts);
// The checksum of each restored matrix.
std::vector<int64_t> lora_unmerge_cpu(const Tensors& weights, const Tensors& downs,
                                      const Tensors& ups, const std::vector<double>& scales,
                                      const std::vector<int64_t>& starts,
                                      const std::vector<int64_t>& counts, const Tensors& codes,
                                      const Tensors& escapes, const Tensors& ends);

// In place on y. x [rows, in], y [rows, out]; index int64 [rows], -1 for none.
void lora_apply_cpu(const Tensor& x, Tensor y, const std::optional<Tensor>& index,
                    const Tensors& downs, const Tensors& ups, const std::vector<double>& scales,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& counts);

}  // namespace sgld
