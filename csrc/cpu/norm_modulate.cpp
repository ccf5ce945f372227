#include <algorithm>
#include <memory>

#include "norm_modulate_rows.h"
#include "ops.h"
#include "sgld/isa.h"
#include "torch_view.h"

namespace sgld {
namespace {

// Elements of work that are worth waking a thread for.
constexpr int64_t kGrain = 32768;

NormModulateRows rows_for(Isa isa) {
#if defined(SGLD_X86)
  if (isa == Isa::avx512_bf16) return norm_modulate_rows_avx512_bf16;
  if (isa == Isa::avx512) return norm_modulate_rows_avx512;
  if (isa == Isa::avx2) return norm_modulate_rows_avx2;
#endif
  (void)isa;
  return norm_modulate_rows_scalar;
}

}  // namespace

Tensor norm_modulate_cpu(const Tensor& x_any, const std::optional<Tensor>& scale_any,
                         const std::optional<Tensor>& shift_any,
                         const std::optional<Tensor>& weight_any,
                         const std::optional<Tensor>& bias_any, double eps, bool rms,
                         ScalarType out_dtype) {
  constexpr const char* op = kNormModulate;
  const Tensor x = dense_last(x_any);
  const auto scale = dense_last(scale_any), shift = dense_last(shift_any);
  const auto weight = dense_last(weight_any), bias = dense_last(bias_any);
  NormModulate p = bind_norm_modulate(
      view_of(op, "x", x), view_of(op, "scale", scale, x), view_of(op, "shift", shift, x),
      view_of(op, "weight", weight, x), view_of(op, "bias", bias, x), eps, rms);
  p.out_dtype = dtype_of(op, "the result", out_dtype);
  Tensor out = torch::stable::new_empty(x, x.sizes(), out_dtype);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();

  const NormModulateRows rows = rows_for(active_isa());
  const int64_t grain = std::max<int64_t>(1, kGrain / p.D);
  torch::stable::parallel_for(0, p.B * p.S, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[norm_modulate_scratch(p.D)]);
    rows(p, begin, end, scratch.get());
  });
  return out;
}

}  // namespace sgld
