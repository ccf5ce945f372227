// The boundary checks of norm_modulate, shared by the CPU and the CUDA files.
#include "sgld/norm_modulate.h"

#include "sgld/check.h"

namespace sgld {
namespace {

void check_last_dense(const char* op, const char* name, const View& view) {
  if (view.ndim == 0) fail(op, name, " has no dimension to normalise");
  if (view.sizes[view.ndim - 1] > 1 && view.strides[view.ndim - 1] != 1)
    fail(op, name, " must be dense in its last dimension");
}

Rows bind_affine(const char* op, const char* name, const View& view, const NormModulate& p) {
  if (!view.present) return {};
  if (view.ndim != 1) fail(op, name, ' ', shape_of(view), " must be [D]");
  check_last_dense(op, name, view);
  check_size(op, name, view, 0, {"D", p.D});
  return {view.data, view.dtype, 0, 0};
}

}  // namespace

Rows bind_modulation(const char* op, const char* name, const View& view, int x_ndim, int64_t B,
                     int64_t S, int64_t D) {
  if (!view.present) return {};
  check_last_dense(op, name, view);
  check_size(op, name, view, view.ndim - 1, {"D", D});
  Rows rows{view.data, view.dtype, 0, 0};
  if (view.ndim == 1) return rows;
  if (x_ndim != 2 && x_ndim != 3) fail(op, name, " needs x as [S, D] or [B, S, D]");
  if (view.ndim == 2 && x_ndim == 3) {
    check_size(op, name, view, 0, {"B", B}, true);
    rows.batch = view.sizes[0] == 1 ? 0 : view.strides[0];
    return rows;
  }
  if (view.ndim > x_ndim) fail(op, name, ' ', shape_of(view), " has more dimensions than x");
  const int token = view.ndim - 2;
  check_size(op, name, view, token, {"S", S}, true);
  rows.token = view.sizes[token] == 1 ? 0 : view.strides[token];
  if (view.ndim == 3) {
    check_size(op, name, view, 0, {"B", B}, true);
    rows.batch = view.sizes[0] == 1 ? 0 : view.strides[0];
  }
  return rows;
}

NormModulate bind_norm_modulate(const View& x, const View& scale, const View& shift,
                                const View& weight, const View& bias, double eps, bool rms,
                                const char* op) {
  check_last_dense(op, "x", x);
  NormModulate p;
  p.eps = static_cast<float>(eps);
  p.rms = rms;
  p.D = x.sizes[x.ndim - 1];
  p.B = x.ndim == 3 ? x.sizes[0] : 1;
  p.S = 1;
  for (int i = x.ndim == 3 ? 1 : 0; i < x.ndim - 1; ++i) p.S *= x.sizes[i];
  p.x = {x.data, x.dtype, x.ndim == 3 ? x.strides[0] : 0, x.ndim > 1 ? x.strides[x.ndim - 2] : 0};
  p.scale = bind_modulation(op, "scale", scale, x.ndim, p.B, p.S, p.D);
  p.shift = bind_modulation(op, "shift", shift, x.ndim, p.B, p.S, p.D);
  p.weight = bind_affine(op, "weight", weight, p);
  p.bias = bind_affine(op, "bias", bias, p);
  p.affine = p.scale.data || p.shift.data || p.weight.data || p.bias.data;
  return p;
}

}  // namespace sgld
