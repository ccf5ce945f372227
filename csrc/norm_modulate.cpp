// The boundary checks of norm_modulate, shared by the CPU and the CUDA files.
#include "sgld/norm_modulate.h"

#include "sgld/check.h"

namespace sgld {
namespace {

void check_last_dense(const char* name, const View& view) {
  if (view.ndim == 0) fail(kNormModulate, name, " has no dimension to normalise");
  if (view.sizes[view.ndim - 1] > 1 && view.strides[view.ndim - 1] != 1)
    fail(kNormModulate, name, " must be dense in its last dimension");
}

// [B, D] (one per batch row of a [B, S, D] x), [D], or anything that broadcasts to x.
Rows bind_modulation(const char* name, const View& view, int x_ndim, const NormModulate& p) {
  if (!view.present) return {};
  check_last_dense(name, view);
  check_size(kNormModulate, name, view, view.ndim - 1, {"D", p.D});
  Rows rows{view.data, view.dtype, 0, 0};
  if (view.ndim == 1) return rows;
  if (x_ndim != 2 && x_ndim != 3) fail(kNormModulate, name, " needs x as [S, D] or [B, S, D]");
  if (view.ndim == 2 && x_ndim == 3) {
    check_size(kNormModulate, name, view, 0, {"B", p.B}, true);
    rows.batch = view.sizes[0] == 1 ? 0 : view.strides[0];
    return rows;
  }
  if (view.ndim > x_ndim)
    fail(kNormModulate, name, ' ', shape_of(view), " has more dimensions than x");
  const int token = view.ndim - 2;
  check_size(kNormModulate, name, view, token, {"S", p.S}, true);
  rows.token = view.sizes[token] == 1 ? 0 : view.strides[token];
  if (view.ndim == 3) {
    check_size(kNormModulate, name, view, 0, {"B", p.B}, true);
    rows.batch = view.sizes[0] == 1 ? 0 : view.strides[0];
  }
  return rows;
}

Rows bind_affine(const char* name, const View& view, const NormModulate& p) {
  if (!view.present) return {};
  if (view.ndim != 1) fail(kNormModulate, name, ' ', shape_of(view), " must be [D]");
  check_last_dense(name, view);
  check_size(kNormModulate, name, view, 0, {"D", p.D});
  return {view.data, view.dtype, 0, 0};
}

}  // namespace

NormModulate bind_norm_modulate(const View& x, const View& scale, const View& shift,
                                const View& weight, const View& bias, double eps, bool rms) {
  check_last_dense("x", x);
  NormModulate p;
  p.eps = static_cast<float>(eps);
  p.rms = rms;
  p.D = x.sizes[x.ndim - 1];
  p.B = x.ndim == 3 ? x.sizes[0] : 1;
  p.S = 1;
  for (int i = x.ndim == 3 ? 1 : 0; i < x.ndim - 1; ++i) p.S *= x.sizes[i];
  p.x = {x.data, x.dtype, x.ndim == 3 ? x.strides[0] : 0, x.ndim > 1 ? x.strides[x.ndim - 2] : 0};
  p.scale = bind_modulation("scale", scale, x.ndim, p);
  p.shift = bind_modulation("shift", shift, x.ndim, p);
  p.weight = bind_affine("weight", weight, p);
  p.bias = bind_affine("bias", bias, p);
  p.affine = p.scale.data || p.shift.data || p.weight.data || p.bias.data;
  return p;
}

}  // namespace sgld
