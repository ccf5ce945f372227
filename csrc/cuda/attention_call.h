// The boundary that the attention kernels share: checks with named sizes, and the call as a kernel takes it.
#pragma once

#include <cuda_bf16.h>

#include <optional>

#include "../torch_view.h"

namespace sgld {

constexpr const char* kAttention = "attention";

struct AttentionStrides {
  int64_t batch = 0, token = 0, head = 0;
};

struct AttentionCall {
  const __nv_bfloat16 *q = nullptr, *k = nullptr, *v = nullptr;
  __nv_bfloat16* out = nullptr;
  float* lse = nullptr;           // [B, H, S]
  const int32_t* cu_q = nullptr;  // nullptr: the sequences are the rows of the batch
  const int32_t* cu_k = nullptr;
  AttentionStrides at_q, at_k, at_v, at_out;
  int64_t lse_batch = 0, lse_head = 0;
  int queries = 0, keys = 0;
  float scale_log2 = 0;
};

// What the host needs besides.
struct AttentionSizes {
  int64_t batch = 0, heads = 0, dim = 0;
  int64_t sequences = 0;
  int64_t longest = 0;  // the most queries of a sequence
};

// The result is empty where there are no queries: no sequences then.
AttentionCall bind_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                             const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                             int64_t max_q, Tensor& out, Tensor& lse, AttentionSizes& sizes);

}  // namespace sgld
