// Codes of LoRA-merged weights, 32 at a time: bit j of word p is bit p of code j. One copy per ISA file.
#pragma once

#include "sgld/lora.h"
#include "sgld/vec.h"

namespace sgld {

static inline void lora_pack(const uint8_t* code, int bits, uint32_t* words) {
#if defined(__AVX2__)
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  for (int p = 0; p < bits; ++p)  // the bit moves to the top of its byte
    words[p] =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(c, _mm_cvtsi32_si128(7 - p))));
#else
  for (int p = 0; p < bits; ++p) {
    uint32_t word = 0;
    for (int j = 0; j < kLoraGroup; ++j) word |= uint32_t{code[j] >> p & 1u} << j;
    words[p] = word;
  }
#endif
}

static inline void lora_unpack(const uint32_t* words, int bits, uint8_t* code) {
#if defined(__AVX2__)
  const __m256i from =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  __m256i c = _mm256_setzero_si256();
  for (int p = 0; p < bits; ++p) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(words[p]));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(word, from), bit);
    const __m256i one = _mm256_set1_epi8(static_cast<char>(1 << p));
    c = _mm256_or_si256(c, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), one));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(code), c);
#else
  for (int j = 0; j < kLoraGroup; ++j) {
    uint8_t c = 0;
    for (int p = 0; p < bits; ++p) c |= static_cast<uint8_t>((words[p] >> j & 1u) << p);
    code[j] = c;
  }
#endif
}

// The weights of a group whose code is the escape.
static inline uint32_t lora_escaped(const uint32_t* words, int bits) {
  uint32_t mask = ~uint32_t{0};
  for (int p = 0; p < bits; ++p) mask &= words[p];
  return bits == 0 ? 0 : mask;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

namespace {  // each ISA file keeps its own

// bf16 weights, 32 at a time, without a conversion of order: the even ones are the low halves of 32-bit lanes, the
// odd ones the high halves, and the update comes in the same two halves.
template <int kBits>
struct LoraBf16 {
  static constexpr int kEscape = (1 << kBits) - 1;
  __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512i one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(0x10000);
  __m512i below_half = _mm512_set1_epi32(0x7fff);
  __m512i exponent = _mm512_set1_epi16(0x7f80);
  __m512i multiplier = _mm512_add_epi32(
      _mm512_set1_epi32(3 << 16 | 1),
      _mm512_mullo_epi32(_mm512_set1_epi32(4 << 16 | 4),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  __m512i bias = _mm512_set1_epi16(kEscape / 2);
  __m512i escape = _mm512_set1_epi16(kEscape);
  __m512i plane[kLoraMaxBits] = {_mm512_set1_epi16(1), _mm512_set1_epi16(2), _mm512_set1_epi16(4),
                                 _mm512_set1_epi16(8)};
  __m512 scale;
  __m512i sum = _mm512_setzero_si512();

  explicit LoraBf16(float factor) : scale(_mm512_set1_ps(factor)) {
    // Hidden from the compiler, which would make the constants anew in every turn of the loop.
    asm(""
        : "+v"(high), "+v"(one), "+v"(last), "+v"(below_half), "+v"(exponent), "+v"(bias),
          "+v"(escape));
    asm("" : "+v"(plane[0]), "+v"(plane[1]), "+v"(plane[2]), "+v"(plane[3]), "+v"(multiplier));
  }

  __m512 even(__m512i w) const { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  __m512 odd(__m512i w) const { return _mm512_castsi512_ps(_mm512_and_si512(w, high)); }
  // The high halves of both, the first one's at even places.
  __m512i join(__m512 even, __m512 odd) const {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_ternarylogic_epi32(low, _mm512_castps_si512(odd), high, 0xf8);
  }
  // To nearest even, in the high half; not for NaN.
  __m512 round(__m512 x) const {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, last);
    const __m512i half = _mm512_add_epi32(bits, below_half);
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_mask_add_epi32(half, is_odd, half, one), high));
  }
  __m512 update(const float* at) const { return _mm512_mul_ps(scale, _mm512_load_ps(at)); }
  void add_to_sum(__m512i w) {
#if defined(__AVX512VNNI__)
    sum = _mm512_dpwssd_epi32(sum, w, multiplier);
#else
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, multiplier));
#endif
  }

  // False, with nothing done, where a weight is not finite.
  bool merge(bf16* weight, const float* at, uint32_t* words, uint16_t*& escapes) {
    const __m512i w = _mm512_loadu_si512(weight);
    if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(w, exponent), exponent)) return false;
    const __m512 d0 = update(at), d1 = update(at + 16);
    const __m512 m0 = round(_mm512_add_ps(even(w), d0)), m1 = round(_mm512_add_ps(odd(w), d1));
    add_to_sum(w);
    if constexpr (kBits > 0) {
      const __m512i back = join(_mm512_sub_ps(m0, d0), _mm512_sub_ps(m1, d1));
      const __m512i k = _mm512_add_epi16(_mm512_sub_epi16(w, back), bias);
      const __m512i code = _mm512_min_epu16(k, escape);
      __mmask32 all = ~__mmask32{0};
#pragma GCC unroll 4
      for (int p = 0; p < kBits; ++p) {
        const __mmask32 set = _mm512_test_epi16_mask(code, plane[p]);
        words[p] = set;
        all = _kand_mask32(all, set);
      }
      uint32_t escaped = all;
#if defined(__AVX512VBMI2__)
      // Without a branch, which would be a hard one to predict.
      _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi16(escaped, w));
      escapes += __builtin_popcount(escaped);
#else
      for (; escaped; escaped &= escaped - 1) *escapes++ = weight[__builtin_ctz(escaped)].bits;
#endif
    }
    _mm512_storeu_si512(weight, join(m0, m1));
    return true;
  }

  void unmerge(bf16* weight, const float* at, const uint32_t* words, const uint16_t*& escapes) {
    const __m512i m = _mm512_loadu_si512(weight);
    __m512i w = join(_mm512_sub_ps(even(m), update(at)), _mm512_sub_ps(odd(m), update(at + 16)));
    w = _mm512_sub_epi16(w, bias);
#pragma GCC unroll 4
    for (int p = 0; p < kBits; ++p) w = _mm512_mask_add_epi16(w, words[p], w, plane[p]);
    uint32_t escaped = lora_escaped(words, kBits);
#if defined(__AVX512VBMI2__)
    const int count = __builtin_popcount(escaped);
    const auto present = static_cast<__mmask32>((uint64_t{1} << count) - 1);  // and not one behind
    w = _mm512_mask_expand_epi16(w, escaped, _mm512_maskz_loadu_epi16(present, escapes));
    escapes += count;
#else
    if (escaped) {
      alignas(64) uint16_t value[kLoraGroup];
      _mm512_store_si512(value, w);
      for (; escaped; escaped &= escaped - 1) value[__builtin_ctz(escaped)] = *escapes++;
      w = _mm512_load_si512(value);
    }
#endif
    add_to_sum(w);
    _mm512_storeu_si512(weight, w);
  }

  uint32_t checksum() const { return static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)); }
};

}  // namespace

#endif

}  // namespace sgld
