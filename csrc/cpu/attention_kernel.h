// Attention for one ISA: packing of keys and values, then blocks of queries against blocks of keys with a running
// softmax. `Tiles` brings the vector type, the element type that is multiplied and the register tile.
//
// A product is C[rows, cols] = A[rows, depth] B[depth, cols] with A as it lies and B in panels of Tiles::kCols columns:
// [panel][depth / kPair][kCols][kPair]. Scores have B = kᵀ, the result has B = v. Everything is padded with zeros to
// whole tiles, so that the tiles have no remainders.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_math.h"
#include "sgld/attention.h"

namespace sgld {

struct AttentionKernels {
  int64_t query_rows;  // most rows of one call of attend
  int64_t strip;       // rows in multiples of this waste nothing
  int64_t (*packed_bytes)(int64_t d, int64_t L);
  int64_t (*scratch_bytes)(int64_t d);
  // Keys and values [first, last) of one head; first in multiples of kKeyStep.
  void (*pack)(const Attention&, const Sequence&, int64_t head, int64_t first, int64_t last,
               void* packed);
  // Queries [first, last) of one head; packed and scratch begin at multiples of 64 bytes.
  void (*attend)(const Attention&, const Sequence&, int64_t head, int64_t first, int64_t last,
                 const void* packed, void* scratch);
};

constexpr int64_t kKeyStep = 32;

const AttentionKernels& attention_scalar();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();
const AttentionKernels& attention_avx512_bf16();  // bf16 tensors only
const AttentionKernels& attention_amx();          // bf16 tensors only

// Rows [begin, end) of attention_merge, in the order of the result.
void attention_merge_rows_scalar(const AttentionMerge&, int64_t begin, int64_t end);
void attention_merge_rows_avx2(const AttentionMerge&, int64_t begin, int64_t end);
void attention_merge_rows_avx512(const AttentionMerge&, int64_t begin, int64_t end);

// Scores as powers of 2. Not 0: the keys that fill the last block have the score -inf, and 0 · inf is NaN.
static inline float factor_of(float scale) {
  const float factor = (scale < 0 ? -scale : scale) * 1.4426950408889634f;
  return factor == 0.0f ? std::numeric_limits<float>::min() : factor;
}

static inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The register tile of every ISA without a dot product: fp32 multiply-adds.
template <class Vec, int kTileRows, int kTileVectors>
struct FmaTiles {
  using V = Vec;
  using E = float;
  static constexpr int64_t kRows = kTileRows, kCols = kTileVectors * Vec::width;
  static constexpr int64_t kPair = 1, kDepth = 1;

  template <int64_t lda>
  static void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t ldc,
                       bool add) {
    V sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) sum[i][j] = V::set(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      V right[kTileVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) right[j] = V::load(b + k * kCols + j * V::width);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const V left = V::set(a[i * lda + k]);
#pragma GCC unroll 4
        for (int j = 0; j < kTileVectors; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) {
        // Added here, not before: a short sum rounds less than a long one.
        float* at = c + i * ldc + j * V::width;
        (add ? sum[i][j] + V::load(at) : sum[i][j]).store(at);
      }
  }

  template <class T>
  static void pack_keys(const T* rows, int64_t stride, int64_t n, int64_t d, int64_t depth,
                        float* out) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < d; ++k) out[k * kCols + i] = widen(rows[i * stride + k]);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = k < d ? n : 0; i < kCols; ++i) out[k * kCols + i] = 0.0f;
  }

  template <class T>
  static void pack_values(const T* rows, int64_t stride, int64_t n, int64_t cols, float* out) {
    for (int64_t i = 0; i < n; ++i) {
      int64_t j = 0;
      for (; j + V::width <= cols; j += V::width)
        V::load(rows + i * stride + j).store(out + i * kCols + j);
      for (; j < cols; ++j) out[i * kCols + j] = widen(rows[i * stride + j]);
      for (; j < kCols; ++j) out[i * kCols + j] = 0.0f;
    }
    for (int64_t i = n * kCols; i < kKeyStep * kCols; ++i) out[i] = 0.0f;
  }

  static void put(V low, V high, float* out) {
    low.store(out);
    high.store(out + V::width);
  }
};

