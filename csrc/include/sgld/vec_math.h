// What the memory-bound kernels need beyond vec.h, for every vector type: 2^x, the logistic function
// in base 2, a division, and the swap of neighbours that a rotation of pairs needs.
#pragma once

#include <cmath>

#include "sgld/vec.h"

namespace sgld {

constexpr float kLog2E = 1.44269504f;

// 2^f for f in [0, 1): relative error 7.5e-8, and 7.5e-5 where that is enough.
constexpr float kExp2[] = {0.99999994f,   0.693153083f,   0.240153611f,
                           0.0558263175f, 0.00898934063f, 0.00187757669f};
constexpr float kExp2Rough[] = {0.999925196f, 0.695833504f, 0.226067171f, 0.0780245215f};

template <class V>
static inline V exp2_fraction(V f) {
  V y = fma(V::set(kExp2[5]), f, V::set(kExp2[4]));
  for (int i = 3; i >= 0; --i) y = fma(y, f, V::set(kExp2[i]));
  return y;
}

template <class V>
static inline V exp2_fraction_rough(V f) {
  V y = fma(V::set(kExp2Rough[3]), f, V::set(kExp2Rough[2]));
  for (int i = 1; i >= 0; --i) y = fma(y, f, V::set(kExp2Rough[i]));
  return y;
}

// 2^min(t, 126), and 0 where a float of that size would not be normal.
static inline ScalarVec exp2_capped(ScalarVec t) {
  for (float& x : t.lane) x = x < -125.0f ? 0.0f : std::exp2(x < 126.0f ? x : 126.0f);
  return t;
}
static inline ScalarVec divide(ScalarVec a, ScalarVec b) {
  for (int i = 0; i < ScalarVec::width; ++i) a.lane[i] /= b.lane[i];
  return a;
}
static inline ScalarVec swap_pairs(ScalarVec x) {
  return {{x.lane[1], x.lane[0], x.lane[3], x.lane[2]}};
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

static inline Avx2Vec exp2_capped(Avx2Vec t) {
  const __m256 least = _mm256_set1_ps(-125.0f);
  const __m256 kept = _mm256_cmp_ps(t.v, least, _CMP_GE_OQ);
  const __m256 x = _mm256_max_ps(_mm256_min_ps(t.v, _mm256_set1_ps(126.0f)), least);
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Avx2Vec y = exp2_fraction(Avx2Vec{_mm256_sub_ps(x, whole)});
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(y.v), exponent);
  return {_mm256_and_ps(_mm256_castsi256_ps(scaled), kept)};
}
static inline Avx2Vec divide(Avx2Vec a, Avx2Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Avx2Vec swap_pairs(Avx2Vec x) { return {_mm256_permute_ps(x.v, 0xb1)}; }

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;  // for reduce: x - floor(x)

template <bool kBf16>
static inline Avx512<kBf16> exp2_capped(Avx512<kBf16> t) {
  const __m512 x = _mm512_min_ps(t.v, _mm512_set1_ps(126.0f));
  const Avx512<kBf16> y = exp2_fraction(Avx512<kBf16>{_mm512_reduce_ps(x, kFraction)});
  return {_mm512_scalef_ps(y.v, x)};  // by 2^floor(x)
}
// An estimate and one Newton step: within 2 ulp, in a third of the time of the division.
// b must be a normal number of at most 2^126.
template <bool kBf16>
static inline Avx512<kBf16> divide(Avx512<kBf16> a, Avx512<kBf16> b) {
  const __m512 estimate = _mm512_rcp14_ps(b.v);
  const __m512 error = _mm512_fnmadd_ps(b.v, estimate, _mm512_set1_ps(1.0f));
  const __m512 quotient = _mm512_mul_ps(a.v, estimate);
  return {_mm512_fmadd_ps(quotient, error, quotient)};
}
template <bool kBf16>
static inline Avx512<kBf16> swap_pairs(Avx512<kBf16> x) {
  return {_mm512_permute_ps(x.v, 0xb1)};
}

#endif

// x / (1 + 2^-t): x times the logistic function of t ln 2. Of a very negative t it is x times 0.
// `kRough`: within 1e-4, which rounding to bf16 hides, where that is faster.
template <bool kRough, class V>
static inline V gated_logistic(V x, V t) {
  const V e = exp2_capped(t);
  return x * divide(e, V::set(1.0f) + e);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

// Neither 2^-t nor its reciprocal needs a cap: infinity becomes 0.
template <bool kRough, bool kBf16>
static inline Avx512<kBf16> gated_logistic(Avx512<kBf16> x, Avx512<kBf16> t) {
  using V = Avx512<kBf16>;
  if constexpr (!kRough) {
    const V e = exp2_capped(t);
    return x * divide(e, V::set(1.0f) + e);
  }
  const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), t.v);
  const V y = exp2_fraction_rough(V{_mm512_reduce_ps(minus, kFraction)});
  const V e{_mm512_scalef_ps(y.v, minus)};
  return x * V{_mm512_rcp14_ps((V::set(1.0f) + e).v)};
}

#endif

}  // namespace sgld
