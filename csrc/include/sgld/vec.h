// fp32 vectors for one ISA: loads widen bf16 and fp16, stores round to nearest even. Each ISA file
// includes this header with its own -m flags and sees the types its flags allow. No torch, no
// standard containers, nothing with external linkage that two ISA files would share.
//
// `stream` stores past the caches, to addresses that are multiples of 64 bytes; `fence` after it.
// `load_unordered` reads 2 * width elements in an order of its own, for sums: of bf16 it takes the
// odd and the even ones apart, which is one instruction each and no shuffle.
#pragma once

#include "sgld/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sgld {

SGLD_HOST_DEVICE static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SGLD_HOST_DEVICE static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SGLD_HOST_DEVICE static inline float widen(float x) { return x; }
SGLD_HOST_DEVICE static inline float widen(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
SGLD_HOST_DEVICE static inline float widen(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity, NaN
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

SGLD_HOST_DEVICE static inline void narrow(float value, float* out) { *out = value; }
SGLD_HOST_DEVICE static inline void narrow(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  if (value != value)
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  else
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
SGLD_HOST_DEVICE static inline void narrow(float value, f16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal half: let the adder round
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// The plain C++ level: four lanes that any compiler turns into its baseline vectors.
struct ScalarVec {
  static constexpr int width = 4;
  float lane[width];

  static ScalarVec set(float x) { return {{x, x, x, x}}; }
  template <class T>
  static ScalarVec load(const T* p) {
    return {{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  template <class T>
  static void load_unordered(const T* p, ScalarVec& a, ScalarVec& b) {
    a = load(p);
    b = load(p + width);
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < width; ++i) narrow(lane[i], p + i);
  }
  static void fence() {}
  friend ScalarVec operator+(ScalarVec a, ScalarVec b) {
    for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  friend ScalarVec operator-(ScalarVec a, ScalarVec b) {
    for (int i = 0; i < width; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  friend ScalarVec operator*(ScalarVec a, ScalarVec b) {
    for (int i = 0; i < width; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  friend ScalarVec fma(ScalarVec a, ScalarVec b, ScalarVec c) { return a * b + c; }
  float sum() const { return (lane[0] + lane[1]) + (lane[2] + lane[3]); }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Avx2Vec {
  static constexpr int width = 8;
  __m256 v;

  static Avx2Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2Vec load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Avx2Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  template <class T>
  static void load_unordered(const T* p, Avx2Vec& a, Avx2Vec& b) {
    a = load(p);
    b = load(p + width);
  }
  static void load_unordered(const bf16* p, Avx2Vec& even, Avx2Vec& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(bits, high));
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(f16* p) const {
    const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static void fence() {}
  friend Avx2Vec operator+(Avx2Vec a, Avx2Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Avx2Vec operator-(Avx2Vec a, Avx2Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Avx2Vec operator*(Avx2Vec a, Avx2Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Avx2Vec fma(Avx2Vec a, Avx2Vec b, Avx2Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
};

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

// With kBf16 the CPU rounds to bf16 itself (AVX512-BF16); that instruction also flushes subnormals.
template <bool kBf16>
struct Avx512 {
  static constexpr int width = 16;
  __m512 v;

  static Avx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512 load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Avx512 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  template <class T>
  static void load_unordered(const T* p, Avx512& a, Avx512& b) {
    a = load(p);
    b = load(p + width);
  }
  static void load_unordered(const bf16* p, Avx512& even, Avx512& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(bits, high));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(f16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  static void fence() { _mm_sfence(); }
  friend Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  __m256i to_f16() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  __m256i to_bf16() const {
#if defined(__AVX512BF16__)
    if constexpr (kBf16) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};

#endif

}  // namespace sgld
