// How the CUDA kernels are launched, checked without CUDA. Run by ctest.
#include "sgld/cuda_launch.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#include "expect.h"

namespace {

using namespace sgld;

void rows_are_covered_by_few_registers() {
  for (int64_t D = 1; D <= 20000; ++D) {
    const int items = row_items(D);
    const std::string at = " at D = " + std::to_string(D);
    if (D % kChunkElements != 0 || D > 16384) {
      expect(items == 0, "the streamed kernel" + at);
      continue;
    }
    const unsigned threads = row_threads(D, items);
    expect(items == 1 || items == 2 || items == 4, "an instantiated number of items" + at);
    expect(threads % kWarpThreads == 0 && threads <= kBlockThreads / 2, "threads of a block" + at);
    expect(static_cast<int64_t>(threads) * items * kChunkElements >= D, "the whole row" + at);
  }
  expect(row_items(0) == 0, "no row");
  expect(row_items(3072) == 2 && row_threads(3072, 2) == 192, "3072");
}

void alignment_is_by_bytes() {
  expect(aligned_rows(64, 24, 8, 2) && !aligned_rows(64, 24, 4, 2), "16-bit strides");
  expect(aligned_rows(64, 4, 8, 4) && !aligned_rows(64, 2, 8, 4), "32-bit strides");
  expect(!aligned_rows(72, 0, 0, 2), "the base");
}

void rotation_covers_every_pair_once() {
  expect(rope_threads(24, 128, false) == 192 && rope_threads(40, 128, true) == 320, "threads");
  expect(rope_threads(3, 96, false) == 0, "a head norm needs a power of two of threads a head");
  expect(rope_threads(3, 96, true) == 32, "a full norm does not");
  expect(rope_threads(3, 40, true) == 0 && rope_threads(129, 128, true) == 0, "what cannot run");
  expect(rope_threads(2, 1024, false) == 0, "a head is inside a warp");
  // The kernel's own index maths: the pairs of all lanes of a head, for both kinds of rotation.
  const int dim = 96, lanes = dim / kRopeElements;
  for (const bool interleaved : {false, true}) {
    int seen[dim] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const int first = lane * (interleaved ? 2 * kChunkElements : kChunkElements);
      const int second = first + (interleaved ? kChunkElements : dim / 2);
      for (int j = 0; j < kChunkElements; ++j) {
        ++seen[first + j];
        ++seen[second + j];
        if (interleaved) {
          expect((first + j) / 2 == lane * kChunkElements + j / 2, "pair of the first chunk");
          expect((second + j) / 2 == lane * kChunkElements + kChunkElements / 2 + j / 2,
                 "pair of the second chunk");
        } else {
          expect(second + j - dim / 2 == lane * kChunkElements + j, "partner in the other half");
        }
      }
    }
    for (int i = 0; i < dim; ++i) expect(seen[i] == 1, "element " + std::to_string(i));
  }
}

void attention_tiles_are_conflict_free_and_fit() {
  for (const int dim : {64, 128}) {
    // sm_86 has the least shared memory a block of those from sm_80 on: 99 KiB.
    expect(attention_shared_bytes(dim) <= 99 * 1024, "shared memory at " + std::to_string(dim));
    const int row_bytes = attention_row(dim) * 2;
    expect(row_bytes % 16 == 0, "rows start at 16 bytes");
    // ldmatrix reads 16 bytes of 8 rows: together they must cover all 32 banks once.
    int seen[8] = {};
    for (int row = 0; row < 8; ++row) ++seen[row * row_bytes / 16 % 8];
    for (const int count : seen) expect(count == 1, "banks at " + std::to_string(dim));
    // What the lanes of a warp address: both ldmatrix patterns stay inside the tile and the row.
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int keys_row = kAttentionKeys - 8 + lane % 8, keys_column = dim - 32 + lane / 8 * 8;
      const int values_row = kAttentionKeys - 16 + lane % 16;
      const int values_column = dim - 16 + lane / 16 * 8;
      expect(keys_row < kAttentionKeys && keys_column + 8 <= dim, "keys");
      expect(values_row < kAttentionKeys && values_column + 8 <= dim, "values");
    }
  }
  expect(attention_blocks(1) == 1 && attention_blocks(64) == 1 && attention_blocks(65) == 2,
         "blocks of queries");
}

}  // namespace

int main() {
  rows_are_covered_by_few_registers();
  alignment_is_by_bytes();
  rotation_covers_every_pair_once();
  attention_tiles_are_conflict_free_and_fit();
  if (failures == 0) std::puts("cuda launch: all passed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
