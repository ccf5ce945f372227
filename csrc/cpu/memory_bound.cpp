// The memory-bound ops on torch tensors: views, threads and scratch around the row functions.
#include "memory_bound.h"

#include <algorithm>
#include <memory>

#include "memory_bound_ops.h"
#include "sgld/bind_rows.h"
#include "torch_view.h"

namespace sgld {
namespace {

// Elements of work that are worth waking a thread for.
constexpr int64_t kGrain = 32768;

int64_t grain(int64_t row) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(row, 1)); }

const MemoryBoundRows& kernels() { return memory_bound_rows(active_isa()); }

// f(begin, end, scratch) on the threads.
template <class F>
void with_scratch(int64_t rows, int64_t width, int64_t scratch, F f) {
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> floats(new float[scratch]);
    f(begin, end, floats.get());
  });
}

void check_written(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.is_cuda() || x.is_cuda()) fail(op, name, " and x must be on the CPU");
}

}  // namespace

void gate_residual_cpu(const Tensor& x_any, const Tensor& y_any,
                       const std::optional<Tensor>& gate_any, const Tensor& out) {
  constexpr const char* op = kGateResidual;
  const Tensor x = dense_last(x_any), y = dense_last(y_any);
  const auto gate = dense_last(gate_any);
  check_written(op, "the result", out, x);
  const GateResidual p = bind_gate_residual(view_of(op, "x", x), view_of(op, "y", y),
                                            view_of(op, "gate", gate, x), view_of(op, "out", out));
  if (x.numel() == 0) return;
  with_scratch(p.B * p.S, p.D, gate_residual_scratch(p.D),
               [&, run = kernels().gate_residual](int64_t begin, int64_t end, float* scratch) {
                 run(p, begin, end, scratch);
               });
}

void gate_residual_norm_modulate_cpu(const Tensor& x_any, const Tensor& y_any,
                                     const std::optional<Tensor>& gate_any,
                                     const std::optional<Tensor>& scale_any,
                                     const std::optional<Tensor>& shift_any,
                                     const std::optional<Tensor>& weight_any,
                                     const std::optional<Tensor>& bias_any, double eps, bool rms,
                                     const Tensor& residual, const Tensor& out) {
  constexpr const char* op = kGateResidualNormModulate;
  const Tensor x = dense_last(x_any), y = dense_last(y_any);
  const auto gate = dense_last(gate_any), scale = dense_last(scale_any);
  const auto shift = dense_last(shift_any), weight = dense_last(weight_any);
  const auto bias = dense_last(bias_any);
  check_written(op, "the result", out, x);
  check_written(op, "the residual", residual, x);
  const GateResidualNormModulate p = bind_gate_residual_norm_modulate(
      view_of(op, "x", x), view_of(op, "y", y), view_of(op, "gate", gate, x),
      view_of(op, "scale", scale, x), view_of(op, "shift", shift, x),
      view_of(op, "weight", weight, x), view_of(op, "bias", bias, x), eps, rms,
      view_of(op, "residual", residual), view_of(op, "out", out));
  if (x.numel() == 0) return;
  with_scratch(p.norm.B * p.norm.S, p.norm.D, gate_residual_norm_modulate_scratch(p.norm.D),
               [&, run = kernels().gate_residual_norm_modulate](
                   int64_t begin, int64_t end, float* scratch) { run(p, begin, end, scratch); });
}

