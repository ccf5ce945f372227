#include "attention_call.h"

namespace sgld {
namespace {

AttentionStrides strides_of(const char* name, const View& x) {
  const bool fits = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.strides[0] % 8 == 0 &&
                    x.strides[1] % 8 == 0 && x.strides[2] % 8 == 0 && x.strides[3] == 1;
  if (!fits) fail(kAttention, name, " must have dense heads that start at multiples of 16 bytes");
  return {x.strides[0], x.strides[1], x.strides[2]};
}

const int32_t* offsets(const char* name, const std::optional<Tensor>& tensor, int64_t& count) {
  if (!tensor) return nullptr;
  if (tensor->scalar_type() != ScalarType::Int || tensor->dim() != 1 || !tensor->is_cuda() ||
      !tensor->is_contiguous() || tensor->numel() < 2)
    fail(kAttention, name, " must be contiguous int32 [sequences + 1] on the device");
  count = tensor->numel() - 1;
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

}  // namespace

AttentionCall bind_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                             const std::optional<Tensor>& cu_q, const std::optional<Tensor>& cu_k,
                             int64_t max_q, Tensor& out, Tensor& lse, AttentionSizes& sizes) {
  constexpr const char* op = kAttention;
  const View q_view = view_of(op, "q", q);
  const View k_view = view_of(op, "k", std::optional<Tensor>(k), q);
  const View v_view = view_of(op, "v", std::optional<Tensor>(v), q);
  const View out_view = view_of(op, "out", std::optional<Tensor>(out), q);
  const View lse_view = view_of(op, "lse", std::optional<Tensor>(lse), q);
  for (const View* x : {&q_view, &k_view, &v_view, &out_view})
    if (x->ndim != 4 || x->dtype != DType::bf16)
      fail(op, "q, k, v and the result must be bfloat16 [B, S, H, d]");
  const int64_t B = q_view.sizes[0], S = q_view.sizes[1], H = q_view.sizes[2];
  const int64_t L = k_view.sizes[1], d = q_view.sizes[3];
  for (const View* x : {&k_view, &v_view}) {
    const char* name = x == &k_view ? "k" : "v";
    check_size(op, name, *x, 0, {"B", B});
    check_size(op, name, *x, 1, {"L", L});
    check_size(op, name, *x, 2, {"H", H});
    check_size(op, name, *x, 3, {"d", d});
  }
  for (int i = 0; i < 4; ++i)
    check_size(op, "the result", out_view, i, {"that of q", q_view.sizes[i]});
  if (d != 64 && d != 128) fail(op, "head dim ", d, " is not 64 or 128");
  if (!(scale > 0)) fail(op, "the scale must be positive");
  if (lse_view.ndim != 3 || lse_view.dtype != DType::f32 || lse_view.sizes[0] != B ||
      lse_view.sizes[1] != H || lse_view.sizes[2] != S || !lse.is_contiguous())
    fail(op, "lse ", shape_of(lse_view), " must be contiguous float32 [B, H, S]");
  if (S > 0x7fffffff || L > 0x7fffffff) fail(op, "more than 2^31 - 1 tokens");
  AttentionCall p;
  if (B * S * H == 0) return p;

  int64_t sequences = B, sequences_k = B;
  p.cu_q = offsets("cu_seqlens_q", cu_q, sequences);
  p.cu_k = offsets("cu_seqlens_k", cu_k, sequences_k);
  if ((p.cu_q == nullptr) != (p.cu_k == nullptr) || sequences != sequences_k || (p.cu_q && B != 1))
    fail(op, "cu_seqlens of q and k come together, for sequences packed into one row");
  if (H > 65535 || sequences > 65535) fail(op, "more than 65535 heads or sequences");
  p.at_q = strides_of("q", q_view);
  p.at_out = strides_of("the result", out_view);
  if (L > 0) {
    p.at_k = strides_of("k", k_view);
    p.at_v = strides_of("v", v_view);
  }
  p.q = static_cast<const __nv_bfloat16*>(q_view.data);
  p.k = static_cast<const __nv_bfloat16*>(k_view.data);
  p.v = static_cast<const __nv_bfloat16*>(v_view.data);
  p.out = static_cast<__nv_bfloat16*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.lse_batch = H * S;
  p.lse_head = S;
  p.queries = static_cast<int>(S);
  p.keys = static_cast<int>(L);
  p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  sizes = {B, H, d, sequences, p.cu_q && max_q > 0 ? max_q : S};
  return p;
}

}  // namespace sgld
