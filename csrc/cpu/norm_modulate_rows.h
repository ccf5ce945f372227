// The rows of norm_modulate for one ISA. Two passes over a row that stays in L1: mean, then variance about the mean,
// so that a large mean does not cancel; then the affine part folded into one multiply-add per element.
#pragma once

#include <cmath>

#include "sgld/norm_modulate.h"
#include "sgld/vec.h"

namespace sgld {

// Floats of scratch a caller of the row functions provides.
inline int64_t norm_modulate_scratch(int64_t D) { return 2 * D; }

// One function per ISA file. Rows [begin, end); `scratch` is private to the calling thread.
using NormModulateRows = void (*)(const NormModulate&, int64_t begin, int64_t end, float* scratch);
void norm_modulate_rows_scalar(const NormModulate&, int64_t begin, int64_t end, float* scratch);
void norm_modulate_rows_avx2(const NormModulate&, int64_t begin, int64_t end, float* scratch);
void norm_modulate_rows_avx512(const NormModulate&, int64_t begin, int64_t end, float* scratch);
void norm_modulate_rows_avx512_bf16(const NormModulate&, int64_t begin, int64_t end,
                                    float* scratch);

// Results above this size pass the caches: they would not stay there until the next op reads them,
// and a store past the cache saves the read that an ordinary store to a new line begins with.
constexpr int64_t kStreamBytes = 16 << 20;

constexpr int64_t kLineBytes = 64;  // of a cache

template <class V>
struct NormModulateKernel {
  static constexpr int kChains = 4;

  // Sum of f(x[i]) with independent chains, so that the adder's latency hides.
  template <class T, class F>
  static float reduce(const T* x, int64_t n, F f) {
    V part[kChains], v[kChains];
    for (V& p : part) p = V::set(0.0f);
    int64_t i = 0;
    for (; i + kChains * V::width <= n; i += kChains * V::width) {
      for (int u = 0; u < kChains; u += 2) V::load_unordered(x + i + u * V::width, v[u], v[u + 1]);
      for (int u = 0; u < kChains; ++u) part[u] = f(v[u], part[u]);
    }
    for (; i + V::width <= n; i += V::width) part[0] = f(V::load(x + i), part[0]);
    float rest = 0.0f;
    for (; i < n; ++i) rest += f(V::set(widen(x[i])), V::set(0.0f)).sum() / V::width;
    return ((part[0] + part[1]) + (part[2] + part[3])).sum() + rest;
  }

  // dst[i] = f(dst[i], src[i])
  template <class T, class F>
  static void merge(float* dst, const T* src, int64_t n, F f) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) f(V::load(dst + i), V::load(src + i)).store(dst + i);
    for (; i < n; ++i) {
      float lanes[V::width];
      f(V::set(dst[i]), V::set(widen(src[i]))).store(lanes);
      dst[i] = lanes[0];
    }
  }

  template <class F>
  static void merge(float* dst, const Rows& rows, int64_t b, int64_t s, int64_t n, F f) {
    const int64_t offset = b * rows.batch + s * rows.token;
    switch (rows.dtype) {
      case DType::f32:
        return merge(dst, static_cast<const float*>(rows.data) + offset, n, f);
      case DType::bf16:
        return merge(dst, static_cast<const bf16*>(rows.data) + offset, n, f);
      case DType::f16:
        return merge(dst, static_cast<const f16*>(rows.data) + offset, n, f);
    }
  }

  // (n * weight + bias) * (1 + scale) + shift = n * a + c
  static void fold(const NormModulate& p, int64_t b, int64_t s, float* a, float* c) {
    const V one = V::set(1.0f);
    for (int64_t i = 0; i < p.D; ++i) a[i] = 1.0f, c[i] = 0.0f;
    const auto copy = [](V, V y) { return y; };
    if (p.weight.data) merge(a, p.weight, b, s, p.D, copy);
    if (p.bias.data) merge(c, p.bias, b, s, p.D, copy);
    if (p.scale.data) {
      const auto modulate = [one](V x, V y) { return x * (one + y); };
      merge(a, p.scale, b, s, p.D, modulate);
      if (p.bias.data) merge(c, p.scale, b, s, p.D, modulate);
    }
    if (p.shift.data) merge(c, p.shift, b, s, p.D, [](V x, V y) { return x + y; });
  }

  template <bool kAffine, class In, class Out>
  static void row(const In* x, const In* next, const float* a, const float* c, Out* out,
                  bool stream, const NormModulate& p) {
    const int64_t n = p.D;
    float mean = 0.0f;
    if (!p.rms) mean = reduce(x, n, [](V v, V sum) { return sum + v; }) / static_cast<float>(n);
    const V m = V::set(mean);
    const float square = reduce(x, n, [m](V v, V sum) { return fma(v - m, v - m, sum); });
    const float rstd = 1.0f / std::sqrt(square / static_cast<float>(n) + p.eps);
    const V r = V::set(rstd);
    const auto block = [&](int64_t at) {
      const V v = (V::load(x + at) - m) * r;
      const V y = kAffine ? fma(v, V::load(a + at), V::load(c + at)) : v;
      stream ? y.stream(out + at) : y.store(out + at);
    };
    constexpr int64_t kLine = kLineBytes / sizeof(In);
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
      // The next row comes from memory while this one, in L1, is computed.
      __builtin_prefetch(next + i);
      for (int64_t u = 0; u < kLine; u += V::width) block(i + u);
    }
    for (; i + V::width <= n; i += V::width) block(i);
    for (; i < n; ++i) {
      const float v = (widen(x[i]) - mean) * rstd;
      narrow(kAffine ? v * a[i] + c[i] : v, out + i);
    }
  }

  // Whether the rows of the result go past the caches.
  template <class Out>
  static bool streams(const NormModulate& p) {
    const int64_t row_bytes = p.D * static_cast<int64_t>(sizeof(Out));
    return p.B * p.S * row_bytes > kStreamBytes && row_bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
  }

  template <bool kAffine, class In, class Out>
  static void rows(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
    float* a = scratch;
    float* c = scratch + p.D;
    const bool per_token = p.scale.token || p.shift.token;
    const bool per_batch = p.scale.batch || p.shift.batch;
    const bool stream = streams<Out>(p);
    int64_t folded = -1;  // the batch row that a and c hold
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.S;
      const int64_t s = index % p.S;
      if (kAffine && (folded < 0 || per_token || (per_batch && folded != b))) {
        fold(p, b, s, a, c);
        folded = b;
      }
      const In* x = static_cast<const In*>(p.x.data) + b * p.x.batch + s * p.x.token;
      Out* out = static_cast<Out*>(p.out) + index * p.D;
      row<kAffine>(x, x + p.x.token, a, c, out, stream, p);
    }
    V::fence();
  }

  template <class In, class Out>
  static void affine(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
    p.affine ? rows<true, In, Out>(p, begin, end, scratch)
             : rows<false, In, Out>(p, begin, end, scratch);
  }

  template <class In>
  static void out(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.out_dtype) {
      case DType::f32:
        return affine<In, float>(p, begin, end, scratch);
      case DType::bf16:
        return affine<In, bf16>(p, begin, end, scratch);
      case DType::f16:
        return affine<In, f16>(p, begin, end, scratch);
    }
  }

  static void run(const NormModulate& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.x.dtype) {
      case DType::f32:
        return out<float>(p, begin, end, scratch);
      case DType::bf16:
        return out<bf16>(p, begin, end, scratch);
      case DType::f16:
        return out<f16>(p, begin, end, scratch);
    }
  }
};

}  // namespace sgld