template <class V>
struct AttentionMergeKernel {
  // Both sums are relative to the larger logarithm. A result over no keys has the logarithm -inf and counts nothing.
  template <class A, class B>
  static void rows(const AttentionMerge& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % p.H, s = row / p.H % p.S, b = row / p.H / p.S;
      const int64_t at = (b * p.H + h) * p.S + s;
      const float x = p.lse_a[at], y = p.lse_b[at];
      const float top = x > y ? x : y;
      const bool none = top == -std::numeric_limits<float>::infinity();
      const float wx = none ? 0.0f : std::exp(x - top), wy = none ? 0.0f : std::exp(y - top);
      p.lse[at] = none ? top : top + std::log(wx + wy);
      const float share = none ? 0.0f : 1.0f / (wx + wy);
      const V fx = V::set(wx * share), fy = V::set(wy * share);
      const A* left = static_cast<const A*>(p.a) + row * p.d;
      const B* right = static_cast<const B*>(p.b) + row * p.d;
      A* out = static_cast<A*>(p.out) + row * p.d;
      int64_t i = 0;
      for (; i + V::width <= p.d; i += V::width)
        fma(V::load(left + i), fx, V::load(right + i) * fy).store(out + i);
      for (; i < p.d; ++i)
        narrow(widen(left[i]) * (wx * share) + widen(right[i]) * (wy * share), out + i);
    }
  }

  template <class A>
  static void right(const AttentionMerge& p, int64_t begin, int64_t end) {
    switch (p.b_dtype) {
      case DType::f32:
        return rows<A, float>(p, begin, end);
      case DType::bf16:
        return rows<A, bf16>(p, begin, end);
      case DType::f16:
        return rows<A, f16>(p, begin, end);
    }
  }

  static void run(const AttentionMerge& p, int64_t begin, int64_t end) {
    switch (p.a_dtype) {
      case DType::f32:
        return right<float>(p, begin, end);
      case DType::bf16:
        return right<bf16>(p, begin, end);
      case DType::f16:
        return right<f16>(p, begin, end);
    }
  }
};

template <class Tiles>
struct AttentionKernel {
  using V = typename Tiles::V;
  using E = typename Tiles::E;
  static constexpr int64_t kRows = Tiles::kRows, kCols = Tiles::kCols;
  static constexpr int64_t kStrip = Tiles::kStrip, kKeys = Tiles::kKeys;
  static constexpr int64_t kQueries = Tiles::kQueries;
  // Probabilities replace the scores they come from where both are fp32.
  static constexpr bool kInPlace = std::is_same_v<E, float>;
  // Rows a power of two apart would fall into few sets of the cache.
  // Strides are constants, so that a row of a tile is a constant away from the first.
  static constexpr int64_t kQueryStride = kMostHeadDim + 16;
  static constexpr int64_t kScoreStride = kKeys + 16;
  static constexpr int64_t kProbStride = kInPlace ? kScoreStride : kKeys + 32;
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();
  static_assert(kKeyStep % kCols == 0 && kKeys % kKeyStep == 0);
  static_assert(kStrip % kRows == 0 && kQueries % kStrip == 0);

  struct Layout {
    int64_t depth, width, keys;  // d in the scores, d in the result, keys: padded
    explicit Layout(int64_t d, int64_t L = 0)
        : depth(whole(d, Tiles::kDepth)), width(whole(d, kCols)), keys(whole(L, kKeyStep)) {}
  };

  // Everything a call of attend works in.
  struct Scratch {
    E* q;
    E* prob;
    float *score, *sum, *high, *total;
    char* end;
    Scratch(void* memory, const Layout& at) {
      char* next = static_cast<char*>(memory);
      const auto take = [&next](auto** part, int64_t n) {
        using Part = std::remove_reference_t<decltype(**part)>;
        *part = reinterpret_cast<Part*>(next);
        next += whole(n * static_cast<int64_t>(sizeof(Part)), 64);
      };
      take(&q, kQueries * kQueryStride);
      take(&score, kStrip * kScoreStride);
      if constexpr (kInPlace)
        prob = score;
      else
        take(&prob, kStrip * kProbStride);
      take(&sum, kQueries * at.width);
      take(&high, kQueries);
      take(&total, kQueries);
      end = next;
    }
  };

