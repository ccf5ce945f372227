#include "attention_kernel.h"

namespace sgld {
namespace {

struct Tiles : FmaTiles<ScalarVec, 4, 2> {
  static constexpr int64_t kStrip = 16, kKeys = 128, kQueries = 64;
};

}  // namespace

const AttentionKernels& attention_scalar() { return AttentionKernel<Tiles>::table; }

void attention_merge_rows_scalar(const AttentionMerge& p, int64_t begin, int64_t end) {
  AttentionMergeKernel<ScalarVec>::run(p, begin, end);
}

}  // namespace sgld
