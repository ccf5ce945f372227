#include "attention_kernel.h"

namespace sgld {
namespace {

struct Tiles : FmaTiles<Avx2Vec, 6, 2> {
  static constexpr int64_t kStrip = 24, kKeys = 256, kQueries = 96;
};

}  // namespace

const AttentionKernels& attention_avx2() { return AttentionKernel<Tiles>::table; }

void attention_merge_rows_avx2(const AttentionMerge& p, int64_t begin, int64_t end) {
  AttentionMergeKernel<Avx2Vec>::run(p, begin, end);
}

}  // namespace sgld
