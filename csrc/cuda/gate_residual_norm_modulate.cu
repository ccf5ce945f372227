// gate_residual_norm_modulate on the GPU: h = x + y * gate, rounded to x's dtype and written, then norm_modulate(h). One
// block per row, the row in registers; rows that are too long, unaligned or of odd length take the streamed kernel, where
// every thread reads back the elements of h that it has written itself.
#include <algorithm>
#include <optional>

#include "../torch_view.h"
#include "cuda_ops.h"
#include "launch.h"
#include "rows.cuh"

namespace sgld {
namespace {

constexpr const char* kGatedNorm = "gate_residual_norm_modulate";

struct GatedNorm {
  NormModulate norm;  // norm.x is x
  Rows y, gate;
  void* residual = nullptr;  // contiguous [B, S, D], x's dtype
};

struct Offsets {
  int64_t x, y, gate, scale, shift, out;
};

__device__ __forceinline__ Offsets offsets_of(const GatedNorm& p) {
  const unsigned tokens = static_cast<unsigned>(p.norm.S);
  const int64_t b = blockIdx.x / tokens, s = blockIdx.x % tokens;
  const auto at = [&](const Rows& rows) { return b * rows.batch + s * rows.token; };
  return {at(p.norm.x),     at(p.y),          at(p.gate),
          at(p.norm.scale), at(p.norm.shift), static_cast<int64_t>(blockIdx.x) * p.norm.D};
}

// Thread t holds chunks t, t + blockDim, ... of kChunk elements.
template <class T, int kItems>
__global__ void __launch_bounds__(kMaxThreads / 2) gated_norm_registers_kernel(const GatedNorm p) {
  constexpr int kChunk = kChunkElements;
  const Offsets at = offsets_of(p);
  const int64_t width = p.norm.D;
  const T* x = static_cast<const T*>(p.norm.x.data) + at.x;
  T* residual = static_cast<T*>(p.residual) + at.out;
  float v[kItems][kChunk];

  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[k][j] = 0.0f;
    if (i >= width) continue;
    float m[kChunk];
    load<kChunk>(x + i, v[k]);
    load<kChunk>(p.y, at.y, i, m);
    if (p.gate.data) {
      float gate[kChunk];
      load<kChunk>(p.gate, at.gate, i, gate);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) m[j] *= gate[j];
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[k][j] = Element<T>::widen(Element<T>::narrow(v[k][j] + m[j]));
      sum += v[k][j];
    }
    store<kChunk>(residual + i, v[k]);
  }
  const float mean = p.norm.rms ? 0.0f : block_sum(sum) / static_cast<float>(width);

  float square = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const bool inside = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk < width;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[k][j] -= mean;
      if (inside) square += v[k][j] * v[k][j];
    }
  }
  const float rstd = 1.0f / sqrtf(block_sum(square) / static_cast<float>(width) + p.norm.eps);

#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk;
    if (i >= width) break;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[k][j] *= rstd;
    modulate<kChunk>(p.norm, at.scale, at.shift, i, v[k]);
    with_dtype(p.norm.out_dtype, [&](auto t) {
      store<kChunk>(static_cast<decltype(t)*>(p.norm.out) + at.out + i, v[k]);
    });
  }
}

template <class T>
__global__ void gated_norm_streamed_kernel(const GatedNorm p) {
  const Offsets at = offsets_of(p);
  const int64_t width = p.norm.D;
  const T* x = static_cast<const T*>(p.norm.x.data) + at.x;
  T* residual = static_cast<T*>(p.residual) + at.out;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    float update = load_one(p.y, at.y, i);
    if (p.gate.data) update *= load_one(p.gate, at.gate, i);
    residual[i] = Element<T>::narrow(Element<T>::widen(x[i]) + update);
    sum += Element<T>::widen(residual[i]);
  }
  const float mean = p.norm.rms ? 0.0f : block_sum(sum) / static_cast<float>(width);
  float square = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float d = Element<T>::widen(residual[i]) - mean;
    square += d * d;
  }
  const float rstd = 1.0f / sqrtf(block_sum(square) / static_cast<float>(width) + p.norm.eps);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    float v = (Element<T>::widen(residual[i]) - mean) * rstd;
    v = modulate_one(p.norm, at.scale, at.shift, i, v);
    with_dtype(p.norm.out_dtype, [&](auto t) {
      using Out = decltype(t);
      static_cast<Out*>(p.norm.out)[at.out + i] = Element<Out>::narrow(v);
    });
  }
}

