// attention: softmax(q kᵀ · scale) v per head, no mask. The call as the pure code sees it: checked, in sequences, with
// element strides. No torch in here.
#pragma once

#include <vector>

#include "sgld/types.h"

namespace sgld {

constexpr const char* kAttention = "attention";
constexpr const char* kAttentionMerge = "attention_merge";

constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kHeadDimStep = 8;

// [B, N, H, d] or, packed, [N, H, d] with a batch stride of 0; dense in d.
struct HeadRows {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// Queries that attend to the same keys. `q` and `k` are the first token's element offsets in q and in k and v;
// `row` is the first row of the result, `lse` the place of its first log-sum-exp in a head.
struct Sequence {
  int64_t q = 0, k = 0, v = 0, row = 0, lse = 0;
  int64_t S = 0, L = 0;
};

struct Attention {
  HeadRows q, k, v;
  DType dtype = DType::f32;
  void* out = nullptr;   // contiguous, q's shape and dtype
  float* lse = nullptr;  // [B, H, S] or, packed, [H, N]; may be absent
  int64_t lse_head = 0;  // elements between two heads of lse
  int64_t B = 0, S = 0, L = 0, H = 0, d = 0;
  float scale = 0;
  bool packed = false;
};

// Checks the shapes; throws std::invalid_argument with the name of the size that differs.
Attention bind_attention(const View& q, const View& k, const View& v, double scale, bool packed);

// One sequence per batch row.
std::vector<Sequence> dense_sequences(const Attention& p);
// Sequence i has the queries [cu_q[i], cu_q[i+1]) and the keys [cu_k[i], cu_k[i+1]).
std::vector<Sequence> packed_sequences(const Attention& p, const std::vector<int64_t>& cu_q,
                                       const std::vector<int64_t>& cu_k);

// attention_merge: two results over different keys as if their keys had been one set. Rows of one head dim, one
// log-sum-exp a row; row (b, s, h) has its log-sum-exp at (b, h, s).
struct AttentionMerge {
  const void* a = nullptr;
  const void* b = nullptr;
  DType a_dtype = DType::f32, b_dtype = DType::f32;  // the result has a's
  const float* lse_a = nullptr;
  const float* lse_b = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int64_t B = 0, S = 0, H = 0, d = 0;
};

// Everything contiguous; out [B, S, H, d] or [S, H, d], lse [B, H, S] or [H, S].
AttentionMerge bind_attention_merge(const View& out_a, const View& lse_a, const View& out_b,
                                    const View& lse_b);

}  // namespace sgld
