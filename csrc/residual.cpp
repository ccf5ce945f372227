// The boundary checks of gate_residual and gate_residual_norm_modulate.
#include "sgld/residual.h"

#include "sgld/bind_rows.h"

namespace sgld {

GateResidual bind_gate_residual(const View& x, const View& y, const View& gate, const View& out,
                                const char* op) {
  GateResidual p;
  p.x = rows_of(op, "x", x);
  sizes_of(x, p.B, p.S, p.D);
  check_like(op, "y", y, x);
  p.y = rows_of(op, "y", y);
  p.gate = bind_modulation(op, "gate", gate, x.ndim, p.B, p.S, p.D);
  check_like(op, "the residual", out, x);
  p.out = rows_of(op, "the residual", out);
  return p;
}

GateResidualNormModulate bind_gate_residual_norm_modulate(const View& x, const View& y,
                                                          const View& gate, const View& scale,
                                                          const View& shift, const View& weight,
                                                          const View& bias, double eps, bool rms,
                                                          const View& residual, const View& out) {
  constexpr const char* op = kGateResidualNormModulate;
  GateResidualNormModulate p;
  p.update = bind_gate_residual(x, y, gate, residual, op);
  p.norm = bind_norm_modulate(residual, scale, shift, weight, bias, eps, rms, op);
  check_like(op, "the normed result", out, x);
  if (!is_contiguous(out)) fail(op, "the normed result must be contiguous");
  p.norm.out = const_cast<void*>(out.data);
  p.norm.out_dtype = out.dtype;
  return p;
}

}  // namespace sgld
