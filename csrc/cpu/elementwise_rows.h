// gelu_tanh, silu_mul, the guided solver step and the rowwise fp8 quantisation for one ISA.
#pragma once

#include <type_traits>

#include "memory_bound.h"
#include "norm_modulate_rows.h"
#include "sgld/vec_math.h"

namespace sgld {

// fp32 to float8_e4m3fn, to nearest even, values beyond 448 to 448 (NaN stays NaN). Free of branches, so that the
// compiler makes vectors of it.
static inline uint8_t narrow_e4m3(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t kept = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  const uint32_t normal = (kept + 0x7ffffu + (kept >> 20 & 1u) - 0x3c000000u) >> 20;
  // Below the smallest normal, 2^-6, the spacing is 2^-9: let the adder round.
  const uint32_t subnormal = float_to_bits(bits_to_float(kept) + 0x1p14f) - 0x46800000u;
  const uint32_t number = kept < 0x3c800000u ? subnormal : normal;
  const uint32_t code = magnitude > 0x7f800000u ? 0x7fu : number;
  return static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
}

constexpr int64_t kAhead = 1024;  // elements

template <class V>
struct ElementwiseKernel {
  using Norm = NormModulateKernel<V>;

  // `rough` is enough for bf16, see vec_math.h.
  template <bool kRough>
  static V gelu(V x, std::bool_constant<kRough>) {
    // 2 log2(e) sqrt(2/pi) (x + 0.044715 x^3)
    constexpr float kLinear = 2.0f * kLog2E * 0.797884561f;
    const V t = x * fma(V::set(kLinear * 0.044715f), x * x, V::set(kLinear));
    return gated_logistic<kRough>(x, t);
  }

  template <bool kRough>
  static V silu(V x, std::bool_constant<kRough>) {
    return gated_logistic<kRough>(x, x * V::set(kLog2E));
  }

  // out[i] = f(a[i], b[i]); a last block of n < width elements goes through a buffer.
  template <class T, class F>
  static void map(const T* a, const T* b, T* out, int64_t n, bool stream, F f) {
    constexpr std::bool_constant<std::is_same_v<T, bf16>> rough;
    const auto block = [&](int64_t at) {
      const V y = f(V::load(a + at), V::load(b + at), rough);
      stream ? y.stream(out + at) : y.store(out + at);
    };
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
      // Far enough ahead to be past the end of a page, where the hardware stops.
      __builtin_prefetch(a + i + kAhead);
      if (a != b) __builtin_prefetch(b + i + kAhead);
      if (!stream) __builtin_prefetch(out + i + kAhead, 1);
      for (int64_t u = 0; u < kLine; u += V::width) block(i + u);
    }
    for (; i + V::width <= n; i += V::width) block(i);
    if (i == n) return;
    T rest_a[V::width] = {}, rest_b[V::width] = {};
    for (int64_t u = i; u < n; ++u) rest_a[u - i] = a[u], rest_b[u - i] = b[u];
    f(V::load(rest_a), V::load(rest_b), rough).store(rest_a);
    for (int64_t u = i; u < n; ++u) out[u] = rest_a[u - i];
  }

