// What surrounds the blocks of a LoRA merge: factors in the kernels' order, and the choice of a code.
#pragma once

#include "sgld/lora.h"

namespace sgld {

constexpr int64_t kLoraTileRows = 16;  // that a matrix unit reads at a time

// One adapter as the caller gave it; the last dimensions are dense.
struct LoraAdapter {
  const void* down = nullptr;  // [rank, columns of the matrix]
  const void* up = nullptr;    // [rows, rank]
  DType down_dtype = DType::f32, up_dtype = DType::f32;
  int64_t down_stride = 0, up_stride = 0;
  int64_t rank = 0;
  int64_t start = 0, rows = 0;  // the rows of the matrix it is for
  float scale = 0;
};

bool rows_finite(const void* data, DType dtype, int64_t stride, int64_t rows, int64_t n);

// The sizes of the packed factor, without its data; `up` is there already where the kernels can read the adapter's
// own. `rows` are those of the matrix.
LoraFactor plan_factor(const LoraAdapter& adapter, const LoraKernels& kernels, int64_t rows);
int64_t down_bytes(const LoraFactor& factor, int64_t cols);
int64_t up_bytes(const LoraFactor& factor);  // to pack
// `split`: the even columns of each group first.
void pack_down(const LoraAdapter& adapter, const LoraFactor& factor, int64_t cols, bool split,
               int64_t group_begin, int64_t group_end, void* out);
// `begin` and `end` are rows of the packed factor.
void pack_up(const LoraAdapter& adapter, const LoraFactor& factor, int64_t begin, int64_t end,
             void* out);

// A matrix [n, k] as fp32 [group of n][length][32], with zeros up to `length`.
void pack_transposed(const View& matrix, int64_t length, int64_t group_begin, int64_t group_end,
                     float* out);

// How many of some sampled weights each number of bits would not hold.
struct LoraSample {
  int64_t weights = 0;
  int64_t escapes[kLoraMaxBits + 1] = {};
};
void count_codes(const uint32_t* words, int64_t groups, LoraSample& sample);  // of kLoraMaxBits
// The cheapest number of bits, or 0 if a copy of the matrix is not much more.
int choose_bits(const LoraSample& sample, DType dtype);

}  // namespace sgld
