#include "lora_pack.h"

#include <algorithm>

#include "lora_codes.h"

namespace sgld {
namespace {

template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// What is not finite has all bits of the exponent: one more carries into the sign. No early end, so that the compiler
// can take many at a time.
template <class U>
bool finite_row(const U* bits, int64_t n, U exponent) {
  const U one = exponent & -exponent;
  U found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<U>((bits[i] & exponent) + one);
  return found >> (8 * sizeof(U) - 1) == 0;
}

bool finite_row(const void* row, DType dtype, int64_t n) {
  if (dtype == DType::f32)
    return finite_row(static_cast<const uint32_t*>(row), n, uint32_t{0x7f800000});
  const uint16_t exponent = dtype == DType::bf16 ? 0x7f80 : 0x7c00;
  return finite_row(static_cast<const uint16_t*>(row), n, exponent);
}

// The column of a group that is at place j.
int column_at(int j, bool split) {
  constexpr int half = kLoraGroup / 2;
  return split ? j % half * 2 + j / half : j;
}

// Two ranks of a group of bf16 columns, interleaved; null: one that the adapter does not have.
void pack_pair(const bf16* first, const bf16* second, int64_t width, bool split, int64_t rank,
               uint32_t* out) {
  uint32_t* halves[2] = {out, out + rank / 2 * 16};
  if (split && second && width == kLoraGroup) {
    uint32_t a[16], b[16];
    std::memcpy(a, first, sizeof a);
    std::memcpy(b, second, sizeof b);
    for (int j = 0; j < 16; ++j) {
      halves[0][j] = (a[j] & 0xffffu) | b[j] << 16;
      halves[1][j] = a[j] >> 16 | (b[j] & 0xffff0000u);
    }
    return;
  }
  for (int j = 0; j < kLoraGroup; ++j) {
    const int c = column_at(j, split);
    const uint32_t low = c < width && first ? first[c].bits : 0;
    const uint32_t high = c < width && second ? second[c].bits : 0;
    halves[j / 16][j % 16] = low | high << 16;
  }
}

template <class T>
void widen_group(const T* row, int64_t width, bool split, float* out) {
  if (width < kLoraGroup) {
    for (int j = 0; j < kLoraGroup; ++j) {
      const int c = column_at(j, split);
      out[j] = c < width ? widen(row[c]) : 0.0f;
    }
  } else if (split) {
    for (int j = 0; j < kLoraGroup / 2; ++j) {
      out[j] = widen(row[2 * j]);
      out[j + kLoraGroup / 2] = widen(row[2 * j + 1]);
    }
  } else {
    for (int j = 0; j < kLoraGroup; ++j) out[j] = widen(row[j]);
  }
}

// Groups of bf16 pairs. Some groups at a time, so that whole lines of the cache are read one after another; rows lie
// far apart, so those that follow are fetched.
void pack_pairs(const LoraAdapter& a, const LoraFactor& f, int64_t cols, bool split,
                int64_t group_begin, int64_t group_end, uint32_t* out) {
  constexpr int64_t kAtOnce = 4, kAhead = 8;
  const bf16* down = static_cast<const bf16*>(a.down);
  for (int64_t begin = group_begin; begin < group_end; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, group_end);
    for (int64_t k = 0; k < f.rank; k += 2)
      for (int64_t group = begin; group < end; ++group) {
        uint32_t* to = out + group * f.rank * (kLoraGroup / 2) + k / 2 * 16;
        const int64_t width = std::min(cols - group * kLoraGroup, kLoraGroup);
        const bf16* first = down + k * a.down_stride + group * kLoraGroup;
        if (k + kAhead + 1 < a.rank) {
          __builtin_prefetch(first + kAhead * a.down_stride);
          __builtin_prefetch(first + (kAhead + 1) * a.down_stride);
        }
        const bf16* second = k + 1 < a.rank ? first + a.down_stride : nullptr;
        pack_pair(k < a.rank ? first : nullptr, second, width, split, f.rank, to);
      }
  }
}

}  // namespace

bool rows_finite(const void* data, DType dtype, int64_t stride, int64_t rows, int64_t n) {
  const char* row = static_cast<const char*>(data);
  for (int64_t i = 0; i < rows; ++i, row += stride * size_of(dtype))
    if (!finite_row(row, dtype, n)) return false;
  return true;
}

LoraFactor plan_factor(const LoraAdapter& a, const LoraKernels& kernels, int64_t rows) {
  LoraFactor f;
  f.block_begin = a.start / kLoraRows;
  f.block_end = ceil_div(a.start + a.rows, kLoraRows);
  f.pairs = kernels.pairs && a.down_dtype == DType::bf16 && a.up_dtype == DType::bf16;
  f.rank = f.pairs ? ceil_div(a.rank, kLoraChain) * kLoraChain : ceil_div(a.rank, 2) * 2;
  f.scale = a.scale;
  f.up_stride = f.rank;
  // Whole tiles of the adapter's own numbers, each row of which is a line of the cache.
  const int64_t end = a.start + a.rows;
  const bool whole = a.start % kLoraRows == 0 && a.rows % kLoraTileRows == 0 &&
                     (end % kLoraRows == 0 || end == rows);
  const bool aligned = reinterpret_cast<uintptr_t>(a.up) % 64 == 0 && a.up_stride % 32 == 0;
  if (f.pairs && f.rank == a.rank && whole && aligned) {
    f.up = a.up;
    f.up_stride = a.up_stride;
  }
  return f;
}

