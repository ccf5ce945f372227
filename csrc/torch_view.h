// From torch's stable tensors to the views of the pure code: the only header that knows both.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "sgld/check.h"
#include "sgld/types.h"

namespace sgld {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(op, name, " must be float32, bfloat16 or float16");
  }
}

inline View view_of(const char* op, const char* name, const Tensor& tensor) {
  View view;
  view.present = true;
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(op, name, tensor.scalar_type());
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (sizes.size() > kMaxDims) fail(op, name, " has more than ", kMaxDims, " dimensions");
  view.ndim = static_cast<int>(sizes.size());
  for (int i = 0; i < view.ndim; ++i) {
    view.sizes[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  return view;
}

// `device` is the tensor that decides where the op runs.
inline View view_of(const char* op, const char* name, const std::optional<Tensor>& tensor,
                    const Tensor& device) {
  if (!tensor) return {};
  if (tensor->is_cuda() != device.is_cuda() ||
      tensor->get_device_index() != device.get_device_index())
    fail(op, name, " is on another device than x");
  return view_of(op, name, *tensor);
}

// A tensor whose last dimension is dense, copied only if it must be.
inline Tensor dense_last(const Tensor& tensor) {
  const int64_t n = tensor.dim();
  const bool dense = n == 0 || tensor.size(n - 1) <= 1 || tensor.stride(n - 1) == 1;
  return dense && (n <= 3 || tensor.is_contiguous()) ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense_last(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense_last(*tensor)) : std::nullopt;
}

}  // namespace sgld
