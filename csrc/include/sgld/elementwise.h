// The ops without neighbours (gelu_tanh, silu_mul), the guided solver step, and the rowwise fp8 quantisation, as the
// pure code sees them: checked, in rows, with element strides.
#pragma once

#include "sgld/norm_modulate.h"
#include "sgld/types.h"

namespace sgld {

// Contiguous tensors are taken as one long run in chunks: row r is elements [r * D, r * D + D), and the last row is
// shorter. Others are rows of [B, S, D].
constexpr int64_t kChunk = 8192;

struct Elementwise {
  Rows a, b, out;  // b is absent for an op of one input; out's data is written to
  int64_t B = 0, S = 0, D = 0;
  int64_t last = 0;  // size of the last row
  bool in_place = false;
};

// With x the latents a step starts from: v = u + guidance * (v - u), x0 = x - sigma * v,
// corrected = c_x x + c_last last + c_m0 m0 + c_m1 m1 + c_x0 x0, next = p_x corrected + p_x0 x0 + p_m0 m0.
struct SolverStep {
  const float *x = nullptr, *last = nullptr, *m0 = nullptr, *m1 = nullptr;
  const void *v = nullptr, *u = nullptr;  // u absent: no guidance
  DType v_dtype = DType::f32;
  const float* guidance = nullptr;  // [B]
  const float* table = nullptr;     // [B, kSolverColumns]
  float *next = nullptr, *corrected = nullptr, *x0 = nullptr;
  int64_t B = 0, N = 0;  // N elements a batch row
};
// sigma, c_x, c_last, c_m0, c_m1, c_x0, p_x, p_x0, p_m0
constexpr int kSolverColumns = 9;

struct QuantRows {
  Rows x;
  uint8_t* out = nullptr;  // contiguous [B, S, D] of float8_e4m3fn
  float* scale = nullptr;  // [B * S]
  int64_t B = 0, S = 0, D = 0;
};

constexpr const char* kGeluTanh = "gelu_tanh";
constexpr const char* kSiluMul = "silu_mul";
constexpr const char* kCfgCombineStep = "cfg_combine_step";
constexpr const char* kQuantFp8Rowwise = "quant_fp8_rowwise";

Elementwise bind_elementwise(const char* op, const View& a, const View& b, const View& out);
SolverStep bind_solver_step(const View& x, const View& v, const View& u, const View& guidance,
                            const View& table, const View& last, const View& m0, const View& m1,
                            const View& next, const View& corrected, const View& x0);
QuantRows bind_quant_fp8_rowwise(const View& x);

}  // namespace sgld
