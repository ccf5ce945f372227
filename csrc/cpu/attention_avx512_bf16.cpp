#include "attention_bf16.h"

namespace sgld {
namespace {

struct Tiles : Bf16Pairs {
  static constexpr int64_t kRows = 12, kDepth = 2;
  static constexpr int64_t kStrip = 48, kKeys = 256, kQueries = 192;

  template <int64_t lda>
  static void multiply(const bf16* a, const bf16* b, int64_t depth, float* c, int64_t ldc,
                       bool add) {
    __m512 sum[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
      const __m512bh right0 = (__m512bh)_mm512_loadu_si512(b + k * kCols);
      const __m512bh right1 = (__m512bh)_mm512_loadu_si512(b + k * kCols + 32);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int pair;
        std::memcpy(&pair, a + i * lda + k, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], left, right0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], left, right1);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  }
};

}  // namespace

const AttentionKernels& attention_avx512_bf16() { return AttentionKernel<Tiles>::table; }

}  // namespace sgld
