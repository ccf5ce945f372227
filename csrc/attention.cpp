// The boundary checks of attention and attention_merge.
#include "sgld/attention.h"

#include "sgld/check.h"

namespace sgld {
namespace {

HeadRows bind_rows(const char* name, const View& view, bool packed, const Attention& p) {
  const int token = packed ? 0 : 1;
  if (view.ndim != token + 3)
    fail(kAttention, name, ' ', shape_of(view), " must be ", packed ? "[N, H, d]" : "[B, N, H, d]");
  if (view.dtype != p.dtype) fail(kAttention, name, " has another dtype than q");
  if (!packed) check_size(kAttention, name, view, 0, {"B", p.B});
  check_size(kAttention, name, view, token + 1, {"H", p.H});
  check_size(kAttention, name, view, token + 2, {"d", p.d});
  if (view.strides[token + 2] != 1 && p.d > 1)
    fail(kAttention, name, " must be dense in its last dimension");
  return {view.data, packed ? 0 : view.strides[0], view.strides[token], view.strides[token + 1]};
}

void check_cu_seqlens(const char* name, const std::vector<int64_t>& cu, int64_t total) {
  if (cu.empty() || cu.front() != 0) fail(kAttention, name, " must begin with 0");
  for (size_t i = 1; i < cu.size(); ++i)
    if (cu[i] < cu[i - 1]) fail(kAttention, name, " decreases at ", i);
  if (cu.back() != total)
    fail(kAttention, name, " ends with ", cu.back(), " where there are ", total, " tokens");
}

}  // namespace

Attention bind_attention(const View& q, const View& k, const View& v, double scale, bool packed) {
  const int token = packed ? 0 : 1;
  if (q.ndim != token + 3)
    fail(kAttention, "q ", shape_of(q), " must be ", packed ? "[N, H, d]" : "[B, S, H, d]");
  Attention p;
  p.packed = packed;
  p.dtype = q.dtype;
  p.scale = static_cast<float>(scale);
  p.B = packed ? 1 : q.sizes[0];
  p.S = q.sizes[token];
  p.H = q.sizes[token + 1];
  p.d = q.sizes[token + 2];
  if (p.d < 1 || p.d > kMostHeadDim || p.d % kHeadDimStep)
    fail(kAttention, "the head dim ", p.d, " is not a multiple of ", kHeadDimStep, " up to ",
         kMostHeadDim);
  p.lse_head = p.S;
  p.q = bind_rows("q", q, packed, p);
  p.k = bind_rows("k", k, packed, p);
  p.v = bind_rows("v", v, packed, p);
  p.L = k.sizes[token];
  check_size(kAttention, "v", v, token, {"L", p.L});
  return p;
}

std::vector<Sequence> dense_sequences(const Attention& p) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.B; ++b)
    sequences.push_back(
        {b * p.q.batch, b * p.k.batch, b * p.v.batch, b * p.S, b * p.H * p.S, p.S, p.L});
  return sequences;
}

std::vector<Sequence> packed_sequences(const Attention& p, const std::vector<int64_t>& cu_q,
                                       const std::vector<int64_t>& cu_k) {
  if (cu_q.size() != cu_k.size())
    fail(kAttention, "cu_seqlens_q has ", cu_q.size(), " entries and cu_seqlens_k ", cu_k.size());
  check_cu_seqlens("cu_seqlens_q", cu_q, p.S);
  check_cu_seqlens("cu_seqlens_k", cu_k, p.L);
  std::vector<Sequence> sequences;
  for (size_t i = 0; i + 1 < cu_q.size(); ++i)
    sequences.push_back({cu_q[i] * p.q.token, cu_k[i] * p.k.token, cu_k[i] * p.v.token, cu_q[i],
                         cu_q[i], cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]});
  return sequences;
}

AttentionMerge bind_attention_merge(const View& out_a, const View& lse_a, const View& out_b,
                                    const View& lse_b) {
  const int n = out_a.ndim;
  if (n != 3 && n != 4)
    fail(kAttentionMerge, "out_a ", shape_of(out_a), " must be [B, S, H, d] or [N, H, d]");
  AttentionMerge p;
  p.B = n == 4 ? out_a.sizes[0] : 1;
  p.S = out_a.sizes[n - 3];
  p.H = out_a.sizes[n - 2];
  p.d = out_a.sizes[n - 1];
  if (out_b.ndim != n)
    fail(kAttentionMerge, "out_b ", shape_of(out_b), " has other dimensions than out_a");
  for (int i = 0; i < n; ++i) {
    const char* names[] = {"B", "S", "H", "d"};
    check_size(kAttentionMerge, "out_b", out_b, i, {names[i + 4 - n], out_a.sizes[i]});
  }
  const auto bind_lse = [&](const char* name, const View& view) {
    if (view.ndim != n - 1 || view.dtype != DType::f32)
      fail(kAttentionMerge, name, ' ', shape_of(view), " must be float32 ",
           n == 4 ? "[B, H, S]" : "[H, N]");
    if (n == 4) check_size(kAttentionMerge, name, view, 0, {"B", p.B});
    check_size(kAttentionMerge, name, view, n - 3, {"H", p.H});
    check_size(kAttentionMerge, name, view, n - 2, {"S", p.S});
    return static_cast<const float*>(view.data);
  };
  p.lse_a = bind_lse("lse_a", lse_a);
  p.lse_b = bind_lse("lse_b", lse_b);
  p.a = out_a.data;
  p.b = out_b.data;
  p.a_dtype = out_a.dtype;
  p.b_dtype = out_b.dtype;
  return p;
}

}  // namespace sgld
