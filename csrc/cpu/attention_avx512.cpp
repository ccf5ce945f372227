#include "attention_kernel.h"

namespace sgld {
namespace {

struct Tiles : FmaTiles<Avx512<false>, 12, 2> {
  static constexpr int64_t kStrip = 48, kKeys = 128, kQueries = 192;
};

}  // namespace

const AttentionKernels& attention_avx512() { return AttentionKernel<Tiles>::table; }

void attention_merge_rows_avx512(const AttentionMerge& p, int64_t begin, int64_t end) {
  AttentionMergeKernel<Avx512<false>>::run(p, begin, end);
}

}  // namespace sgld
