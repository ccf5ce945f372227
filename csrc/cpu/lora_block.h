// Merging and unmerging a block of a matrix for one ISA: the update of a panel into a buffer in L1, then the rows of
// weights against it. `Update` computes the buffer; it is what differs between the ISAs' matrix and vector units.
#pragma once

#include <cmath>
#include <type_traits>

#include "lora_codes.h"
#include "sgld/lora.h"
#include "sgld/lora_element.h"
#include "sgld/vec.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace sgld {

LoraKernels lora_kernels_scalar();
LoraKernels lora_kernels_avx2();
LoraKernels lora_kernels_avx512();
LoraKernels lora_kernels_avx512_vbmi2();
LoraKernels lora_kernels_amx();

namespace {  // each ISA file keeps its own

// Rounding to nearest; subnormals as zero for the update, as the matrix units do it, and in full for the weights.
// What the thread had set comes back.
struct LoraFloatMode {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  static void update() { _mm_setcsr(0x1f80u | 0x8040u); }
  static void weights() { _mm_setcsr(0x1f80u); }
  ~LoraFloatMode() { _mm_setcsr(saved); }
#else
  static void update() {}
  static void weights() {}
#endif
};

template <class V>
static inline V lora_fma(V a, V b, V c) {
  return fma(a, b, c);
}
// The plain level has no fused multiply-add of its own.
static inline ScalarVec lora_fma(ScalarVec a, ScalarVec b, ScalarVec c) {
  for (int i = 0; i < ScalarVec::width; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}

// The update of a block's only adapter is stored without its scale, which the rows multiply with.
enum class LoraTurn { only, first, later };

// Some rows of a block: those whose update is in the buffer at a time.
struct LoraRows {
  const LoraBlock& block;
  int64_t begin, count;
};

static inline int64_t packed_row(const LoraFactor& f, const LoraRows& r) {
  return (r.block.index - f.block_begin) * kLoraRows + r.begin;
}

// The update with vector units.
template <class V>
struct LoraChains {
  static constexpr int kHeld = V::width == 16 ? 6 : 3;  // rows that the registers hold
  static constexpr int kWidth = 2 * V::width;

  struct Unit {};  // vector units need no setting up
  static int64_t rows_at_once(const LoraBlock&) { return kLoraRows; }
  static bool in_any_mode(const LoraFactor&, LoraTurn) { return false; }

  template <int R>
  static void tile(const LoraFactor& f, const float* up, const float* down, LoraTurn turn,
                   float* out) {
    V sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::set(0.0f);
    for (int64_t begin = 0; begin < f.rank; begin += kLoraChain) {
      const int64_t end = begin + kLoraChain < f.rank ? begin + kLoraChain : f.rank;
      V even[R][2], odd[R][2];
      for (int r = 0; r < R; ++r) even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = V::set(0.0f);
      for (int64_t k = begin; k < end; k += 2) {
        step<R>(up + k, f.up_stride, down + k * kLoraGroup, even);
        step<R>(up + k + 1, f.up_stride, down + (k + 1) * kLoraGroup, odd);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = sum[r][v] + (even[r][v] + odd[r][v]);
    }
    const V scale = V::set(f.scale);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) {
        float* to = out + r * kLoraPanel + v * V::width;
        if (turn == LoraTurn::only)
          sum[r][v].store(to);
        else if (turn == LoraTurn::first)
          (scale * sum[r][v]).store(to);
        else
          lora_fma(scale, sum[r][v], V::load(to)).store(to);
      }
  }

  template <int R>
  static inline void step(const float* up, int64_t up_stride, const float* down, V (&chain)[R][2]) {
    const V a = V::load(down), b = V::load(down + V::width);
    for (int r = 0; r < R; ++r) {
      const V u = V::set(up[r * up_stride]);
      chain[r][0] = lora_fma(u, a, chain[r][0]);
      chain[r][1] = lora_fma(u, b, chain[r][1]);
    }
  }

  static void add(const LoraFactor& f, const LoraRows& r, int64_t group_begin, int64_t group_end,
                  LoraTurn turn, float* out) {
    const float* up = static_cast<const float*>(f.up) + packed_row(f, r) * f.up_stride;
    for (int64_t group = group_begin; group < group_end; ++group)
      for (int64_t c = 0; c < kLoraGroup; c += kWidth) {
        const float* down = static_cast<const float*>(f.down) + group * f.rank * kLoraGroup + c;
        float* to = out + (group - group_begin) * kLoraGroup + c;
        int64_t row = 0;
        for (; row + kHeld <= r.count; row += kHeld)
          tile<kHeld>(f, up + row * f.up_stride, down, turn, to + row * kLoraPanel);
        for (; row < r.count; ++row)
          tile<1>(f, up + row * f.up_stride, down, turn, to + row * kLoraPanel);
      }
  }
};

template <class V, class Update>
struct LoraKernel {
  // bf16 rows with a path of their own need the update's columns split.
  static constexpr bool kSplitBf16 = V::width == 16;

  static int64_t panel_width(const LoraBlock& b, int64_t column) {
    const int64_t left = b.column_end - column;
    return left < kLoraPanel ? left : kLoraPanel;
  }

  // The update of some rows of a panel. Not inlined, nor the rows below: no arithmetic may move across a change of
  // the float mode.
  __attribute__((noinline)) static void panel(const LoraRows& r, int64_t column, LoraTurn turn,
                                              float* update) {
    const LoraBlock& b = r.block;
    const int64_t groups = ceil_div(panel_width(b, column), kLoraGroup);
    const int64_t group = column / kLoraGroup;
    for (int64_t i = 0; i < b.factor_count; ++i) {
      if (!reaches(b.factors[i], b)) continue;
      Update::add(b.factors[i], r, group, group + groups, turn, update);
      turn = LoraTurn::later;
    }
  }

  static bool reaches(const LoraFactor& f, const LoraBlock& b) {
    return f.block_begin <= b.index && b.index < f.block_end;
  }

  // lora_recomputed, a vector at a time.
  template <class T, class U>
  static void recompute(const T* merged, const float* update, U* back) {
    for (int j = 0; j < kLoraGroup; j += V::width) {
      const V r = V::load(merged + j) - V::load(update + j);
      if constexpr (std::is_same_v<T, bf16>) {
        float wide[V::width];
        r.store(wide);
        for (int i = 0; i < V::width; ++i)
          back[j + i] = static_cast<U>(float_to_bits(wide[i]) >> 16);
      } else {
        r.store(reinterpret_cast<T*>(back + j));
      }
    }
  }

  template <class T, class U>
  static uint32_t checksum(const U* bits) {
    uint32_t sum = 0;
    for (uint32_t j = 0; j < kLoraGroup; ++j) sum += lora_checksum<T>(bits[j], j);
    return sum;
  }

  template <class T, class U>
  static void merge_group(T* weight, const float* update, int bits, uint32_t* words, U*& escapes,
                          uint32_t& sum) {
    U old[kLoraGroup], back[kLoraGroup];
    T merged[kLoraGroup];
    std::memcpy(old, weight, sizeof old);
    for (int j = 0; j < kLoraGroup; j += V::width)
      (V::load(weight + j) + V::load(update + j)).store(merged + j);
    sum += checksum<T>(old);
    std::memcpy(weight, merged, sizeof merged);
    if (bits == 0) return;
    recompute(merged, update, back);
    uint8_t code[kLoraGroup];
    for (int j = 0; j < kLoraGroup; ++j) code[j] = lora_code<T>(old[j], back[j], bits);
    lora_pack(code, bits, words);
    for (uint32_t escaped = lora_escaped(words, bits); escaped; escaped &= escaped - 1)
      *escapes++ = old[__builtin_ctz(escaped)];
  }

  template <class T, class U>
  static void unmerge_group(T* weight, const float* update, int bits, const uint32_t* words,
                            const U*& escapes, uint32_t& sum) {
    U back[kLoraGroup];
    uint8_t code[kLoraGroup];
    recompute(weight, update, back);
    lora_unpack(words, bits, code);
    for (int j = 0; j < kLoraGroup; ++j) back[j] = lora_decoded<T>(back[j], code[j], bits);
    for (uint32_t escaped = lora_escaped(words, bits); escaped; escaped &= escaped - 1)
      back[__builtin_ctz(escaped)] = *escapes++;
    sum += checksum<T>(back);
    std::memcpy(weight, back, sizeof back);
  }

  template <class T, bool kMerge, class Escapes>
  __attribute__((noinline)) static void group(T* weight, const float* update, float scale,
                                              const LoraBlock& b, uint32_t* words, Escapes& escapes,
                                              uint32_t& sum) {
    alignas(64) float scaled[kLoraGroup];
    for (int j = 0; j < kLoraGroup; ++j) {
      const bool split = kSplitBf16 && std::is_same_v<T, bf16>;
      scaled[j] = scale * update[split ? j / 2 + j % 2 * (kLoraGroup / 2) : j];
    }
    if constexpr (kMerge)
      merge_group(weight, scaled, b.bits, words, escapes, sum);
    else
      unmerge_group(weight, scaled, b.bits, words, escapes, sum);
  }

  // The rows of a panel. A last group that is not full goes through a full one of zeros.
  template <class T, bool kMerge, int kBits, class Escapes>
  __attribute__((noinline)) static void rows(const LoraRows& r, int64_t column, const float* update,
                                             float scale, Escapes& escapes, uint32_t& sum) {
    const LoraBlock& b = r.block;
    const int64_t width = panel_width(b, column), offset = column - b.column_begin;
    // What to fetch: the panel after this one, or the first one of the block below.
    const bool last = column + kLoraPanel >= b.column_end;
    const int64_t first_word = offset / kLoraGroup * kBits;
    const int64_t next = last ? b.rows * b.stride - offset : kLoraPanel;
    const int64_t next_words =
        last ? b.rows * b.code_stride - first_word : kLoraPanel / kLoraGroup * kBits;
#if defined(__AVX512BW__)
    LoraBf16<kBits> wide(scale);
    Escapes at = escapes;
#endif
    for (int64_t row = r.begin; row < r.begin + r.count; ++row, update += kLoraPanel) {
      T* weight = static_cast<T*>(b.weight) + row * b.stride + offset;
      uint32_t* words = b.codes + row * b.code_stride + first_word;
      const float* d = update;
      if constexpr (kBits > 0) __builtin_prefetch(words + next_words, kMerge, 3);
      int64_t c = 0;
      for (; c + kLoraGroup <= width; c += kLoraGroup, words += kBits) {
        __builtin_prefetch(weight + c + next, 0, 3);
#if defined(__AVX512BW__)
        if constexpr (kSplitBf16 && std::is_same_v<T, bf16>) {
          if constexpr (kMerge) {
            if (wide.merge(weight + c, d + c, words, at)) continue;
          } else {
            wide.unmerge(weight + c, d + c, words, at);
            continue;
          }
          escapes = at;
          group<T, kMerge>(weight + c, d + c, scale, b, words, escapes, sum);
          at = escapes;
          continue;
        }
#endif
        group<T, kMerge>(weight + c, d + c, scale, b, words, escapes, sum);
      }
      if (c < width) {
#if defined(__AVX512BW__)
        if constexpr (kSplitBf16 && std::is_same_v<T, bf16>) escapes = at;
#endif
        T part[kLoraGroup] = {};
        std::memcpy(part, weight + c, (width - c) * sizeof(T));
        group<T, kMerge>(part, d + c, scale, b, words, escapes, sum);
        std::memcpy(weight + c, part, (width - c) * sizeof(T));
#if defined(__AVX512BW__)
        at = escapes;
#endif
      }
    }
#if defined(__AVX512BW__)
    if constexpr (kSplitBf16 && std::is_same_v<T, bf16>) {
      escapes = at;
      sum += wide.checksum();
    }
#endif
  }

  template <class T, bool kMerge, int kBits>
  static LoraPassed pass(const LoraBlock& b) {
    using U = LoraBits<T>;
    using Escapes = std::conditional_t<kMerge, U*, const U*>;
    alignas(64) float update[kLoraRows * kLoraPanel];
    Escapes escapes = static_cast<U*>(b.escapes);
    LoraPassed passed;
    const LoraFactor* only = nullptr;
    int64_t count = 0;
    for (int64_t i = 0; i < b.factor_count; ++i)
      if (reaches(b.factors[i], b)) only = b.factors + i, ++count;
    if (count == 0) std::memset(update, 0, sizeof update);
    const LoraTurn turn = count == 1 ? LoraTurn::only : LoraTurn::first;
    const float scale = count == 1 ? only->scale : 1.0f;
    const bool switching = count > 0 && !Update::in_any_mode(*only, turn);
    const int64_t at_once = Update::rows_at_once(b);
    const LoraFloatMode mode;
    mode.weights();
    [[maybe_unused]] const typename Update::Unit unit;
    for (int64_t column = b.column_begin; column < b.column_end; column += kLoraPanel)
      for (int64_t row = 0; row < b.rows; row += at_once) {
        const int64_t left = b.rows - row;
        const LoraRows some{b, row, left < at_once ? left : at_once};
        if (switching) mode.update();
        panel(some, column, turn, update);
        if (switching) mode.weights();
        rows<T, kMerge, kBits>(some, column, update, scale, escapes, passed.checksum);
      }
    passed.escapes = escapes - static_cast<U*>(b.escapes);
    return passed;
  }

  template <class T, bool kMerge>
  static LoraPassed with_bits(const LoraBlock& b) {
    switch (b.bits) {
      case 2:
        return pass<T, kMerge, 2>(b);
      case 3:
        return pass<T, kMerge, 3>(b);
      case 4:
        return pass<T, kMerge, 4>(b);
      default:
        return pass<T, kMerge, 0>(b);
    }
  }

  template <bool kMerge>
  static LoraPassed run(const LoraBlock& b) {
    switch (b.dtype) {
      case DType::f32:
        return with_bits<float, kMerge>(b);
      case DType::bf16:
        return with_bits<bf16, kMerge>(b);
      case DType::f16:
        return with_bits<f16, kMerge>(b);
    }
    return {};
  }

  static LoraKernels kernels(bool pairs) { return {run<true>, run<false>, pairs, kSplitBf16}; }
};

}  // namespace
}  // namespace sgld
