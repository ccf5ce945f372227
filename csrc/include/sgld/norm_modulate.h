// norm_modulate: y = (norm(x) * weight + bias) * (1 + scale) + shift over the last dimension. The call as the pure code
// sees it: checked, in rows, with element strides. Shared by the CPU and the CUDA files.
#pragma once

#include "sgld/types.h"

namespace sgld {

// Rows of width D. A stride of 0 repeats a row over a batch (`batch`) or its tokens (`token`).
struct Rows {
  const void* data = nullptr;  // nullptr: absent
  DType dtype = DType::f32;
  int64_t batch = 0;
  int64_t token = 0;
};

struct NormModulate {
  Rows x, scale, shift, weight, bias;
  void* out = nullptr;  // contiguous [B, S, D]
  DType out_dtype = DType::f32;
  int64_t B = 0, S = 0, D = 0;
  float eps = 0;
  bool rms = false;
  bool affine = false;  // any of scale, shift, weight, bias is there
};

constexpr const char* kNormModulate = "norm_modulate";

// Checks the shapes and turns them into rows; throws std::invalid_argument with the name of the size that differs.
// x of up to three dimensions may have any row strides; more dimensions must be contiguous.
NormModulate bind_norm_modulate(const View& x, const View& scale, const View& shift,
                                const View& weight, const View& bias, double eps, bool rms,
                                const char* op = kNormModulate);

// A modulation of x [B, S, D] (or [S, D]) as rows: [B, D] (one per batch row), [D], or anything that broadcasts to x.
Rows bind_modulation(const char* op, const char* name, const View& view, int x_ndim, int64_t B,
                     int64_t S, int64_t D);

}  // namespace sgld
