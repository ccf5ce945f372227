// lora_apply in tiles, where x, y and the adapters are bf16. x down^T is summed in fp32 and goes on as a pair of bf16, the
// number and what its rounding lost, so that up meets 16 bits of it; y is rounded once, after all adapters of a row.
#pragma once

#include "sgld/lora.h"

namespace sgld {

constexpr int64_t kApplyRows = 32;   // of x: a task
constexpr int64_t kApplyPanel = 32;  // columns of y, and of x, at a time
constexpr int64_t kApplyRanks = 16;  // of a tile

// One adapter, packed. Each tile is 16 rows of 16 pairs of bf16.
struct LoraTileFactor {
  int64_t rank_tiles = 0;
  int64_t panel_begin = 0, panel_end = 0;  // of y, that it reaches
  float scale = 0;
  const uint32_t* down = nullptr;  // [rank tile][panel of x]: pairs of columns of x by ranks
  const uint32_t* up = nullptr;    // [panel][rank tile][half]: pairs of ranks, twice, by columns
};

struct LoraTileRows {
  const LoraTileFactor* factors = nullptr;
  int64_t factor_count = 0;
  const int64_t* rows = nullptr;  // which of x and y, rising
  int64_t count = 0;              // at most kApplyRows
  const bf16* x = nullptr;
  bf16* y = nullptr;
  int64_t width = 0, out = 0;  // of contiguous x and y
};

// An adapter's rows [rows, rank] or [rank, columns], dense.
struct LoraTileSource {
  const bf16* data = nullptr;
  int64_t rows = 0, columns = 0;
};

constexpr int64_t kTileWords = 256;

static inline int64_t lora_down_words(int64_t rank, int64_t width) {
  return ceil_div(rank, kApplyRanks) * ceil_div(width, kApplyPanel) * kTileWords;
}
static inline int64_t lora_up_words(const LoraTileFactor& f) {
  return (f.panel_end - f.panel_begin) * f.rank_tiles * 2 * kTileWords;
}
// bf16 of scratch, which is private to the calling thread and starts at a multiple of 64 bytes.
static inline int64_t lora_tile_scratch(const LoraTileRows& r) {
  int64_t tiles = ceil_div(r.width, kApplyPanel);
  for (int64_t i = 0; i < r.factor_count; ++i) tiles += r.factors[i].rank_tiles;
  return tiles * kApplyRows * kApplyPanel;
}

// `start`: the column of y that the first row of up is for.
void lora_pack_down_tiles(const LoraTileSource& down, uint32_t* out);
void lora_pack_up_tiles(const LoraTileSource& up, const LoraTileFactor& factor, int64_t start,
                        uint32_t* out);
void lora_apply_tiles(const LoraTileRows& r, bf16* scratch);

}  // namespace sgld