  static int64_t packed_bytes(int64_t d, int64_t L) {
    const Layout at(d, L);
    return whole(at.keys * (at.depth + at.width) * static_cast<int64_t>(sizeof(E)), 64);
  }

  static int64_t scratch_bytes(int64_t d) {
    return Scratch(nullptr, Layout(d)).end - static_cast<char*>(nullptr);
  }

  template <class T>
  static void pack_as(const Attention& p, const Sequence& s, int64_t head, int64_t first,
                      int64_t last, void* packed) {
    const Layout at(p.d, s.L);
    E* keys = static_cast<E*>(packed);
    E* values = keys + at.keys * at.depth;
    const T* k = static_cast<const T*>(p.k.data) + s.k + head * p.k.head;
    const T* v = static_cast<const T*>(p.v.data) + s.v + head * p.v.head;
    for (int64_t i = first; i < whole(last, kKeyStep); i += kCols) {
      const int64_t n = last - i < kCols ? (last > i ? last - i : 0) : kCols;
      Tiles::pack_keys(k + i * p.k.token, p.k.token, n, p.d, at.depth, keys + i * at.depth);
    }
    for (int64_t i = first; i < last; i += kKeyStep) {
      const int64_t n = last - i < kKeyStep ? last - i : kKeyStep;
      for (int64_t j = 0; j < p.d; j += kCols)
        Tiles::pack_values(v + i * p.v.token + j, p.v.token, n, p.d - j < kCols ? p.d - j : kCols,
                           values + j * at.keys + i * kCols);
    }
  }

  static void pack(const Attention& p, const Sequence& s, int64_t head, int64_t first, int64_t last,
                   void* packed) {
    if constexpr (!kInPlace)
      return pack_as<E>(p, s, head, first, last, packed);
    else if (p.dtype == DType::bf16)
      return pack_as<bf16>(p, s, head, first, last, packed);
    else if (p.dtype == DType::f16)
      return pack_as<f16>(p, s, head, first, last, packed);
    else
      return pack_as<float>(p, s, head, first, last, packed);
  }

  static float queried(float x, bool negative) { return negative ? -x : x; }
  static bf16 queried(bf16 x, bool negative) {
    return {static_cast<uint16_t>(negative ? x.bits ^ 0x8000u : x.bits)};
  }