  template <class T, class F>
  static void rows(const Elementwise& p, int64_t begin, int64_t end, F f) {
    const int64_t bytes = sizeof(T);
    const bool aligned = p.out.token * bytes % 64 == 0 && p.out.batch * bytes % 64 == 0 &&
                         reinterpret_cast<uintptr_t>(p.out.data) % 64 == 0;
    const bool stream = aligned && !p.in_place && p.B * p.S * p.D * bytes > kStreamBytes;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.S, s = index % p.S;
      const auto at = [&](const Rows& rows) {
        return static_cast<const T*>(rows.data) + b * rows.batch + s * rows.token;
      };
      const T* first = at(p.a);
      map(first, p.b.data ? at(p.b) : first, const_cast<T*>(at(p.out)),
          index == p.B * p.S - 1 ? p.last : p.D, stream, f);
    }
    V::fence();
  }

  template <class F>
  static void run(const Elementwise& p, int64_t begin, int64_t end, F f) {
    switch (p.a.dtype) {
      case DType::f32:
        return rows<float>(p, begin, end, f);
      case DType::bf16:
        return rows<bf16>(p, begin, end, f);
      case DType::f16:
        return rows<f16>(p, begin, end, f);
    }
  }

  static void gelu_tanh(const Elementwise& p, int64_t begin, int64_t end) {
    run(p, begin, end, [](V x, V, auto rough) { return gelu(x, rough); });
  }

  static void silu_mul(const Elementwise& p, int64_t begin, int64_t end) {
    run(p, begin, end, [](V x, V up, auto rough) { return silu(x, rough) * up; });
  }

  // One chunk of a batch row; T is the velocity's type.
  template <bool kGuided, class T>
  static void step(const SolverStep& p, int64_t b, int64_t begin, int64_t end) {
    const float* row = p.table + b * kSolverColumns;
    V column[kSolverColumns];
    for (int i = 0; i < kSolverColumns; ++i) column[i] = V::set(row[i]);
    const V guidance = V::set(kGuided ? p.guidance[b] : 0.0f);
    const auto [sigma, c_x, c_last, c_m0, c_m1, c_x0, p_x, p_x0, p_m0] = column;
    const int64_t base = b * p.N;
    const auto one = [&](const float* x, const float* last, const float* m0, const float* m1,
                         const T* with, const T* without, float* next, float* corrected,
                         float* x0) {
      V v = V::load(with);
      if constexpr (kGuided) {
        const V u = V::load(without);
        v = fma(guidance, v - u, u);
      }
      const V now = V::load(x), before = V::load(m0);
      const V clean = now - sigma * v;
      const V old = fma(c_last, V::load(last), c_x * now);
      const V fixed = fma(c_x0, clean, fma(c_m1, V::load(m1), fma(c_m0, before, old)));
      clean.store(x0);
      fixed.store(corrected);
      fma(p_m0, before, fma(p_x0, clean, p_x * fixed)).store(next);
    };
    const T* with = static_cast<const T*>(p.v) + base;
    const T* without = kGuided ? static_cast<const T*>(p.u) + base : with;
    int64_t i = begin;
    for (; i + V::width <= end; i += V::width) {
      const int64_t at = base + i, ahead = at + kAhead;
      for (const float* state : {p.x, p.last, p.m0, p.m1}) __builtin_prefetch(state + ahead);
      __builtin_prefetch(with + i + kAhead);
      if (kGuided) __builtin_prefetch(without + i + kAhead);
      for (float* result : {p.next, p.corrected, p.x0}) __builtin_prefetch(result + ahead, 1);
      one(p.x + at, p.last + at, p.m0 + at, p.m1 + at, with + i, without + i, p.next + at,
          p.corrected + at, p.x0 + at);
    }
    const int64_t n = end - i, at = base + i;
    if (n == 0) return;
    float state[7][V::width] = {};
    T velocity[2][V::width] = {};
    for (int64_t u = 0; u < n; ++u) {
      state[0][u] = p.x[at + u], state[1][u] = p.last[at + u];
      state[2][u] = p.m0[at + u], state[3][u] = p.m1[at + u];
      velocity[0][u] = with[i + u], velocity[1][u] = without[i + u];
    }
    one(state[0], state[1], state[2], state[3], velocity[0], velocity[1], state[4], state[5],
        state[6]);
    for (int64_t u = 0; u < n; ++u) {
      p.next[at + u] = state[4][u], p.corrected[at + u] = state[5][u];
      p.x0[at + u] = state[6][u];
    }
  }

  template <class T>
  static void steps(const SolverStep& p, int64_t begin, int64_t end) {
    const int64_t chunks = solver_chunks(p);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % chunks * kChunk;
      const int64_t stop = first + kChunk < p.N ? first + kChunk : p.N;
      p.u ? step<true, T>(p, index / chunks, first, stop)
          : step<false, T>(p, index / chunks, first, stop);
    }
  }

  static void solver_step(const SolverStep& p, int64_t begin, int64_t end) {
    switch (p.v_dtype) {
      case DType::f32:
        return steps<float>(p, begin, end);
      case DType::bf16:
        return steps<bf16>(p, begin, end);
      case DType::f16:
        return steps<f16>(p, begin, end);
    }
  }

  // The codes of a row; the pointers are known to be apart, and a byte written could be anything else.
  static void narrow_row(const float* __restrict row, float inverse, uint8_t* __restrict out,
                         int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow_e4m3(row[i] * inverse);
  }

  static void quant(const QuantRows& p, int64_t begin, int64_t end, float* row) {
    const int64_t n = p.D;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.S, s = index % p.S;
      Norm::merge(row, p.x, b, s, n, [](V, V y) { return y; });
      uint32_t most = 0;  // of the magnitudes as integers: there NaN is the largest
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = float_to_bits(row[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
      }
      const float wanted = bits_to_float(most) / 448.0f;
      const float scale = wanted < 0x1p-100f ? 0x1p-100f : wanted;
      narrow_row(row, 1.0f / scale, p.out + index * n, n);
      p.scale[index] = scale;
    }
  }
};

}  // namespace sgld
