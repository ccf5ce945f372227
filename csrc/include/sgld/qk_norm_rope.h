// qk_norm_rope: RMSNorm of queries and keys over a head or over all heads, then a rotation of pairs by the token's
// angles. The call as the pure code sees it: checked, with element strides.
#pragma once

#include "sgld/norm_modulate.h"
#include "sgld/types.h"

namespace sgld {

// q or k: [B, S, H, d] with dense heads, and where the result goes (which may be the same place).
struct Heads {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t batch = 0, token = 0, head = 0;
  int64_t out_batch = 0, out_token = 0, out_head = 0;
  Rows weight;  // absent: not normalised
  int64_t S = 0, H = 0;
};

struct QkNormRope {
  Heads q, k;
  DType dtype = DType::f32;
  int64_t B = 0, d = 0;
  const float* cos = nullptr;  // [S, d/2], rows at angle_stride; nullptr: no rotation
  const float* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;
  float eps = 0;
  bool per_head = false;
  bool half = false;  // pairs (i, i + d/2) instead of (2i, 2i + 1)
};

constexpr const char* kQkNormRope = "qk_norm_rope";

QkNormRope bind_qk_norm_rope(const View& q, const View& k, const View& weight_q,
                             const View& weight_k, const View& cos, const View& sin, double eps,
                             bool per_head, bool half, const View& q_out, const View& k_out);

}  // namespace sgld