template <class T>
void launch(const GatedNorm& p, cudaStream_t stream) {
  const NormModulate& norm = p.norm;
  const auto grid = static_cast<unsigned>(norm.B * norm.S);
  const bool fits = aligned(norm.x) && aligned(p.y) && aligned(p.gate) && aligned(norm.scale) &&
                    aligned(norm.shift) && aligned(norm.weight) && aligned(norm.bias);
  // Four chunks a thread, with those of y and of the gate, would not fit its registers.
  const int items = fits ? row_items(norm.D) : 0;
  if (items == 0 || items > 2) {
    const unsigned threads = std::min<unsigned>(kMaxThreads, whole_warps(norm.D));
    gated_norm_streamed_kernel<T><<<grid, threads, 0, stream>>>(p);
    return;
  }
  const unsigned threads = row_threads(norm.D, items);
  if (items == 1)
    gated_norm_registers_kernel<T, 1><<<grid, threads, 0, stream>>>(p);
  else
    gated_norm_registers_kernel<T, 2><<<grid, threads, 0, stream>>>(p);
}

void check_result(const char* name, const Tensor& result, const View& x, const Tensor& device) {
  const View view = view_of(kGatedNorm, name, std::optional<Tensor>(result), device);
  bool same = view.ndim == x.ndim && result.is_contiguous();
  for (int i = 0; same && i < x.ndim; ++i) same = view.sizes[i] == x.sizes[i];
  if (!same) fail(kGatedNorm, name, ' ', shape_of(view), " must be contiguous ", shape_of(x));
}

}  // namespace

void gate_residual_norm_modulate_cuda(const Tensor& x_any, const Tensor& y_any,
                                      const std::optional<Tensor>& gate_any,
                                      const std::optional<Tensor>& scale_any,
                                      const std::optional<Tensor>& shift_any,
                                      const std::optional<Tensor>& weight_any,
                                      const std::optional<Tensor>& bias_any, double eps, bool rms,
                                      Tensor residual, Tensor out) {
  constexpr const char* op = kGatedNorm;
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = dense_last(x_any), y = dense_last(y_any);
  const auto gate = dense_last(gate_any), scale = dense_last(scale_any);
  const auto shift = dense_last(shift_any);
  const auto weight = dense_last(weight_any), bias = dense_last(bias_any);
  const View x_view = view_of(op, "x", x);
  const View y_view = view_of(op, "y", std::optional<Tensor>(y), x);
  bool same = x_view.ndim == y_view.ndim;
  for (int i = 0; same && i < x_view.ndim; ++i) same = x_view.sizes[i] == y_view.sizes[i];
  if (!same) fail(op, "x ", shape_of(x_view), " and y ", shape_of(y_view), " differ");

  GatedNorm p;
  p.norm =
      bind_norm_modulate(x_view, view_of(op, "scale", scale, x), view_of(op, "shift", shift, x),
                         view_of(op, "weight", weight, x), view_of(op, "bias", bias, x), eps, rms);
  // The rows of y and of the gate are checked as those of x and of a scale.
  p.y = bind_norm_modulate(y_view, {}, {}, {}, {}, eps, rms).x;
  p.gate = bind_norm_modulate(x_view, view_of(op, "gate", gate, x), {}, {}, {}, eps, rms).scale;
  check_result("the residual", residual, x_view, x);
  check_result("the result", out, x_view, x);
  if (residual.scalar_type() != x.scalar_type()) fail(op, "x and the residual differ in dtype");
  p.norm.out_dtype = dtype_of(op, "the result", out.scalar_type());
  if (out.numel() == 0) return;
  if (p.norm.B * p.norm.S > 0x7fffffff) fail(op, "more than 2^31 - 1 rows");
  p.residual = residual.mutable_data_ptr();
  p.norm.out = out.mutable_data_ptr();

  const cudaStream_t stream = current_stream(op, x.get_device_index());
  if (p.norm.x.dtype == DType::f32)
    launch<float>(p, stream);
  else if (p.norm.x.dtype == DType::bf16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
  check_launch(op);
}

}  // namespace sgld