  // A negative scale is the positive one with negated queries: the largest score stays the largest.
  template <class T>
  static void load_queries(const T* q, int64_t stride, int64_t rows, int64_t d, bool negative,
                           E* out, int64_t depth) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < d; ++k) {
        if constexpr (kInPlace)
          out[r * kQueryStride + k] = queried(widen(q[r * stride + k]), negative);
        else
          out[r * kQueryStride + k] = queried(q[r * stride + k], negative);
      }
      for (int64_t k = d; k < depth; ++k) out[r * kQueryStride + k] = E{};
    }
    for (int64_t r = rows; r < whole(rows, kRows); ++r)
      for (int64_t k = 0; k < depth; ++k) out[r * kQueryStride + k] = E{};
  }

  // One row of scores to probabilities: 2^(score · factor - high). Adds to the row's state.
  static void soften(float* score, E* prob, int64_t n, float factor, bool begin, float* high,
                     float* total, float* sum, int64_t width) {
    const int64_t padded = whole(n, kKeyStep);
    for (int64_t i = n; i < padded; ++i) score[i] = kLowest;
    V most[2] = {V::load(score), V::load(score + V::width)};
    for (int64_t i = 2 * V::width; i < padded; i += 2 * V::width) {
      most[0] = larger(most[0], V::load(score + i));
      most[1] = larger(most[1], V::load(score + i + V::width));
    }
    float top = largest(larger(most[0], most[1])) * factor;
    if (!begin && !(top > *high)) top = *high;
    const V f = V::set(factor), h = V::set(-top);
    V part[2] = {V::set(0.0f), V::set(0.0f)};
#pragma GCC unroll 2
    for (int64_t i = 0; i < padded; i += 2 * V::width) {
      const V low = exp2_of<!kInPlace>(fma(V::load(score + i), f, h));
      const V up = exp2_of<!kInPlace>(fma(V::load(score + i + V::width), f, h));
      part[0] = part[0] + low;
      part[1] = part[1] + up;
      Tiles::put(low, up, prob + i);
    }
    const float added = (part[0] + part[1]).sum();
    if (begin) {
      *total = added;
    } else if (top > *high) {
      const float fade = std::exp2(*high - top);
      const V by = V::set(fade);
      for (int64_t i = 0; i < width; i += V::width) (V::load(sum + i) * by).store(sum + i);
      *total = *total * fade + added;
    } else {
      *total += added;
    }
    *high = top;
  }

  template <class T>
  static void store(const Attention& p, const Sequence& s, int64_t head, int64_t first,
                    int64_t rows, const Scratch& at, const Layout& layout) {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(p.out) + ((s.row + first + r) * p.H + head) * p.d;
      const float inverse = s.L == 0 ? 0.0f : 1.0f / at.total[r];
      const float* sum = at.sum + r * layout.width;
      const V by = V::set(inverse);
      int64_t i = 0;
      for (; i + V::width <= p.d; i += V::width) (V::load(sum + i) * by).store(out + i);
      for (; i < p.d; ++i) narrow(sum[i] * inverse, out + i);
      if (p.lse)
        p.lse[s.lse + head * p.lse_head + first + r] =
            s.L == 0 ? kLowest : 0.6931471805599453f * (at.high[r] + std::log2(at.total[r]));
    }
  }

  template <class T>
  static void attend_as(const Attention& p, const Sequence& s, int64_t head, int64_t first,
                        int64_t last, const void* packed, void* scratch) {
    const Layout layout(p.d, s.L);
    const Scratch at(scratch, layout);
    const E* keys = static_cast<const E*>(packed);
    const E* values = keys + layout.keys * layout.depth;
    const int64_t rows = last - first;
    const T* q = static_cast<const T*>(p.q.data) + s.q + first * p.q.token + head * p.q.head;
    load_queries(q, p.q.token, rows, p.d, p.scale < 0, at.q, layout.depth);
    const float factor = factor_of(p.scale);
    if (s.L == 0)
      for (int64_t i = 0; i < rows * layout.width; ++i) at.sum[i] = 0.0f;
    for (int64_t k0 = 0; k0 < s.L; k0 += kKeys) {
      const int64_t n = s.L - k0 < kKeys ? s.L - k0 : kKeys, padded = whole(n, kKeyStep);
      for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
        const int64_t strip = rows - r0 < kStrip ? rows - r0 : kStrip;
        for (int64_t j = 0; j < padded; j += kCols)
          for (int64_t i = 0; i < strip; i += kRows)
            Tiles::template multiply<kQueryStride>(
                at.q + (r0 + i) * kQueryStride, keys + (k0 + j) * layout.depth, layout.depth,
                at.score + i * kScoreStride + j, kScoreStride, false);
        for (int64_t r = 0; r < strip; ++r)
          soften(at.score + r * kScoreStride, at.prob + r * kProbStride, n, factor, k0 == 0,
                 at.high + r0 + r, at.total + r0 + r, at.sum + (r0 + r) * layout.width,
                 layout.width);
        for (int64_t j = 0; j < layout.width; j += kCols)
          for (int64_t i = 0; i < strip; i += kRows)
            Tiles::template multiply<kProbStride>(
                at.prob + i * kProbStride, values + j * layout.keys + k0 * kCols, padded,
                at.sum + (r0 + i) * layout.width + j, layout.width, k0 > 0);
      }
    }
    store<T>(p, s, head, first, rows, at, layout);
  }

  static void attend(const Attention& p, const Sequence& s, int64_t head, int64_t first,
                     int64_t last, const void* packed, void* scratch) {
    if constexpr (!kInPlace)
      return attend_as<E>(p, s, head, first, last, packed, scratch);
    else if (p.dtype == DType::bf16)
      return attend_as<bf16>(p, s, head, first, last, packed, scratch);
    else if (p.dtype == DType::f16)
      return attend_as<f16>(p, s, head, first, last, packed, scratch);
    else
      return attend_as<float>(p, s, head, first, last, packed, scratch);
  }

  static constexpr AttentionKernels table{kQueries,      kStrip, packed_bytes,
                                          scratch_bytes, pack,   attend};
};

}  // namespace sgld
