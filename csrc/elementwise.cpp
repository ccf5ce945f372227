// The boundary checks of gelu_tanh, silu_mul, cfg_combine_step and quant_fp8_rowwise.
#include "sgld/elementwise.h"

#include "sgld/bind_rows.h"

namespace sgld {

Elementwise bind_elementwise(const char* op, const View& a, const View& b, const View& out) {
  Elementwise p;
  check_like(op, "the result", out, a);
  if (b.present) check_like(op, "up", b, a);
  p.in_place = out.data == a.data || out.data == b.data;
  const bool flat = is_contiguous(a) && is_contiguous(out) && (!b.present || is_contiguous(b));
  if (flat) {
    const int64_t n = count(a);
    p.B = 1, p.D = kChunk;
    p.S = (n + kChunk - 1) / kChunk;
    p.last = n - (p.S - 1) * kChunk;
    p.a = {a.data, a.dtype, 0, kChunk};
    p.out = {out.data, out.dtype, 0, kChunk};
    if (b.present) p.b = {b.data, b.dtype, 0, kChunk};
    return p;
  }
  sizes_of(a, p.B, p.S, p.D);
  p.last = p.D;
  p.a = rows_of(op, "x", a);
  p.out = rows_of(op, "the result", out);
  if (b.present) p.b = rows_of(op, "up", b);
  return p;
}

namespace {

const float* bind_state(const char* name, const View& view, const View& x) {
  constexpr const char* op = kCfgCombineStep;
  if (view.dtype != DType::f32) fail(op, name, " must be float32");
  if (!is_contiguous(view)) fail(op, name, " must be contiguous");
  if (view.ndim != x.ndim) fail(op, name, ' ', shape_of(view), " must be like x ", shape_of(x));
  for (int i = 0; i < x.ndim; ++i)
    check_size(op, name, view, i, {i ? "a size of x" : "B", x.sizes[i]});
  return static_cast<const float*>(view.data);
}

const void* bind_velocity(const char* name, const View& view, const View& x, DType dtype) {
  constexpr const char* op = kCfgCombineStep;
  if (view.dtype != dtype) fail(op, name, " has another dtype than v_cond");
  if (!is_contiguous(view)) fail(op, name, " must be contiguous");
  if (view.ndim != x.ndim) fail(op, name, ' ', shape_of(view), " must be like x ", shape_of(x));
  for (int i = 0; i < x.ndim; ++i)
    check_size(op, name, view, i, {i ? "a size of x" : "B", x.sizes[i]});
  return view.data;
}

}  // namespace

SolverStep bind_solver_step(const View& x, const View& v, const View& u, const View& guidance,
                            const View& table, const View& last, const View& m0, const View& m1,
                            const View& next, const View& corrected, const View& x0) {
  constexpr const char* op = kCfgCombineStep;
  if (x.ndim == 0) fail(op, "x has no batch dimension");
  SolverStep p;
  p.x = bind_state("x", x, x);
  p.last = bind_state("last", last, x);
  p.m0 = bind_state("m0", m0, x);
  p.m1 = bind_state("m1", m1, x);
  p.next = const_cast<float*>(bind_state("the next x", next, x));
  p.corrected = const_cast<float*>(bind_state("the next last", corrected, x));
  p.x0 = const_cast<float*>(bind_state("the next m0", x0, x));
  p.v_dtype = v.dtype;
  p.v = bind_velocity("v_cond", v, x, v.dtype);
  p.B = x.sizes[0];
  p.N = p.B ? count(x) / p.B : 0;
  if (u.present != guidance.present) fail(op, "v_uncond and guidance come together");
  if (u.present) {
    p.u = bind_velocity("v_uncond", u, x, v.dtype);
    if (guidance.ndim != 1 || guidance.dtype != DType::f32 || !is_contiguous(guidance))
      fail(op, "guidance must be a dense float32 [B]");
    check_size(op, "guidance", guidance, 0, {"B", p.B});
    p.guidance = static_cast<const float*>(guidance.data);
  }
  if (table.ndim != 2 || table.dtype != DType::f32 || !is_contiguous(table))
    fail(op, "the table must be a contiguous float32 [B, ", kSolverColumns, "]");
  check_size(op, "the table", table, 0, {"B", p.B});
  check_size(op, "the table", table, 1, {"the number of columns", kSolverColumns});
  p.table = static_cast<const float*>(table.data);
  return p;
}

QuantRows bind_quant_fp8_rowwise(const View& x) {
  QuantRows p;
  p.x = rows_of(kQuantFp8Rowwise, "x", x);
  sizes_of(x, p.B, p.S, p.D);
  return p;
}

}  // namespace sgld
