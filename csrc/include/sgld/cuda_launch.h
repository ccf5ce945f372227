// How the CUDA kernels are launched, as pure functions of the sizes: no CUDA in here, so that they are tested on a CPU.
#pragma once

#include <cstdint>

namespace sgld {

constexpr int kWarpThreads = 32;
constexpr int kBlockThreads = 1024;
constexpr int kChunkElements = 8;  // 16 bytes of a 16-bit type, twice that of fp32

// Threads for some work, as whole warps.
inline unsigned whole_warps(int64_t work) {
  return static_cast<unsigned>((work + kWarpThreads - 1) / kWarpThreads * kWarpThreads);
}

// Whether every row starts at a multiple of 16 bytes.
inline bool aligned_rows(uintptr_t data, int64_t batch, int64_t token, int element_bytes) {
  const int64_t per_load = 16 / element_bytes;
  return data % 16 == 0 && batch % per_load == 0 && token % per_load == 0;
}

// Chunks a thread holds of a row of D elements, or 0 where only the streamed kernel can run. Few chunks keep enough
// threads on a row to hide the latency of its loads; the limit of 512 threads leaves every thread 128 registers.
inline int row_items(int64_t D) {
  const int64_t chunks = D / kChunkElements;
  if (D % kChunkElements != 0 || D == 0 || chunks > 4 * kBlockThreads / 2) return 0;
  if (chunks <= 256) return 1;
  return chunks <= 1024 ? 2 : 4;
}

inline unsigned row_threads(int64_t D, int items) {
  return whole_warps((D / kChunkElements + items - 1) / items);
}

// qk_norm_rope gives a thread 16 elements of one head: two chunks whose elements rotate together.
constexpr int kRopeElements = 2 * kChunkElements;

// Threads for the heads of one token, or 0 where the kernel cannot run: a head is whole threads, a norm over a head
// needs a power of two of them inside a warp, and a token is one block.
inline unsigned rope_threads(int64_t heads, int64_t dim, bool full) {
  const int64_t lanes = dim / kRopeElements;
  if (dim <= 0 || dim % kRopeElements != 0 || heads * lanes > kBlockThreads) return 0;
  if (!full && (lanes > kWarpThreads || (lanes & (lanes - 1)) != 0)) return 0;
  return whole_warps(heads * lanes);
}

// Attention by mma: a block takes 64 queries, 16 a warp, and walks over tiles of 64 keys in two stages.
constexpr int kAttentionQueries = 64;
constexpr int kAttentionKeys = 64;
constexpr int kAttentionThreads = kAttentionQueries / 16 * kWarpThreads;

// Elements of a row of a tile in shared memory, padded by 16 bytes.
constexpr int kAttentionPad = 8;
constexpr int attention_row(int dim) { return dim + kAttentionPad; }

// Two stages of keys and of values.
constexpr int attention_shared_bytes(int dim) {
  return 2 * 2 * kAttentionKeys * attention_row(dim) * 2;
}

inline unsigned attention_blocks(int64_t queries) {
  return static_cast<unsigned>((queries + kAttentionQueries - 1) / kAttentionQueries);
}

}  // namespace sgld
