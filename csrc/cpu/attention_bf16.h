// What the two bf16 kernels share: pairs of neighbouring elements lie together, for instructions that multiply a pair
// and add both products.
#pragma once

#include "attention_kernel.h"

namespace sgld {

struct Bf16Pairs {
  using V = Avx512<true>;
  using E = bf16;
  static constexpr int64_t kCols = 32, kPair = 2;

  static void put(V low, V high, bf16* out) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
  }

  static __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }

  // even[0], odd[0], even[1], ...
  static void put_pairs(V even, V odd, bf16* out) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
  }

  // 16 rows of 16 pairs become 16 columns.
  static void transpose(__m512i* x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
      y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
      x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
      x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
      x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
  }

  static void pack_keys(const bf16* rows, int64_t stride, int64_t n, int64_t d, int64_t depth,
                        bf16* out) {
    for (int64_t k = 0; k < depth; k += 32) {
      const int64_t left = d - k < 32 ? (d > k ? d - k : 0) : 32;
      const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      const int64_t pairs = depth - k < 32 ? (depth - k) / 2 : 16;
      for (int64_t half = 0; half < 2; ++half) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t row = half * 16 + i;
          x[i] = row < n ? _mm512_maskz_loadu_epi16(there, rows + row * stride + k)
                         : _mm512_setzero_si512();
        }
        transpose(x);
        for (int64_t i = 0; i < pairs; ++i)
          _mm512_storeu_si512(out + (k / 2 + i) * 2 * kCols + half * 32, x[i]);
      }
    }
  }

  static void pack_values(const bf16* rows, int64_t stride, int64_t n, int64_t cols, bf16* out) {
    for (int64_t i = 0; i < kKeyStep; i += 2)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t left = cols - half * 16 < 16 ? (cols > half * 16 ? cols - half * 16 : 0) : 16;
        const __mmask16 there = static_cast<__mmask16>((1u << left) - 1);
        const bf16* at = rows + i * stride + half * 16;
        const __m256i none = _mm256_setzero_si256();
        const __m256i even = i < n ? _mm256_maskz_loadu_epi16(there, at) : none;
        const __m256i odd = i + 1 < n ? _mm256_maskz_loadu_epi16(there, at + stride) : none;
        _mm512_storeu_si512(out + i * kCols + half * 32, interleave(even, odd));
      }
  }
};

}  // namespace sgld
