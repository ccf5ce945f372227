// What bindings_weights.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace sgld {

using torch::stable::Tensor;

// Fills dense tensors on the CPU. Each has the index of its file, the byte where its numbers begin and what they are
// there (`Number`). Nothing is returned, or what could not be read: the index of the tensor, and errno (0: the file
// ends too early).
std::vector<int64_t> read_weights_cpu(const std::vector<Tensor>& targets,
                                      const std::vector<int64_t>& buffered,
                                      const std::vector<int64_t>& direct,
                                      const std::vector<int64_t>& files,
                                      const std::vector<int64_t>& begins,
                                      const std::vector<int64_t>& numbers, int64_t threads);

}  // namespace sgld
