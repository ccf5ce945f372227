// Reads numbers of files into memory, with many threads at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "sgld/convert.h"

namespace sgld {

// Descriptors of one file. `direct` passes by the page cache (O_DIRECT); -1 where the file system has no such thing.
struct WeightFile {
  int buffered = -1;
  int direct = -1;
};

// `count` numbers of a file from byte `begin` on, and where they go: as `to`, or as they are where `from` is bytes.
// Pieces do not overlap, neither in their file nor where they go.
struct WeightPiece {
  int64_t file = 0;
  int64_t begin = 0;
  int64_t count = 0;
  Number from = Number::bytes;
  DType to = DType::f32;
  void* target = nullptr;
};

// The piece that could not be read, and errno; 0 where the file ends too early. No piece: everything was read.
struct WeightFailure {
  int64_t piece = -1;
  int error = 0;
};

// What one thread reads at a time, and the most it takes of the memory beside the targets.
constexpr int64_t kWeightWindow = 4 << 20;
constexpr int64_t kWeightPage = 4096;
constexpr int64_t kWeightScratch = kWeightWindow + 2 * kWeightPage;

WeightFailure read_weights(const std::vector<WeightFile>& files,
                           const std::vector<WeightPiece>& pieces, int threads);

}  // namespace sgld
