// One pass over the tiles of many matrices at once, the way a GPU merges and unmerges LoRA. A tile is 48 rows by 128
// columns: one panel of a block of lora.h, so records are the same as a CPU's. Tables in memory of the device say where
// everything is; the caller makes them, the results of one pass and the tables of the next.
#pragma once

#include "sgld/lora.h"

namespace sgld {

enum class LoraMode : int64_t {
  sample = 0,   // count the escapes of 2, 3 and 4 bits, change nothing
  merge = 1,    // change weights, write codes, put escapes anywhere in the matrix's room
  unmerge = 2,  // the reverse, escapes where `starts` says
  count = 3,    // count the escapes of each tile from its codes
  gather = 4,   // move the escapes of each tile from `starts` to `places`
};

// Columns of the table of matrices; addresses are those of the device.
enum LoraMatrixColumn {
  kLoraWeight,
  kLoraRowCount,
  kLoraColumnCount,
  kLoraStride,     // elements from row to row
  kLoraFirstTile,  // tiles go block by block, panel by panel
  kLoraPartsFrom,  // adapters, in the table of parts
  kLoraPartsTo,
  kLoraCodes,
  kLoraBitCount,  // of a code; 0: none
  kLoraEscapes,
  kLoraRoom,      // for that many of them
  kLoraGathered,  // where `gather` moves them
  kLoraMatrixColumns
};

// Columns of the table of parts. down [rank, columns] and up [rows, rank], each of its own type.
enum LoraPartColumn {
  kLoraDown,
  kLoraUp,
  kLoraRank,
  kLoraDownStride,
  kLoraUpStride,
  kLoraStart,  // the first row of the matrix
  kLoraPartRows,
  kLoraDownType,
  kLoraUpType,
  kLoraPartColumns
};

// Columns of the sums of a matrix, to which tiles add.
enum LoraSumColumn { kLoraChecksum, kLoraTaken, kLoraEscaped2, kLoraSumColumns = 8 };

struct LoraTables {
  LoraMode mode = LoraMode::sample;
  const int64_t* matrices = nullptr;
  const int64_t* parts = nullptr;
  const float* scales = nullptr;
  const int32_t* owner = nullptr;  // of each tile
  int64_t tiles = 0;
  // Of each tile. `starts`: sample, the tile of the matrix; merge, where escapes were put or -1 if nothing was
  // changed, as there was no room; unmerge, where they are, or -1 to leave the tile.
  int64_t* starts = nullptr;
  int32_t* counts = nullptr;
  const int64_t* places = nullptr;
  uint32_t* sums = nullptr;
};

// Whether an adapter has rows in a block of 48 rows.
SGLD_HOST_DEVICE static inline bool lora_reaches(const int64_t* part, int64_t block) {
  const int64_t end = part[kLoraStart] + part[kLoraPartRows];
  return part[kLoraStart] / kLoraRows <= block && block < (end + kLoraRows - 1) / kLoraRows;
}

// A column of the shared copy of `down` on a GPU: the halves of each 8 apart, so that 8 threads that read 16 bytes each
// meet 32 banks.
SGLD_HOST_DEVICE static constexpr int lora_down_at(int column) {
  return column / 4 % 2 * (static_cast<int>(kLoraPanel) / 2) + column / 8 * 4 + column % 4;
}

// Blocks of a pass stay on their multiprocessor, two of them there at a time.
constexpr unsigned lora_grid(int64_t tiles, int processors) {
  return static_cast<unsigned>(tiles < 2 * processors ? tiles : 2 * processors);
}

}  // namespace sgld
