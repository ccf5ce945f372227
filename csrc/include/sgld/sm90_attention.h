// The numbers of the sm_90a attention kernel, as pure functions: tiles, shared memory, the swizzle that the copy engine
// writes and the matrix units read, the descriptors of the latter, the rings of stages and the order of the tiles. No
// CUDA in here, so that a CPU checks them; the kernel uses these very functions.
#pragma once

#include <cstdint>

#include "sgld/types.h"

namespace sgld {

// One producer warpgroup and two consumers of 64 queries each.
constexpr int kSm90Warpgroup = 128;
constexpr int kSm90Consumers = 2;
constexpr int kSm90Threads = (1 + kSm90Consumers) * kSm90Warpgroup;
constexpr int kSm90Rows = 64;  // of a wgmma
constexpr int kSm90Queries = kSm90Consumers * kSm90Rows;
constexpr int kSm90Stages = 2;  // of keys, and of values

SGLD_HOST_DEVICE constexpr int sm90_keys(int dim) { return dim == 128 ? 176 : 128; }

// Registers: 168 a thread at the launch; the producer gives up what the consumers take.
constexpr int kSm90ProducerRegisters = 24, kSm90ConsumerRegisters = 240;

// A tile lies in shared memory as columns of 64 bf16, one after another; a row of such a column is 128 bytes, and the
// 16-byte pieces of the rows of a group of 8 are exchanged so that any 8 rows of one piece lie in different banks.
constexpr int kSm90Column = 64;
constexpr int kSm90RowBytes = kSm90Column * 2;
constexpr int kSm90GroupBytes = 8 * kSm90RowBytes;

SGLD_HOST_DEVICE constexpr int sm90_swizzled(int row, int piece) {
  return row * kSm90RowBytes + ((piece ^ (row & 7)) << 4);
}

SGLD_HOST_DEVICE constexpr int sm90_tile_bytes(int rows, int dim) { return rows * dim * 2; }

// Where things are in shared memory, from a base that is a multiple of kSm90GroupBytes.
struct Sm90Shared {
  int q = 0, k = 0, v = 0, barriers = 0, bytes = 0;
};

SGLD_HOST_DEVICE constexpr Sm90Shared sm90_shared(int dim) {
  Sm90Shared at;
  at.k = sm90_tile_bytes(kSm90Queries, dim);
  at.v = at.k + kSm90Stages * sm90_tile_bytes(sm90_keys(dim), dim);
  at.barriers = at.v + kSm90Stages * sm90_tile_bytes(sm90_keys(dim), dim);
  at.bytes = at.barriers + (4 * kSm90Stages + 2) * 8;
  return at;
}

// A launch asks for room to align the base as well.
constexpr int sm90_shared_bytes(int dim) { return sm90_shared(dim).bytes + kSm90GroupBytes; }

// The 64-bit matrix descriptor of wgmma with the 128-byte swizzle. `leading` is the distance of two columns of 64
// elements where those run along M or N (the values), unused where they run along K (queries and keys); the stride is
// that of groups of 8 rows.
SGLD_HOST_DEVICE constexpr uint64_t sm90_descriptor(uint32_t address, uint32_t leading) {
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{(leading & 0x3ffffu) >> 4} << 16 |
         uint64_t{kSm90GroupBytes >> 4} << 32 | uint64_t{1} << 62;
}

// Byte offsets of step `step` of 16 along K. Keys and queries: 4 steps in a row of a column of `rows` rows; values: 16
// rows a step.
SGLD_HOST_DEVICE constexpr int sm90_step_along_row(int step, int rows) {
  return step / 4 * rows * kSm90RowBytes + step % 4 * 32;
}
SGLD_HOST_DEVICE constexpr int sm90_step_down(int step) { return step * 2 * kSm90GroupBytes; }

// A place in a ring of stages. Phase is the parity of the turn: a reader waits for `full` with it, the writer for
// `empty` with the other one, which a fresh barrier passes.
struct Sm90Ring {
  int stage = 0;
  uint32_t phase = 0;
  SGLD_HOST_DEVICE constexpr void next() {
    if (++stage == kSm90Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Blocks of one head come one after another, so that those that run at a time share its keys in L2.
struct Sm90Tile {
  int first_query = 0, head = 0, sequence = 0;
};

SGLD_HOST_DEVICE constexpr Sm90Tile sm90_tile(int64_t index, int blocks, int heads) {
  const int64_t row = index / blocks;
  return {static_cast<int>(index % blocks) * kSm90Queries, static_cast<int>(row % heads),
          static_cast<int>(row / heads)};
}

SGLD_HOST_DEVICE constexpr int sm90_steps(int keys, int tile_keys) {
  return (keys + tile_keys - 1) / tile_keys;
}

// Persistent: at most one block a multiprocessor.
constexpr unsigned sm90_grid(int64_t tiles, int processors) {
  return static_cast<unsigned>(tiles < processors ? tiles : processors);
}

// The row and the first of two columns of register `index` of an accumulator, of thread `thread` of a warpgroup. Two
// neighbours in a row are two neighbouring registers.
SGLD_HOST_DEVICE constexpr int sm90_row(int thread, int index) {
  return thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
}
SGLD_HOST_DEVICE constexpr int sm90_column(int thread, int index) {
  return index / 4 * 8 + thread % 4 * 2 + index % 2;
}

}  // namespace sgld
