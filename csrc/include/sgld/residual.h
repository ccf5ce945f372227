// gate_residual: r = x + y * gate, and gate_residual_norm_modulate: r, and norm_modulate of r. The calls as the pure
// code sees them: checked, in rows, with element strides.
#pragma once

#include "sgld/norm_modulate.h"
#include "sgld/types.h"

namespace sgld {

struct GateResidual {
  Rows x, y, gate;
  Rows out;  // data is written to; may be x or y
  int64_t B = 0, S = 0, D = 0;
};

struct GateResidualNormModulate {
  GateResidual update;
  NormModulate norm;  // its x is the residual
};

constexpr const char* kGateResidual = "gate_residual";
constexpr const char* kGateResidualNormModulate = "gate_residual_norm_modulate";

// x, y and out share shape and dtype. Up to three dimensions may have any row strides, more must be contiguous.
GateResidual bind_gate_residual(const View& x, const View& y, const View& gate, const View& out,
                                const char* op = kGateResidual);
// `out` is the normed result, contiguous.
GateResidualNormModulate bind_gate_residual_norm_modulate(const View& x, const View& y,
                                                          const View& gate, const View& scale,
                                                          const View& shift, const View& weight,
                                                          const View& bias, double eps, bool rms,
                                                          const View& residual, const View& out);

}  // namespace sgld