void qk_norm_rope_cpu(const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight_q_any,
                      const std::optional<Tensor>& weight_k_any,
                      const std::optional<Tensor>& cos_any, const std::optional<Tensor>& sin_any,
                      double eps, bool per_head, bool half, const Tensor& q_out,
                      const Tensor& k_out) {
  constexpr const char* op = kQkNormRope;
  const auto weight_q = dense_last(weight_q_any), weight_k = dense_last(weight_k_any);
  const auto cos = dense_last(cos_any), sin = dense_last(sin_any);
  check_written(op, "the result", q_out, q);
  check_written(op, "the result", k_out, k);
  const QkNormRope p = bind_qk_norm_rope(
      view_of(op, "q", q), view_of(op, "k", k), view_of(op, "weight_q", weight_q, q),
      view_of(op, "weight_k", weight_k, q), view_of(op, "cos", cos, q), view_of(op, "sin", sin, q),
      eps, per_head, half, view_of(op, "q_out", q_out), view_of(op, "k_out", k_out));
  if (q.numel() + k.numel() == 0) return;
  with_scratch(p.B * (p.q.S + p.k.S), p.q.H * p.d, qk_norm_rope_scratch(p),
               [&, run = kernels().qk_norm_rope](int64_t begin, int64_t end, float* scratch) {
                 run(p, begin, end, scratch);
               });
}

void gelu_tanh_cpu(const Tensor& x, const Tensor& out) {
  constexpr const char* op = kGeluTanh;
  check_written(op, "the result", out, x);
  const Elementwise p = bind_elementwise(op, view_of(op, "x", x), {}, view_of(op, "out", out));
  if (x.numel() == 0) return;
  torch::stable::parallel_for(
      0, p.B * p.S, grain(p.D),
      [&, run = kernels().gelu_tanh](int64_t begin, int64_t end) { run(p, begin, end); });
}

void silu_mul_cpu(const Tensor& gate, const Tensor& up, const Tensor& out) {
  constexpr const char* op = kSiluMul;
  check_written(op, "the result", out, gate);
  const Elementwise p = bind_elementwise(op, view_of(op, "gate", gate), view_of(op, "up", up),
                                         view_of(op, "out", out));
  if (gate.numel() == 0) return;
  torch::stable::parallel_for(
      0, p.B * p.S, grain(p.D),
      [&, run = kernels().silu_mul](int64_t begin, int64_t end) { run(p, begin, end); });
}

void cfg_combine_step_cpu(const Tensor& x, const Tensor& v_cond,
                          const std::optional<Tensor>& v_uncond,
                          const std::optional<Tensor>& guidance, const Tensor& table,
                          const Tensor& last, const Tensor& m0, const Tensor& m1,
                          const Tensor& x_out, const Tensor& last_out, const Tensor& m0_out) {
  constexpr const char* op = kCfgCombineStep;
  check_written(op, "the next x", x_out, x);
  const SolverStep p = bind_solver_step(
      view_of(op, "x", x), view_of(op, "v_cond", v_cond), view_of(op, "v_uncond", v_uncond, x),
      view_of(op, "guidance", guidance, x), view_of(op, "table", table), view_of(op, "last", last),
      view_of(op, "m0", m0), view_of(op, "m1", m1), view_of(op, "the next x", x_out),
      view_of(op, "the next last", last_out), view_of(op, "the next m0", m0_out));
  if (x.numel() == 0) return;
  torch::stable::parallel_for(
      0, p.B * solver_chunks(p), grain(kChunk),
      [&, run = kernels().solver_step](int64_t begin, int64_t end) { run(p, begin, end); });
}

void quant_fp8_rowwise_cpu(const Tensor& x_any, const Tensor& out, const Tensor& scale) {
  constexpr const char* op = kQuantFp8Rowwise;
  const Tensor x = dense_last(x_any);
  check_written(op, "the result", out, x);
  QuantRows p = bind_quant_fp8_rowwise(view_of(op, "x", x));
  if (out.scalar_type() != ScalarType::Float8_e4m3fn || !out.is_contiguous() ||
      out.numel() != x.numel())
    fail(op, "the result must be a contiguous float8_e4m3fn tensor like x");
  if (scale.scalar_type() != ScalarType::Float || !scale.is_contiguous() ||
      scale.numel() != p.B * p.S)
    fail(op, "the scales must be a contiguous float32 tensor with one for each row of x");
  if (x.numel() == 0) return;
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  with_scratch(p.B * p.S, p.D, quant_fp8_rowwise_scratch(p.D),
               [&, run = kernels().quant_fp8_rowwise](int64_t begin, int64_t end, float* scratch) {
                 run(p, begin, end, scratch);
               });
}

}  // namespace sgld
