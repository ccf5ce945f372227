// Low-rank updates of weights: W += sum over adapters of scale * up * down, and its exact reverse.
//
// The update of one element is a fixed sequence of fp32 operations, so that every kernel, whatever its ISA, its
// threads or the rest of the call, gets the same bits (subnormals count as zero and results below the smallest
// normal number become zero):
//   for each adapter, in order:
//     sum = 0
//     for each block of 32 ranks: even and odd ranks are one chain of fused multiply-adds each, from 0;
//                                 sum = sum + (even + odd)
//     update = fma(scale, sum, update)
// It is the order of the matrix units (AMX) of x86 CPUs.
//
// Merging rounds W + update to the weight's dtype. Recomputing `merged - update` lands within a few units in the
// last place of W; the difference of the bit patterns is a code of 2 to 4 bits per weight. The largest code is an
// escape: the weight itself is kept in a list. What is not finite always escapes.
#pragma once

#include "sgld/types.h"

namespace sgld {

constexpr int64_t kLoraRows =
    48;  // rows of a block, which is one task with its own list of escapes
constexpr int64_t kLoraPanel = 128;  // columns of a block whose update is computed at a time
constexpr int64_t kLoraGroup =
    32;  // weights whose codes share words: bit j of word p is bit p of code j
constexpr int64_t kLoraChain = 32;  // ranks of a block of the sum
constexpr int kLoraMinBits = 2, kLoraMaxBits = 4;

static inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// One adapter on one matrix, packed. Rows are those of whole blocks, with zeros around the adapter's own; an adapter
// whose rows end with the matrix has none after them.
struct LoraFactor {
  int64_t block_begin = 0, block_end = 0;  // blocks of the matrix it reaches
  int64_t rank = 0;                        // even; a multiple of kLoraChain in pairs
  float scale = 0;
  bool pairs =
      false;  // for the matrix units: down [group][half][rank / 2][16][2], up [row][rank], both bf16
  const void* down = nullptr;  // otherwise fp32: [group][rank][32]
  const void* up = nullptr;    // [row][rank], rows `up_stride` elements apart
  int64_t up_stride = 0;
};

// Part of a block: its first element, and where codes and escapes are written to or read from.
struct LoraBlock {
  const LoraFactor* factors = nullptr;
  int64_t factor_count = 0;
  DType dtype = DType::f32;
  int64_t index = 0;                         // of the block in the matrix
  int64_t rows = 0;                          // at most kLoraRows
  int64_t cols = 0;                          // of the matrix
  int64_t column_begin = 0, column_end = 0;  // begin is a multiple of kLoraPanel
  void* weight = nullptr;                    // at row 0, column_begin
  int64_t stride = 0;                        // elements from row to row
  int bits = 0;                              // of a code; 0: no codes
  uint32_t* codes = nullptr;                 // at row 0, column_begin
  int64_t code_stride = 0;                   // words from row to row
  // Elements of the weight's dtype, panel by panel, row by row. A merge may write kLoraGroup behind the last one.
  void* escapes = nullptr;
};

// What a pass over a block found. The checksum is over the unmerged weights, in wrapping arithmetic: the sum of the
// signed bit patterns, each times 2 * (column % 32) + 1.
struct LoraPassed {
  int64_t escapes = 0;
  uint32_t checksum = 0;
};

struct LoraKernels {
  LoraPassed (*merge)(const LoraBlock&);
  LoraPassed (*unmerge)(const LoraBlock&);
  bool pairs;  // takes packed pairs where both factors are bf16
  // Columns of a group of a bf16 matrix come apart in the packed factors and in the update: the even ones first.
  bool split_bf16;
};

constexpr const char* kLoraMerge = "lora_merge_";
constexpr const char* kLoraUnmerge = "lora_unmerge_";

}  // namespace sgld