int64_t down_bytes(const LoraFactor& f, int64_t cols) {
  return ceil_div(cols, kLoraGroup) * kLoraGroup * f.rank * (f.pairs ? 2 : 4);
}

int64_t up_bytes(const LoraFactor& f) {
  return f.up ? 0 : (f.block_end - f.block_begin) * kLoraRows * f.rank * (f.pairs ? 2 : 4);
}

void pack_down(const LoraAdapter& a, const LoraFactor& f, int64_t cols, bool split,
               int64_t group_begin, int64_t group_end, void* out) {
  if (f.pairs)
    return pack_pairs(a, f, cols, split, group_begin, group_end, static_cast<uint32_t*>(out));
  with_type(a.down_dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t group = group_begin; group < group_end; ++group) {
      const int64_t left = cols - group * kLoraGroup;
      const int64_t width = left < kLoraGroup ? left : kLoraGroup;
      const T* column = static_cast<const T*>(a.down) + group * kLoraGroup;
      float* to = static_cast<float*>(out) + group * f.rank * kLoraGroup;
      for (int64_t k = 0; k < a.rank; ++k, to += kLoraGroup)
        widen_group(column + k * a.down_stride, width, split, to);
      if (f.rank > a.rank) std::memset(to, 0, (f.rank - a.rank) * kLoraGroup * sizeof(float));
    }
  });
}

void pack_up(const LoraAdapter& a, const LoraFactor& f, int64_t begin, int64_t end, void* out) {
  with_type(a.up_dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t own = f.block_begin * kLoraRows + row - a.start;
      const bool inside = own >= 0 && own < a.rows;
      const T* from = static_cast<const T*>(a.up) + (inside ? own * a.up_stride : 0);
      const int64_t filled = inside ? a.rank : 0;
      if (f.pairs) {
        bf16* to = static_cast<bf16*>(out) + row * f.rank;
        std::memcpy(to, from, filled * sizeof(bf16));
        std::memset(to + filled, 0, (f.rank - filled) * sizeof(bf16));
      } else {
        float* to = static_cast<float*>(out) + row * f.rank;
        for (int64_t k = 0; k < filled; ++k) to[k] = widen(from[k]);
        for (int64_t k = filled; k < f.rank; ++k) to[k] = 0.0f;
      }
    }
  });
}

void pack_transposed(const View& m, int64_t length, int64_t group_begin, int64_t group_end,
                     float* out) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t group = group_begin; group < group_end; ++group) {
      float* to = out + group * length * kLoraGroup;
      std::memset(to, 0, length * kLoraGroup * sizeof(float));
      const int64_t left = m.sizes[0] - group * kLoraGroup;
      for (int64_t j = 0; j < left && j < kLoraGroup; ++j) {
        const T* row = static_cast<const T*>(m.data) + (group * kLoraGroup + j) * m.strides[0];
        for (int64_t k = 0; k < m.sizes[1]; ++k) to[k * kLoraGroup + j] = widen(row[k]);
      }
    }
  });
}

void count_codes(const uint32_t* words, int64_t groups, LoraSample& sample) {
  static_assert(kLoraMinBits == 2 && kLoraMaxBits == 4, "the codes below are those of 4 bits");
  for (int64_t group = 0; group < groups; ++group, words += kLoraMaxBits) {
    // Planes of c - 7, which is from -7 to 8; 2 bits hold -1 to 1, 3 bits hold -3 to 3.
    const uint32_t p0 = words[0], p1 = words[1], p2 = words[2], p3 = words[3];
    const uint32_t two = (~p3 & p2 & p1) | (p3 & ~p2 & ~p1 & ~p0);
    const uint32_t three = (~p3 & p2) | (p3 & ~p2 & ~(p1 & p0));
    sample.escapes[2] += __builtin_popcount(~two);
    sample.escapes[3] += __builtin_popcount(~three);
    sample.escapes[4] += __builtin_popcount(p3 & p2 & p1 & p0);
    sample.weights += kLoraGroup;
  }
}

int choose_bits(const LoraSample& sample, DType dtype) {
  const double whole = 8.0 * static_cast<double>(size_of(dtype));
  double least = whole / 2;
  int best = 0;
  for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits) {
    const double part =
        static_cast<double>(sample.escapes[bits]) / static_cast<double>(sample.weights);
    if (bits + part * whole < least) {
      least = bits + part * whole;
      best = bits;
    }
  }
  return best;
}

}  // namespace sgld
