// norm_modulate on the GPU: one block per row, the row in registers, 16-byte loads, two reductions (mean, then variance
// about the mean). Rows that are too long, unaligned or of odd length take the streamed kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <optional>

#include "../ops.h"
#include "../torch_view.h"
#include "launch.h"
#include "sgld/norm_modulate.h"

namespace sgld {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// ---- elements ----

template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr int per_load = 4;
  __device__ static float widen(float x) { return x; }
  __device__ static float narrow(float x) { return x; }
};
template <>
struct Element<__nv_bfloat16> {
  static constexpr int per_load = 8;
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Element<__half> {
  static constexpr int per_load = 8;
  __device__ static float widen(__half x) { return __half2float(x); }
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};

// N consecutive elements, N * sizeof(T) a multiple of 16 bytes, as 16-byte loads.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&v)[N]) {
  constexpr int kPer = Element<T>::per_load;
  static_assert(N % kPer == 0, "a load is 16 bytes");
#pragma unroll
  for (int i = 0; i < N / kPer; ++i) {
    const uint4 raw = reinterpret_cast<const uint4*>(p)[i];
    const T* e = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[i * kPer + j] = Element<T>::widen(e[j]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&v)[N]) {
  constexpr int kPer = Element<T>::per_load;
  static_assert(N % kPer == 0, "a store is 16 bytes");
#pragma unroll
  for (int i = 0; i < N / kPer; ++i) {
    uint4 raw;
    T* e = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int j = 0; j < kPer; ++j) e[j] = Element<T>::narrow(v[i * kPer + j]);
    reinterpret_cast<uint4*>(p)[i] = raw;
  }
}

// The dtype of the modulation and of the result is known at run time only: the branch is the same for the whole grid.
template <class F>
__device__ __forceinline__ void with_dtype(DType dtype, F f) {
  if (dtype == DType::f32)
    f(float{});
  else if (dtype == DType::bf16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}

template <int N>
__device__ __forceinline__ void load(const Rows& rows, int64_t row, int64_t i, float (&v)[N]) {
  with_dtype(rows.dtype,
             [&](auto t) { load<N>(static_cast<const decltype(t)*>(rows.data) + row + i, v); });
}

__device__ __forceinline__ float load_one(const Rows& rows, int64_t row, int64_t i) {
  float value = 0.0f;
  with_dtype(rows.dtype, [&](auto t) {
    using T = decltype(t);
    value = Element<T>::widen(static_cast<const T*>(rows.data)[row + i]);
  });
  return value;
}

// ---- reduction ----

__device__ __forceinline__ float block_sum(float value) {
  __shared__ float parts[kMaxThreads / kWarp];
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, lane);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  __syncthreads();  // the parts of the sum before have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  // Every warp adds the same parts in the same order: no second broadcast.
  const int lane = threadIdx.x % kWarp;
  value = lane < warps ? parts[lane] : 0.0f;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

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
    float m[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[k][j] *= rstd;
    if (p.weight.data) {
      load<kChunk>(p.weight, 0, i, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[k][j] *= m[j];
    }
    if (p.bias.data) {
      load<kChunk>(p.bias, 0, i, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[k][j] += m[j];
    }
    if (p.scale.data) {
      load<kChunk>(p.scale, at.scale, i, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[k][j] *= 1.0f + m[j];
    }
    if (p.shift.data) {
      load<kChunk>(p.shift, at.shift, i, m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[k][j] += m[j];
    }
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
    if (p.weight.data) v *= load_one(p.weight, 0, i);
    if (p.bias.data) v += load_one(p.bias, 0, i);
    if (p.scale.data) v *= 1.0f + load_one(p.scale, at.scale, i);
    if (p.shift.data) v += load_one(p.shift, at.shift, i);
    with_dtype(p.out_dtype, [&](auto t) {
      using Out = decltype(t);
      static_cast<Out*>(p.out)[at.out + i] = Element<Out>::narrow(v);
    });
  }
}

// ---- choice and launch ----

bool aligned(const Rows& rows) {
  const int64_t per_load = 16 / size_of(rows.dtype);
  return rows.data == nullptr || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                                  rows.batch % per_load == 0 && rows.token % per_load == 0);
}

// Chunks of 8 elements a thread holds, or 0 for the streamed kernel. Few chunks keep enough threads on a row to hide
// the latency of its loads; the limit of 512 threads leaves every thread 128 registers.
int items_of(const NormModulate& p) {
  const bool fits = p.D % 8 == 0 && aligned(p.x) && aligned(p.scale) && aligned(p.shift) &&
                    aligned(p.weight) && aligned(p.bias);
  const int64_t chunks = p.D / 8;
  if (!fits || chunks > 4 * kMaxThreads / 2) return 0;
  if (chunks <= 256) return 1;
  return chunks <= 1024 ? 2 : 4;
}

template <class T>
void launch(const NormModulate& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(p.B * p.S);
  const int items = items_of(p);
  const auto threads_for = [](int64_t work) {
    return static_cast<unsigned>((work + kWarp - 1) / kWarp * kWarp);
  };
  if (items == 0) {
    const unsigned threads = std::min<unsigned>(kMaxThreads, threads_for(p.D));
    norm_modulate_streamed_kernel<T><<<grid, threads, 0, stream>>>(p);
    return;
  }
  const unsigned threads = threads_for((p.D / 8 + items - 1) / items);
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
