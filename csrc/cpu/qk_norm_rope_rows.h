// The tokens of qk_norm_rope for one ISA: rows [0, B*S) are the tokens of q, the rest are those of k. A token is read
// twice, for the sum of squares and then out of L1 to be scaled and rotated; in place needs nothing more.
#pragma once

#include "norm_modulate_rows.h"
#include "sgld/qk_norm_rope.h"
#include "sgld/vec_math.h"

namespace sgld {

template <class V>
struct QkNormRopeKernel {
  using Norm = NormModulateKernel<V>;

  enum class Turn { none, pairs, halves };

  // Angles of one token. For neighbouring pairs they are spread so that the rotated x is x * cos + swapped x * sin:
  // cosines twice each, sines with the sign of their place.
  struct Angles {
    const float* cos;
    const float* sin;
  };

  static Angles angles(const QkNormRope& p, int64_t s, float* scratch) {
    const float* cos = p.cos + s * p.cos_stride;
    const float* sin = p.sin + s * p.sin_stride;
    if (p.half) return {cos, sin};
    for (int64_t i = 0; i < p.d / 2; ++i) {
      scratch[2 * i] = scratch[2 * i + 1] = cos[i];
      scratch[p.d + 2 * i] = -sin[i];
      scratch[p.d + 2 * i + 1] = sin[i];
    }
    return {scratch, scratch + p.d};
  }

  // The first n < width elements at x, zeros after them.
  template <class T>
  static V load_part(const T* x, int64_t n) {
    T lanes[V::width] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = x[i];
    return V::load(lanes);
  }

  template <class T>
  static void store_part(V y, T* out, int64_t n) {
    T lanes[V::width];
    y.store(lanes);
    for (int64_t i = 0; i < n; ++i) out[i] = lanes[i];
  }

  // Loads and stores of a block that may be cut short by the end of the head.
  template <bool kWhole, class T>
  static V get(const T* x, int64_t n) {
    if constexpr (kWhole) return V::load(x);
    return load_part(x, n);
  }
  template <bool kWhole, class T>
  static void put(V y, T* out, int64_t n) {
    if constexpr (kWhole)
      y.store(out);
    else
      store_part(y, out, n);
  }

  // Elements [i, i + n) of a head, and with them those half a head further if halves are rotated.
  template <Turn kTurn, bool kWeight, bool kWhole, class T>
  static void block(const T* x, T* out, V r, const float* w, Angles turn, int64_t i, int64_t n,
                    int64_t half) {
    const auto scaled = [&](int64_t at) {
      const V v = get<kWhole>(x + at, n);
      return kWeight ? v * r * get<kWhole>(w + at, n) : v;
    };
    const V a = scaled(i);
    if constexpr (kTurn == Turn::none) {
      put<kWhole>(a, out + i, n);
      return;
    }
    const V c = get<kWhole>(turn.cos + i, n), s = get<kWhole>(turn.sin + i, n);
    if constexpr (kTurn == Turn::pairs) {
      put<kWhole>(fma(a, c, swap_pairs(a) * s), out + i, n);
    } else {
      const V b = scaled(half + i);
      put<kWhole>(a * c - b * s, out + i, n);
      put<kWhole>(fma(a, s, b * c), out + half + i, n);
    }
  }

  template <Turn kTurn, bool kWeight, class T>
  static void head(const T* x, T* out, float rstd, const float* w, Angles turn, int64_t d,
                   int64_t next) {
    const int64_t half = d / 2, n = kTurn == Turn::halves ? half : d;
    const V r = V::set(rstd);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) {
      // The next token comes from memory while this one, in L1, is computed.
      __builtin_prefetch(x + next + i);
      if (kTurn == Turn::halves) __builtin_prefetch(x + next + half + i);
      block<kTurn, kWeight, true>(x, out, r, w, turn, i, V::width, half);
    }
    if (i < n) block<kTurn, kWeight, false>(x, out, r, w, turn, i, n - i, half);
  }

  template <class T>
  static float squares(const T* x, int64_t n) {
    return Norm::reduce(x, n, [](V v, V sum) { return fma(v, v, sum); });
  }

  static float rstd(float squares, int64_t n, float eps) {
    return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  }

  template <Turn kTurn, bool kWeight, class T>
  static void token(const QkNormRope& p, const Heads& heads, const T* x, T* out, const float* w,
                    Angles turn) {
    float scale = 1.0f;
    if (kWeight && !p.per_head) {
      float sum = 0.0f;
      if (heads.head == p.d)
        sum = squares(x, heads.H * p.d);
      else
        for (int64_t h = 0; h < heads.H; ++h) sum += squares(x + h * heads.head, p.d);
      scale = rstd(sum, heads.H * p.d, p.eps);
    }
    for (int64_t h = 0; h < heads.H; ++h) {
      const T* one = x + h * heads.head;
      if (kWeight && p.per_head) scale = rstd(squares(one, p.d), p.d, p.eps);
      head<kTurn, kWeight>(one, out + h * heads.out_head, scale, w + (p.per_head ? 0 : h * p.d),
                           turn, p.d, heads.token);
    }
  }

  template <Turn kTurn, bool kWeight, class T>
  static void tokens(const QkNormRope& p, const Heads& heads, int64_t begin, int64_t end,
                     float* scratch, const float* w) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / heads.S, s = index % heads.S;
      Angles turn{};
      if constexpr (kTurn != Turn::none) turn = angles(p, s, scratch);
      token<kTurn, kWeight>(
          p, heads, static_cast<const T*>(heads.x) + b * heads.batch + s * heads.token,
          static_cast<T*>(heads.out) + b * heads.out_batch + s * heads.out_token, w, turn);
    }
  }

  template <Turn kTurn, class T>
  static void weighted(const QkNormRope& p, const Heads& heads, int64_t begin, int64_t end,
                       float* scratch) {
    if (!heads.weight.data) return tokens<kTurn, false, T>(p, heads, begin, end, scratch, scratch);
    float* w = scratch + 2 * p.d;
    const int64_t width = p.per_head ? p.d : heads.H * p.d;
    Norm::merge(w, heads.weight, 0, 0, width, [](V, V y) { return y; });
    tokens<kTurn, true, T>(p, heads, begin, end, scratch, w);
  }

  template <class T>
  static void part(const QkNormRope& p, const Heads& heads, int64_t begin, int64_t end,
                   float* scratch) {
    if (begin >= end) return;
    if (!p.cos) return weighted<Turn::none, T>(p, heads, begin, end, scratch);
    p.half ? weighted<Turn::halves, T>(p, heads, begin, end, scratch)
           : weighted<Turn::pairs, T>(p, heads, begin, end, scratch);
  }

  template <class T>
  static void both(const QkNormRope& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t queries = p.B * p.q.S;
    part<T>(p, p.q, begin, end < queries ? end : queries, scratch);
    part<T>(p, p.k, (begin > queries ? begin : queries) - queries, end - queries, scratch);
  }

  static void run(const QkNormRope& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t i = 0; i < qk_norm_rope_scratch(p); ++i) scratch[i] = 0.0f;
    switch (p.dtype) {
      case DType::f32:
        return both<float>(p, begin, end, scratch);
      case DType::bf16:
        return both<bf16>(p, begin, end, scratch);
      case DType::f16:
        return both<f16>(p, begin, end, scratch);
    }
  }
};

}  // namespace sgld
