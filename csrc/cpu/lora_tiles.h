// The tile registers of x86 CPUs as the LoRA kernels use them. For files that are compiled for AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sgld {
namespace {  // each ISA file keeps its own

constexpr int kRowsOfTile = 16, kBytesOfRow = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight full tiles of this thread, while it lives. Other libraries keep theirs set up between calls, so they come back.
struct TileUnit {
  TileConfig saved;
  TileUnit() {
    _tile_storeconfig(&saved);
    TileConfig all;
    all.palette = 1;
    for (int i = 0; i < 8; ++i) all.bytes[i] = kBytesOfRow, all.rows[i] = kRowsOfTile;
    _tile_loadconfig(&all);
  }
  ~TileUnit() {
    if (saved.palette)
      _tile_loadconfig(&saved);
    else
      _tile_release();
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

}  // namespace
}  // namespace sgld
