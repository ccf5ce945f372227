// norm_modulate on the GPU: one block per row, the row in registers, 16-byte loads, two reductions (mean, then variance
// about the mean). Rows that are too long, unaligned or of odd length take the streamed kernel.
#include <algorithm>
#include <optional>

#include "../ops.h"
#include "../torch_view.h"
#include "launch.h"
#include "rows.cuh"

namespace sgld {
namespace {

struct Offsets {
  int64_t x, scale, shift, out;
};

__device__ __forceinline__ Offsets offsets_of(const NormModulate& p) {
  // The host made sure that rows are counted in 31 bits; a 64-bit division is a call with a stack.
  const int64_t row = blockIdx.x;
  const unsigned tokens = static_cast<unsigned>(p.S);
  const int64_t b = blockIdx.x / tokens, s = blockIdx.x % tokens;
  return {b * p.x.batch + s * p.x.token, b * p.scale.batch + s * p.scale.token,
          b * p.shift.batch + s * p.shift.token, row * p.D};
}

// ---- kernels ----

// Thread t holds chunks t, t + blockDim, ... of kChunk elements.
template <class T, int kItems>
__global__ void __launch_bounds__(kMaxThreads / 2)
    norm_modulate_registers_kernel(const NormModulate p) {
  constexpr int kChunk = 8;  // 16 bytes of a 16-bit type, twice that of fp32
  const Offsets at = offsets_of(p);
  const T* x = static_cast<const T*>(p.x.data) + at.x;
  float v[kItems][kChunk];

  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk;
    if (i < p.D) load<kChunk>(x + i, v[k]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (i >= p.D) v[k][j] = 0.0f;
      sum += v[k][j];
    }
  }
  const float mean = p.rms ? 0.0f : block_sum(sum) / static_cast<float>(p.D);

  float square = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const bool inside = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk < p.D;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[k][j] -= mean;
      if (inside) square += v[k][j] * v[k][j];
    }
  }
  const float rstd = 1.0f / sqrtf(block_sum(square) / static_cast<float>(p.D) + p.eps);

#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kChunk;
    if (i >= p.D) break;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[k][j] *= rstd;
    modulate<kChunk>(p, at.scale, at.shift, i, v[k]);
    with_dtype(p.out_dtype,
               [&](auto t) { store<kChunk>(static_cast<decltype(t)*>(p.out) + at.out + i, v[k]); });
  }
}

template <class T>
__global__ void norm_modulate_streamed_kernel(const NormModulate p) {
  const Offsets at = offsets_of(p);
  const T* x = static_cast<const T*>(p.x.data) + at.x;
  float sum = 0.0f;
  if (!p.rms)
    for (int64_t i = threadIdx.x; i < p.D; i += blockDim.x) sum += Element<T>::widen(x[i]);
  const float mean = p.rms ? 0.0f : block_sum(sum) / static_cast<float>(p.D);
  float square = 0.0f;
  for (int64_t i = threadIdx.x; i < p.D; i += blockDim.x) {
    const float d = Element<T>::widen(x[i]) - mean;
    square += d * d;
  }
  const float rstd = 1.0f / sqrtf(block_sum(square) / static_cast<float>(p.D) + p.eps);
  for (int64_t i = threadIdx.x; i < p.D; i += blockDim.x) {
    float v = (Element<T>::widen(x[i]) - mean) * rstd;
    v = modulate_one(p, at.scale, at.shift, i, v);
    with_dtype(p.out_dtype, [&](auto t) {
      using Out = decltype(t);
      static_cast<Out*>(p.out)[at.out + i] = Element<Out>::narrow(v);
    });
  }
}

// ---- choice and launch ----

// Chunks of 8 elements a thread holds, or 0 for the streamed kernel.
int items_of(const NormModulate& p) {
  const bool fits =
      aligned(p.x) && aligned(p.scale) && aligned(p.shift) && aligned(p.weight) && aligned(p.bias);
  return fits ? row_items(p.D) : 0;
}

template <class T>
void launch(const NormModulate& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.B * p.S);
  const int items = items_of(p);
  if (items == 0) {
    const unsigned threads = std::min<unsigned>(kMaxThreads, whole_warps(p.D));
    norm_modulate_streamed_kernel<T><<<grid, threads, 0, stream>>>(p);
    return;
  }
  const unsigned threads = row_threads(p.D, items);
  if (items == 1)
    norm_modulate_registers_kernel<T, 1><<<grid, threads, 0, stream>>>(p);
  else if (items == 2)
    norm_modulate_registers_kernel<T, 2><<<grid, threads, 0, stream>>>(p);
  else
    norm_modulate_registers_kernel<T, 4><<<grid, threads, 0, stream>>>(p);
}

}  // namespace

Tensor norm_modulate_cuda(const Tensor& x_any, const std::optional<Tensor>& scale_any,
                          const std::optional<Tensor>& shift_any,
                          const std::optional<Tensor>& weight_any,
                          const std::optional<Tensor>& bias_any, double eps, bool rms,
                          ScalarType out_dtype) {
  constexpr const char* op = kNormModulate;
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = dense_last(x_any);
  const auto scale = dense_last(scale_any), shift = dense_last(shift_any);
  const auto weight = dense_last(weight_any), bias = dense_last(bias_any);
  NormModulate p = bind_norm_modulate(
      view_of(op, "x", x), view_of(op, "scale", scale, x), view_of(op, "shift", shift, x),
      view_of(op, "weight", weight, x), view_of(op, "bias", bias, x), eps, rms);
  p.out_dtype = dtype_of(op, "the result", out_dtype);
  Tensor out = torch::stable::new_empty(x, x.sizes(), out_dtype);
  if (out.numel() == 0) return out;
  if (p.B * p.S > 0x7fffffff) fail(op, "more than 2^31 - 1 rows");
  p.out = out.mutable_data_ptr();

  const cudaStream_t stream = current_stream(op, x.get_device_index());
  if (p.x.dtype == DType::f32)
    launch<float>(p, stream);
  else if (p.x.dtype == DType::bf16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
  check_launch(op);
  return out;
}

}  // namespace sgld
