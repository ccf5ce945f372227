// What the row kernels share on the device: elements and 16-byte loads, modulation rows whose dtype is known at run time
// only, and the sum over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sgld/cuda_launch.h"
#include "sgld/norm_modulate.h"

namespace sgld {
namespace {

constexpr int kWarp = kWarpThreads;
constexpr int kMaxThreads = kBlockThreads;

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

// The affine parts of norm_modulate on one chunk of a normalised row.
template <int N>
__device__ __forceinline__ void modulate(const NormModulate& p, int64_t scale_row,
                                         int64_t shift_row, int64_t i, float (&v)[N]) {
  float m[N];
  if (p.weight.data) {
    load<N>(p.weight, 0, i, m);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= m[j];
  }
  if (p.bias.data) {
    load<N>(p.bias, 0, i, m);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += m[j];
  }
  if (p.scale.data) {
    load<N>(p.scale, scale_row, i, m);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= 1.0f + m[j];
  }
  if (p.shift.data) {
    load<N>(p.shift, shift_row, i, m);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += m[j];
  }
}

__device__ __forceinline__ float modulate_one(const NormModulate& p, int64_t scale_row,
                                              int64_t shift_row, int64_t i, float v) {
  if (p.weight.data) v *= load_one(p.weight, 0, i);
  if (p.bias.data) v += load_one(p.bias, 0, i);
  if (p.scale.data) v *= 1.0f + load_one(p.scale, scale_row, i);
  if (p.shift.data) v += load_one(p.shift, shift_row, i);
  return v;
}

inline bool aligned(const Rows& rows) {
  return rows.data == nullptr || aligned_rows(reinterpret_cast<uintptr_t>(rows.data), rows.batch,
                                              rows.token, static_cast<int>(size_of(rows.dtype)));
}

}  // namespace
}  // namespace sgld
