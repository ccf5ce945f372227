// What attention needs of a vector beyond vec.h: maximum and 2^x. For one ISA each, like vec.h.
#pragma once

#include "sgld/vec.h"

namespace sgld {

static inline ScalarVec larger(ScalarVec a, ScalarVec b) {
  for (int i = 0; i < ScalarVec::width; ++i)
    a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

static inline float largest(ScalarVec a) {
  float most = a.lane[0];
  for (int i = 1; i < ScalarVec::width; ++i) most = a.lane[i] > most ? a.lane[i] : most;
  return most;
}

// x = n + f with n = floor(x): f in [0, 1), and the product of p with 2^n; both 0 where 2^n is no normal number.
static inline void split(ScalarVec x, ScalarVec& f, ScalarVec& n) {
  for (int i = 0; i < ScalarVec::width; ++i) {
    // NaN stays NaN: it fails the comparison and travels in f.
    const float bounded = x.lane[i] < -127.0f ? -127.0f : x.lane[i];
    float whole = bounded == bounded ? static_cast<float>(static_cast<int>(bounded)) : 0.0f;
    if (whole > bounded) whole -= 1.0f;
    n.lane[i] = whole;
    f.lane[i] = bounded - whole;
  }
}

static inline ScalarVec scale_by_power(ScalarVec p, ScalarVec n) {
  for (int i = 0; i < ScalarVec::width; ++i)
    p.lane[i] *= bits_to_float(static_cast<uint32_t>(static_cast<int>(n.lane[i]) + 127) << 23);
  return p;
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

static inline Avx2Vec larger(Avx2Vec a, Avx2Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

static inline float largest(Avx2Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

static inline void split(Avx2Vec x, Avx2Vec& f, Avx2Vec& n) {
  // The second operand is the result where either is NaN.
  const __m256 bounded = _mm256_max_ps(_mm256_set1_ps(-127.0f), x.v);
  n.v = _mm256_floor_ps(bounded);
  f.v = _mm256_sub_ps(bounded, n.v);
}

static inline Avx2Vec scale_by_power(Avx2Vec p, Avx2Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

template <bool kBf16>
static inline Avx512<kBf16> larger(Avx512<kBf16> a, Avx512<kBf16> b) {
  return {_mm512_max_ps(a.v, b.v)};
}

template <bool kBf16>
static inline float largest(Avx512<kBf16> a) {
  return _mm512_reduce_max_ps(a.v);
}

template <bool kBf16>
static inline void split(Avx512<kBf16> x, Avx512<kBf16>& f, Avx512<kBf16>& n) {
  f.v = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  n.v = x.v;  // scalef takes the floor itself
}

template <bool kBf16>
static inline Avx512<kBf16> scale_by_power(Avx512<kBf16> p, Avx512<kBf16> n) {
  return {_mm512_scalef_ps(p.v, n.v)};
}

#endif

// 2^x for x <= 0, and a little above. Relative error 2.6e-6 (results that become bf16) or 1.9e-9.
template <bool kShort, class V>
static inline V exp2_of(V x) {
  V f, n;
  split(x, f, n);
  V p;
  if constexpr (kShort) {
    p = fma(V::set(0.0135341056f), f, V::set(0.0520114688f));
    p = fma(p, f, V::set(0.241442841f));
    p = fma(p, f, V::set(0.69300379f));
    p = fma(p, f, V::set(1.0000026f));
  } else {
    p = fma(V::set(0.000217022159f), f, V::set(0.00124396937f));
    p = fma(p, f, V::set(0.00967884109f));
    p = fma(p, f, V::set(0.0554833415f));
    p = fma(p, f, V::set(0.240229837f));
    p = fma(p, f, V::set(0.693146984f));
    p = fma(p, f, V::set(1.0f));
  }
  return scale_by_power(p, n);
}

}  // namespace sgld
