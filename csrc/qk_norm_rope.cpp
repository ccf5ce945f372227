// The boundary checks of qk_norm_rope.
#include "sgld/qk_norm_rope.h"

#include "sgld/bind_rows.h"

namespace sgld {
namespace {

constexpr const char* op = kQkNormRope;

void check_heads(const char* name, const View& view) {
  if (view.ndim != 4) fail(op, name, ' ', shape_of(view), " must be [B, S, H, d]");
  if (view.sizes[3] > 1 && view.strides[3] != 1) fail(op, name, " must have dense heads");
}

Heads bind_heads(const char* name, const View& x, const View& weight, const View& out,
                 bool per_head, const QkNormRope& p) {
  check_heads(name, x);
  check_heads("a result", out);
  check_size(op, name, x, 0, {"B", p.B});
  check_size(op, name, x, 3, {"d", p.d});
  for (int i = 0; i < 4; ++i) check_size(op, "a result", out, i, {"its input", x.sizes[i]});
  if (x.dtype != p.dtype || out.dtype != p.dtype)
    fail(op, name, " and its result must have the dtype of q");
  Heads heads;
  heads.x = x.data;
  heads.out = const_cast<void*>(out.data);
  heads.batch = x.strides[0], heads.token = x.strides[1], heads.head = x.strides[2];
  heads.out_batch = out.strides[0], heads.out_token = out.strides[1];
  heads.out_head = out.strides[2];
  heads.S = x.sizes[1], heads.H = x.sizes[2];
  if (weight.present) {
    if (weight.ndim != 1) fail(op, "a weight ", shape_of(weight), " must have one dimension");
    if (weight.sizes[0] > 1 && weight.strides[0] != 1) fail(op, "a weight must be dense");
    check_size(op, "a weight", weight, 0, per_head ? Size{"d", p.d} : Size{"H*d", heads.H * p.d});
    heads.weight = {weight.data, weight.dtype, 0, 0};
  }
  return heads;
}

const float* bind_angles(const char* name, const View& view, const View& q, const View& k,
                         int64_t& stride) {
  if (view.ndim != 2) fail(op, name, ' ', shape_of(view), " must be [S, d/2]");
  if (view.dtype != DType::f32) fail(op, name, " must be float32");
  check_size(op, name, view, 0, {"S", q.sizes[1]});
  check_size(op, "k", k, 1, {"S", q.sizes[1]});
  check_size(op, name, view, 1, {"d/2", q.sizes[3] / 2});
  if (q.sizes[3] % 2) fail(op, "d is ", q.sizes[3], ", and a rotation needs pairs");
  if (view.sizes[1] > 1 && view.strides[1] != 1)
    fail(op, name, " must be dense in its last dimension");
  stride = view.strides[0];
  return static_cast<const float*>(view.data);
}

}  // namespace

QkNormRope bind_qk_norm_rope(const View& q, const View& k, const View& weight_q,
                             const View& weight_k, const View& cos, const View& sin, double eps,
                             bool per_head, bool half, const View& q_out, const View& k_out) {
  check_heads("q", q);
  QkNormRope p;
  p.dtype = q.dtype;
  p.B = q.sizes[0], p.d = q.sizes[3];
  p.eps = static_cast<float>(eps);
  p.per_head = per_head;
  p.half = half;
  p.q = bind_heads("q", q, weight_q, q_out, per_head, p);
  p.k = bind_heads("k", k, weight_k, k_out, per_head, p);
  if (cos.present != sin.present) fail(op, "cos and sin come together");
  if (cos.present) {
    p.cos = bind_angles("cos", cos, q, k, p.cos_stride);
    p.sin = bind_angles("sin", sin, q, k, p.sin_stride);
  }
  return p;
}

}  // namespace sgld
